"""The `file` backend keeps the contract, with hard links and where there are none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from storage_backends import StorageBackend, open_backend
from storage_backends.conformance import BackendConformance


class TestFilesystem(BackendConformance):
    @pytest.fixture
    def base(self, tmp_path: Path) -> Path:
        base = tmp_path / "base"
        base.mkdir()
        return base

    @pytest.fixture
    def backend(self, base: Path) -> StorageBackend:
        return open_backend(base.as_uri(), {})

    @pytest.fixture(autouse=True)
    def leaves_nothing_unfinished(self, base: Path) -> object:
        yield
        incoming = base / ".incoming"
        assert not incoming.exists() or not list(incoming.iterdir())

    def another(self, backend: StorageBackend) -> StorageBackend:
        return open_backend("file://" + repr(backend).split("'")[1], {})


class TestFilesystemWithoutHardLinks(TestFilesystem):
    many_keys = 50

    @pytest.fixture(autouse=True)
    def no_hard_links(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def link(*_args: object, **_kwargs: object) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", link)
