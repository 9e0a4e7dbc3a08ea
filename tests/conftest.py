"""What tests of several directories share: processes to run commands in, a host, a sample agent."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.commands import ForkServer, Host, running_fork_server
from tests.harness.sample_agent import build
from tests.harness.seaweedfs import SeaweedFS, running_seaweedfs


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    with running_fork_server() as server:
        yield server


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    with running_seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="session")
def built_agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sample agent that nobody writes to; for copying."""
    root = tmp_path_factory.mktemp("built") / "ana"
    build(root, seed=11, size_mb=0.3)
    return root


@pytest.fixture
def host(fork_server: ForkServer, tmp_path: Path) -> Host:
    home = tmp_path / "host"
    home.mkdir()
    return Host(home, fork_server)


@pytest.fixture
def sample(built_agent: Path, host: Host) -> Path:
    """The sample agent `ana` at home on `host`."""
    root = host.home / "ana"
    subprocess.run(["cp", "-a", built_agent, root], check=True)
    return root
