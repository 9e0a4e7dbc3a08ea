"""What the unit tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.property.honest import KeyPair, new_key_pair
from tests.property.sandbox import Sandbox


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


@pytest.fixture(scope="session")
def keys() -> KeyPair:
    return new_key_pair()
