"""kill -9 at any moment of any command: what is visible is whole, what was confirmed is there, and the next
command goes on as if nothing had happened.

The moments are steps of a command that touch the file system, chosen by a seed (fork_server.py), and
moments of the clock, for what happens between them.
"""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from daemon.locate import LocalBundle
from daemon.verify import verify
from tests.e2e.commands import ForkServer, Host, leftovers, quoted
from tests.e2e.trees import listing
from tests.harness.sample_agent.builder import run_git

BY_STEP = range(11)
BY_CLOCK = range(11, 15)
SEEDS = [*BY_STEP, *BY_CLOCK]


@dataclass(frozen=True)
class Extent:
    """How long a command is, when nobody kills it."""

    steps: int
    seconds: float


@pytest.fixture(scope="session")
def agent_built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("built") / "ana"
    (root / "memory").mkdir(parents=True)
    run_git(root / "memory", "init", "--quiet", "--initial-branch=main")
    (root / "memory/note.md").write_text("a note\n")
    run_git(root / "memory", "add", ".")
    run_git(root / "memory", "commit", "--quiet", "--message=first")
    (root / "memory/draft.md").write_text("a draft\n")
    (root / "session.jsonl").write_text('{"a": 1}\n')
    for name in ("one", "two"):
        with closing(sqlite3.connect(root / f"{name}.sqlite")) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("CREATE TABLE t (x)")
            connection.executemany("INSERT INTO t VALUES (?)", [("word " * 40,)] * 200)
            connection.commit()
    return root


def make_host(home: Path, server: ForkServer, template: Path) -> Host:
    """A host with one snapshot that is confirmed, and one that waits."""
    subprocess.run(["cp", "-a", template, home], check=True)
    host = Host(home, server)
    host.configure({"ana": f'root = {quoted(home / "ana")}\nmemdir = "memory"'})
    return host


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer, agent_built: Path) -> Path:
    home = tmp_path_factory.mktemp("template")
    subprocess.run(["cp", "-a", agent_built, home / "ana"], check=True)
    host = Host(home, fork_server)
    host.configure({"ana": f'root = {quoted(home / "ana")}\nmemdir = "memory"'})
    host.agentkeep("snapshot")
    host.agentkeep("snapshot", "--force", "--no-upload")
    return home


@pytest.fixture
def host(tmp_path: Path, fork_server: ForkServer, template: Path) -> Host:
    return make_host(tmp_path / "host", fork_server, template)


COMMANDS: dict[str, Callable[[Host], list[str | Path]]] = {
    "snapshot": lambda _: ["snapshot", "--force"],
    "upload": lambda _: ["upload"],
    "export": lambda host: ["export", "latest", "--to", host.home / "out/copy.tar.zst"],
    "restore": lambda host: ["restore", "latest", "--to", host.home / "out/back"],
}


@pytest.fixture(scope="session")
def extents(
    tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer, template: Path
) -> dict[str, Extent]:
    """Of each command, from running it once."""
    found = {}
    for name, command in COMMANDS.items():
        home = tmp_path_factory.mktemp("extent")
        host = make_host(home / "host", fork_server, template)
        began = time.monotonic()
        host.agentkeep(*command(host), trace=home / "trace")
        seconds = time.monotonic() - began
        found[name] = Extent(len((home / "trace").read_text().splitlines()), seconds)
    return found


def kill(host: Host, name: str, seed: int, extents: dict[str, Extent]) -> None:
    """Run a command and kill it at the moment that the seed chooses."""
    chosen = random.Random(f"{name} {seed}")
    command = COMMANDS[name](host)
    if seed in BY_STEP:
        step = chosen.randint(1, extents[name].steps)
        done = host.agentkeep(*command, kill_at_step=step, expecting=None)
    else:
        with host.started(*command) as running:
            running.has_ended_within(chosen.uniform(0, extents[name].seconds))
            done = running.kill()
    assert done.exit_code in (-signal.SIGKILL, 0), done.stderr  # 0: it was over a moment earlier this time


