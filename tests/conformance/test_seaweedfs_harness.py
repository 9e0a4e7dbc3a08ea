"""The SeaweedFS of the tests keeps to itself: loopback only, chosen ports only, gone when its owner is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.harness.seaweedfs import SeaweedFS, running_seaweedfs

_OWNER = """
import sys, time
from pathlib import Path
from tests.harness.seaweedfs import running_seaweedfs
with running_seaweedfs(Path(sys.argv[1])) as server:
    print(server.pid, flush=True)
    time.sleep(600)
"""
LOOPBACK = "0100007F"
LISTENING = "0A"


def listening(pid: int) -> list[str]:
    """Local addresses (hex, as /proc shows them) of a process's listening TCP sockets."""
    own = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}  # noqa: PTH115 - not a path
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
    ]
    return [row[1] for row in rows if row[3] == LISTENING and f"socket:[{row[9]}]" in own]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_it_listens_on_loopback_and_nowhere_else(seaweedfs: SeaweedFS) -> None:
    addresses = listening(seaweedfs.pid)
    assert len(addresses) == 8
    assert {address.partition(":")[0] for address in addresses} == {LOOPBACK}


def test_it_stops_and_leaves_no_socket(tmp_path: Path) -> None:
    with running_seaweedfs(tmp_path / "server", bucket="another") as server:
        with closing(server.client()) as client:
            client.put_object(Bucket="another", Key="a", Body=b"1")
        ports = {int(address.partition(":")[2], 16) for address in listening(server.pid)}
        assert [port for port in ports if socket_files(port)]
    assert not is_running(server.pid)
    assert not [path for port in ports for path in socket_files(port)]


def socket_files(port: int) -> list[Path]:
    return list(Path("/tmp").glob(f"seaweedfs-*-{port}.sock"))


def test_it_dies_with_its_owner(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    command = [sys.executable, "-c", _OWNER, str(tmp_path / "server")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=pytestconfig.rootpath) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert is_running(pid)
        ports = {int(address.partition(":")[2], 16) for address in listening(pid)}
        owner.kill()
    deadline = time.monotonic() + 60
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)
    for port in ports:
        for path in socket_files(port):
            path.unlink()
