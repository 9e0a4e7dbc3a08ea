"""Disks that are full, and signals: our own side's trouble is said as such, and nothing is left of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

import pytest

from tests.e2e.commands import (
    REPOSITORY,
    Done,
    Host,
    Running,
    files_below,
    frozen,
    leftovers,
    quoted,
)
from tests.e2e.trees import listing

FILES = 400


@pytest.fixture
def agent(host: Host) -> Path:
    root = host.home / "ana"
    root.mkdir()
    (root / "big").write_bytes(os.urandom(2_000_000))
    for number in range(FILES - 1):
        (root / f"{number}.md").write_text("a note\n")
    host.configure({"ana": f"root = {quoted(root)}"})
    return root


@cache
def can_mount() -> bool:
    """Whether this user may have a mount of its own in a namespace of its own."""
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0


_RUN_AND_LIST = 'disk=$2; shift 2; "$@"; code=$?; find "$disk" -mindepth 1; exit $code'


def run_on_a_small_disk(
    disk: Path, options: str, arguments: Sequence[object], *, host: Host, limit_bytes: int
) -> tuple[Done, list[str]]:
    """Run agentkeep where `disk` is a file system of its own, small; what there was on it at the end.

    Where no such thing may be mounted, with a limit on the size of a file, which ends writing just so.
    """
    disk.mkdir()
    command = [sys.executable, "-m", "daemon.cli", *map(str, arguments)]
    if can_mount():
        script = f'mount -t tmpfs -o "$1" small "$2"; {_RUN_AND_LIST}'
        command = ["unshare", "-rm", "sh", "-c", script, "sh", options, str(disk), *command]
    else:
        script = f'ulimit -f "$1"; {_RUN_AND_LIST}'
        command = ["sh", "-c", script, "sh", str(limit_bytes // 512), str(disk), *command]
    done = subprocess.run(
        command,
        cwd=host.home,
        env={**host.environment, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr), done.stdout.splitlines()


@pytest.mark.usefixtures("agent")
def test_an_export_to_a_full_disk_leaves_nothing_of_the_bundle(host: Host, tmp_path: Path) -> None:
    host.agentkeep("snapshot")
    disk = tmp_path / "disk"
    arguments = ["--config", host.config, "export", "latest", "--to", disk / "copy"]
    done, left = run_on_a_small_disk(disk, "size=1m", arguments, host=host, limit_bytes=1 << 20)
    assert done.exit_code == 73, done.stderr
    assert "fix:" in done.stderr or not can_mount()
    assert left == []


@pytest.mark.usefixtures("agent")
def test_a_restore_to_a_disk_that_is_too_small_is_refused_and_leaves_nothing(
    host: Host, tmp_path: Path
) -> None:
    host.agentkeep("snapshot")
    disk = tmp_path / "disk"
    arguments = ["--config", host.config, "restore", "latest", "--to", disk / "back"]
    done, left = run_on_a_small_disk(disk, "size=4m", arguments, host=host, limit_bytes=1 << 20)
    assert done.exit_code == 73, done.stderr
    assert left == []


@pytest.mark.usefixtures("agent")
def test_a_restore_to_a_disk_that_fills_up_leaves_nothing(host: Host, tmp_path: Path) -> None:
    """There are bytes enough when it begins; it is names that there are not."""
    host.agentkeep("snapshot")
    disk = tmp_path / "disk"
    arguments = ["--config", host.config, "restore", "latest", "--to", disk / "deep/er/back"]
    done, left = run_on_a_small_disk(
        disk, "size=100m,nr_inodes=100", arguments, host=host, limit_bytes=1 << 20
    )
    assert done.exit_code == 73, done.stderr
    assert left == []


def test_a_snapshot_without_room_for_it_is_none(host: Host, agent: Path, tmp_path: Path) -> None:
    """And does not call the agent's sound files unreadable."""
    before = listing(agent)
    disk = tmp_path / "disk"
    host.state = disk
    host.configure({"ana": f"root = {quoted(agent)}"})
    arguments = ["--config", host.config, "--json", "snapshot"]
    done, left = run_on_a_small_disk(disk, "size=3m", arguments, host=host, limit_bytes=1 << 20)
    assert done.exit_code == 73, done.stderr
    assert [name for name in left if name.startswith(f"{disk}/tenants/") and "tar.zst" in name] == []
    assert [name for name in left if ".agentkeep-" in name] == []
    assert host.bundles_at(host.offsite) == []
    assert listing(agent) == before


@pytest.mark.usefixtures("agent")
def test_a_destination_that_is_full_keeps_the_bundle_waiting(host: Host, tmp_path: Path) -> None:
    host.agentkeep("snapshot", "--no-upload")
    host.offsite.rmdir()
    arguments = ["--config", host.config, "upload"]
    done, left = run_on_a_small_disk(host.offsite, "size=1m", arguments, host=host, limit_bytes=1 << 20)
    assert done.exit_code == 69, done.stderr
    assert [name for name in left if name.endswith(".tar.zst")] == []
    assert [name for name in left if "/.incoming/" in name] == []
    (record,) = host.snapshots()
    assert record["uploads"] == {"offsite": "pending"}
    shutil.rmtree(host.offsite)
    host.offsite.mkdir()
    host.agentkeep("upload")
    assert host.snapshots()[0]["uploads"] == {"offsite": "confirmed"}


@pytest.mark.usefixtures("agent")
def test_a_mount_point_is_refused_as_a_target(host: Host, tmp_path: Path) -> None:
    host.agentkeep("snapshot")
    disk = tmp_path / "disk" if can_mount() else Path("/proc")
    arguments = ["--config", host.config, "restore", "latest", "--to", disk]
    if can_mount():
        done, left = run_on_a_small_disk(disk, "size=100m", arguments, host=host, limit_bytes=0)
        assert left == []
    else:
        done = host.agentkeep("restore", "latest", "--to", disk, expecting=None)
    assert done.exit_code == 77
    assert "mount point" in done.stderr
    assert "fix:" in done.stderr


@pytest.mark.usefixtures("agent")
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("command", ["snapshot", "restore"])
def test_a_command_that_is_told_to_stop_tidies_up_at_once(
    host: Host, number: signal.Signals, exit_code: int, command: str
) -> None:
    host.agentkeep("snapshot")
    out = host.home / "out"
    work = {
        "snapshot": host.state / "scratch/.agentkeep-default.ana/staged",
        "restore": out / ".agentkeep-restore-back/parts/files",
    }[command]

    def start() -> AbstractContextManager[Running]:
        shutil.rmtree(out, ignore_errors=True)
        if command == "snapshot":
            return host.started("snapshot", "--force")
        return host.started("restore", "latest", "--to", out / "back")

    with frozen(start, lambda: 0 < len(list(files_below(work))) < FILES, "the middle of it") as running:
        before = host.snapshots()
        running.send(number)
        running.send(signal.SIGCONT)
        done = running.wait()
    assert done.exit_code == exit_code, done.stderr
    assert "Traceback" not in done.stderr
    assert leftovers(host.state, out) == []
    assert not (out / "back").exists()
    assert host.snapshots() == before