def assert_whole(*places: Path) -> None:
    """Every bundle that is visible, by sha256sum's judgement."""
    for place in places:
        for bundle in place.rglob("*.tar.zst"):
            if not bundle.name.startswith("."):
                check = ["sha256sum", "--check", "--strict", "--quiet", f"{bundle.name}.sha256"]
                assert subprocess.run(check, cwd=bundle.parent, check=False).returncode == 0, bundle


def assert_consistent(host: Host, *, before: list[Any]) -> None:
    """Catalog, disk and destination say the same, and nothing that there was is gone."""
    records = host.snapshots()
    ids = [record["snapshot_id"] for record in records]
    assert [record["snapshot_id"] for record in before] == ids[: len(before)]
    on_disk = host.bundles_at(host.state)
    assert sorted(host.bundle(record) for record in records) == on_disk
    arrived = {path.relative_to(host.offsite) for path in host.bundles_at(host.offsite)}
    for record in records:
        if record["uploads"] == {"offsite": "confirmed"}:
            assert Path(record["key"]) in arrived
            assert (host.offsite / record["key"]).read_bytes() == host.bundle(record).read_bytes()
        report = verify(LocalBundle(host.bundle(record)))
        assert report.is_sound
        assert report.is_fully_checked
        assert (report.sha256, report.size_bytes) == (record["sha256"], record["size_bytes"])


def confirmed(host: Host) -> set[str]:
    return {r["snapshot_id"] for r in host.snapshots() if r["uploads"] == {"offsite": "confirmed"}}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_snapshot_is_whole_or_not_there_and_the_next_tidies_up(
    host: Host, extents: dict[str, Extent], seed: int
) -> None:
    before, safe = host.snapshots(), confirmed(host)
    agent = listing(host.home / "ana", skip=("-wal", "-shm"))
    kill(host, "snapshot", seed, extents)
    assert_whole(host.state, host.offsite)
    assert safe <= confirmed(host)
    assert host.document("snapshot")["uploads"] == {"offsite": "confirmed"}
    assert leftovers(host.state, host.offsite) == []
    assert_consistent(host, before=before)
    host.agentkeep("upload")
    assert confirmed(host) == {record["snapshot_id"] for record in host.snapshots()}
    assert_consistent(host, before=before)
    assert listing(host.home / "ana", skip=("-wal", "-shm")) == agent


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_upload_is_taken_up_again(host: Host, extents: dict[str, Extent], seed: int) -> None:
    before, safe = host.snapshots(), confirmed(host)
    kill(host, "upload", seed, extents)
    assert_whole(host.state, host.offsite)
    assert safe <= confirmed(host)
    host.agentkeep("upload")
    assert confirmed(host) == {record["snapshot_id"] for record in before}
    assert_consistent(host, before=before)
    host.agentkeep("snapshot")  # whatever was left at the destination is gone with the next upload
    assert leftovers(host.state, host.offsite) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_export_is_whole_or_not_there_and_the_next_tidies_up(
    host: Host, extents: dict[str, Extent], seed: int
) -> None:
    out = host.home / "out"
    kill(host, "export", seed, extents)
    assert_whole(out)
    host.agentkeep(*COMMANDS["export"](host))
    assert_whole(out)
    assert sorted(path.name for path in out.iterdir()) == ["copy.tar.zst", "copy.tar.zst.sha256"]
    assert (out / "copy.tar.zst").read_bytes() == host.bundle(host.snapshots()[-1]).read_bytes()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_restore_is_whole_or_not_there_and_the_next_tidies_up(
    host: Host, extents: dict[str, Extent], seed: int
) -> None:
    out = host.home / "out"
    host.agentkeep("restore", "latest", "--to", host.home / "expected")
    kill(host, "restore", seed, extents)
    was_done = (out / "back").exists()
    host.agentkeep(*COMMANDS["restore"](host), expecting=77 if was_done else 0)
    assert [path.name for path in out.iterdir()] == ["back"]
    assert without_git(listing(out / "back")) == without_git(listing(host.home / "expected"))
    run_git(out / "back/memdir", "fsck", "--full", "--strict")
    assert run_git(out / "back/memdir", "status", "--porcelain") == "?? draft.md\n"


