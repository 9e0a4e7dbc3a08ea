"""The `s3` backend keeps the contract: on SeaweedFS, a real server that checks what it is sent, and on
moto, which checks no digest; and a server that refuses nothing at all, for the fallbacks."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import cache

import pytest

from storage_backends import Capabilities, StorageBackend, open_backend
from storage_backends.conformance import BackendConformance
from storage_backends.s3 import backend as backend_module
from storage_backends.s3.backend import make_client
from storage_backends.s3.options import S3Options
from tests.conformance.crooked_s3 import BUCKET, Behaviour, CrookedS3, running_crooked_s3
from tests.conformance.places import S3Place


@cache
def shared_client(options: S3Options) -> object:
    return make_client(options)


@pytest.fixture(scope="module")
def overwriting_server() -> Iterator[CrookedS3]:
    with running_crooked_s3(Behaviour()) as server:
        yield server


class S3Conformance(BackendConformance):
    many_keys = 250

    @pytest.fixture(autouse=True)
    def small_pages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backend_module, "PAGE_KEYS", 100)

    @pytest.fixture(autouse=True)
    def one_client_for_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Making one takes longer than most tests."""
        monkeypatch.setattr(
            backend_module, "make_client", lambda options: shared_client(replace(options, prefix=""))
        )

    @pytest.fixture
    def place(self) -> S3Place:
        raise NotImplementedError

    @pytest.fixture
    def backend(self, place: S3Place) -> Iterator[StorageBackend]:
        self.place_of_test = place
        with closing(open_backend(place.url, place.options)) as backend:
            yield backend

    def another(self, backend: StorageBackend) -> StorageBackend:
        return open_backend(self.place_of_test.url, self.place_of_test.options)


class TestS3OnSeaweedFS(S3Conformance):
    @pytest.fixture
    def place(self, seaweedfs_place: S3Place) -> S3Place:
        return seaweedfs_place

    def test_capabilities(self, backend: StorageBackend) -> None:
        assert backend.probe() == Capabilities(
            conditional_put=True, checksums=True, versioning=False, object_lock=False, resumable_put=True
        )


class TestS3OnMoto(S3Conformance):
    @pytest.fixture
    def place(self, moto_place: S3Place) -> S3Place:
        return moto_place

    def test_capabilities(self, backend: StorageBackend) -> None:
        assert backend.probe() == Capabilities(
            conditional_put=True, checksums=False, versioning=False, object_lock=False, resumable_put=True
        )


class TestS3WhereNothingIsRefused(S3Conformance):
    """A server that overwrites on `If-None-Match` and looks at no digest."""

    @pytest.fixture
    def place(self, overwriting_server: CrookedS3) -> S3Place:
        return S3Place(f"s3://{BUCKET}/{secrets.token_hex(6)}", overwriting_server.options)

    def test_capabilities(self, backend: StorageBackend) -> None:
        assert backend.probe() == Capabilities(
            conditional_put=False, checksums=False, versioning=False, object_lock=False, resumable_put=True
        )
