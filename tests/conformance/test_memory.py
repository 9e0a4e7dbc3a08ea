"""The `memory` backend keeps the contract, and so does the retrying layer around it."""

from __future__ import annotations

import secrets

import pytest

from storage_backends import StorageBackend, open_backend
from storage_backends.conformance import BackendConformance
from storage_backends.layers import Retrying


class TestMemory(BackendConformance):
    @pytest.fixture
    def backend(self) -> StorageBackend:
        return open_backend(f"memory://{secrets.token_hex(8)}", {})


class TestRetrying(BackendConformance):
    @pytest.fixture
    def backend(self) -> StorageBackend:
        return Retrying(open_backend(f"memory://{secrets.token_hex(8)}", {}))