def without_git(found: dict[bytes, Any]) -> dict[bytes, Any]:
    """Git's index knows inodes and times, so no two are the same."""
    return {name: entry for name, entry in found.items() if not name.startswith(b"memdir/.git/")}


def kill_before_each(
    host: Host, name: str, event: str, trace: Path, *, afterwards: Callable[[], None], most: int = 8
) -> None:
    """Kill a command right before each of its steps of one kind, or before `most` of many."""
    twin = make_host(trace.with_name("twin"), host.server, host.home)
    twin.agentkeep(*COMMANDS[name](twin), trace=trace)
    steps = trace.read_text().splitlines()
    of_this_kind = [number for number, step in enumerate(steps, start=1) if step.startswith(f"{event} ")]
    assert of_this_kind
    for number in of_this_kind[:: -(-len(of_this_kind) // most)]:
        host.agentkeep(*COMMANDS[name](host), kill_at_step=number, expecting=None)
        afterwards()


@pytest.mark.parametrize(
    "event", ["os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "sqlite3.connect"]
)
def test_a_snapshot_killed_before_any_step_that_shows_never_leaves_a_torn_bundle(
    host: Host, tmp_path: Path, event: str
) -> None:
    before = host.snapshots()
    whole = lambda: assert_whole(host.state, host.offsite)  # noqa: E731
    kill_before_each(host, "snapshot", event, tmp_path / "trace", afterwards=whole)
    host.agentkeep("snapshot")
    assert leftovers(host.state, host.offsite) == []
    host.agentkeep("upload")
    assert_consistent(host, before=before)
    assert confirmed(host) == {record["snapshot_id"] for record in host.snapshots()}


@pytest.mark.parametrize("event", ["os.rename", "os.link", "os.mkdir", "os.remove"])
def test_an_export_killed_before_any_step_that_shows_is_taken_up_and_touches_nothing_else(
    host: Host, tmp_path: Path, event: str
) -> None:
    """Also not a copy that was moved away meanwhile, which may still have another name here."""
    out, safe = host.home / "out", host.home / "safe"
    safe.mkdir()
    first, latest = (host.bundle(record) for record in host.snapshots())

    def move_away_and_go_on() -> None:
        assert_whole(out)
        if (out / "copy.tar.zst").exists():
            (out / "copy.tar.zst").rename(safe / f"{len(list(safe.iterdir()))}")
        host.agentkeep("export", first, "--to", out / "copy.tar.zst")
        assert sorted(path.name for path in out.iterdir()) == ["copy.tar.zst", "copy.tar.zst.sha256"]
        assert_whole(out)
        assert (out / "copy.tar.zst").read_bytes() == first.read_bytes()
        assert {path.read_bytes() for path in safe.iterdir()} <= {latest.read_bytes()}
        for path in out.iterdir():
            path.unlink()

    kill_before_each(host, "export", event, tmp_path / "trace", afterwards=move_away_and_go_on)


@pytest.mark.parametrize("event", ["os.rename", "os.mkdir", "os.rmdir"])
def test_a_restore_killed_before_any_step_that_shows_is_whole_or_not_there(
    host: Host, tmp_path: Path, event: str
) -> None:
    out = host.home / "out"
    host.agentkeep("restore", "latest", "--to", host.home / "expected")
    expected = without_git(listing(host.home / "expected"))

    def go_on_and_remove() -> None:
        was_done = (out / "back").exists()
        host.agentkeep(*COMMANDS["restore"](host), expecting=77 if was_done else 0)
        assert [path.name for path in out.iterdir()] == ["back"]
        assert without_git(listing(out / "back")) == expected
        subprocess.run(["rm", "-r", out / "back"], check=True)

    kill_before_each(host, "restore", event, tmp_path / "trace", afterwards=go_on_and_remove)
