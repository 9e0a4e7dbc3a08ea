"""Agents that do not hold still: what changes under a snapshot is retried or owned up to, and never torn."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import Host, busy, files_below, frozen, quoted

FILES = 400  # so that staging takes long enough to be met in the middle


@pytest.fixture
def root(host: Host) -> Path:
    root = host.home / "ana"
    (root / "notes").mkdir(parents=True)
    for number in range(FILES):
        (root / f"notes/{number}.md").write_text(f"note {number}\n")
    make_database(root / "memory.sqlite", "first")
    host.configure({"ana": f"root = {quoted(root)}"})
    return root


def make_database(path: Path, body: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE memories (body TEXT)")
        connection.executemany("INSERT INTO memories VALUES (?)", [(body,)] * 50)
        connection.commit()


def snapshot_with(host: Host, happening: Callable[[], None], *, expecting: int) -> Any:
    """A snapshot during which something happens: its databases are open, its files half staged."""
    scratch = host.state / "scratch/.agentkeep-default.ana"

    def is_staging() -> bool:
        staged = len(list(files_below(scratch / "staged")))
        return 0 < staged < FILES

    with frozen(
        lambda: host.started("--json", "snapshot", "--force"), is_staging, "the middle of staging"
    ) as running:
        happening()
        running.send(signal.SIGCONT)
        done = running.wait()
    assert done.exit_code == expecting, done.stdout + done.stderr
    return done.document


def restored(host: Host, record: Any, *, expecting: int = 0) -> Path:
    target = host.home / f"back-{record['snapshot_id']}"
    host.agentkeep("restore", record["snapshot_id"], "--to", target, expecting=expecting)
    return target


def bodies(path: Path) -> set[str]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return {row[0] for row in connection.execute("SELECT body FROM memories")}


def test_a_database_that_vanishes_midway_is_named_and_the_rest_is_kept(host: Host, root: Path) -> None:
    def vanish() -> None:
        for path in root.glob("memory.sqlite*"):
            path.unlink()

    record = snapshot_with(host, vanish, expecting=3)
    (failure,) = record["failures"]
    assert failure["source"] == str(root / "memory.sqlite")
    assert "vanished" in failure["reason"]
    assert failure["hint"]
    assert record["uploads"] == {"offsite": "confirmed"}
    back = restored(host, record, expecting=3)
    assert len(list((back / "files/notes").iterdir())) == FILES


def test_a_database_that_is_replaced_midway_is_captured_whole(host: Host, root: Path) -> None:
    make_database(host.home / "new.sqlite", "second")

    def replace() -> None:
        for path in root.glob("memory.sqlite-*"):
            path.unlink()
        (host.home / "new.sqlite").rename(root / "memory.sqlite")

    record = snapshot_with(host, replace, expecting=0)
    assert bodies(restored(host, record) / "sqlite/memory.sqlite") == {"second"}


def test_a_database_that_appears_midway_is_captured(host: Host, root: Path) -> None:
    record = snapshot_with(host, lambda: make_database(root / "new.sqlite", "new"), expecting=0)
    back = restored(host, record)
    assert bodies(back / "sqlite/new.sqlite") == {"new"}
    assert bodies(back / "sqlite/memory.sqlite") == {"first"}


def test_commits_midway_are_all_in_or_all_out(host: Host, root: Path) -> None:
    other = root / "other.sqlite"
    make_database(other, "first")

    def commit() -> None:
        for path in (root / "memory.sqlite", other):
            with closing(sqlite3.connect(path)) as connection, connection:
                connection.execute("UPDATE memories SET body = 'second'")

    record = snapshot_with(host, commit, expecting=0)
    assert record["consistency"]["level"] == "point_in_time"
    back = restored(host, record)
    assert bodies(back / "sqlite/memory.sqlite") == bodies(back / "sqlite/other.sqlite") == {"second"}


def test_files_that_come_change_and_go_midway_are_as_they_are_at_the_cut(host: Host, root: Path) -> None:
    def happen() -> None:
        for number in range(0, FILES, 3):
            (root / f"notes/{number}.md").unlink()
        for number in range(1, FILES, 3):
            (root / f"notes/{number}.md").write_text(f"NOTE {number}\n")  # of the same length
        (root / "notes/new.md").write_text("new\n")

    record = snapshot_with(host, happen, expecting=0)
    assert record["consistency"]["level"] == "point_in_time"
    back = restored(host, record)
    captured = {path.name: path.read_text() for path in (back / "files/notes").iterdir()}
    assert captured == {path.name: path.read_text() for path in (root / "notes").iterdir()}


def test_a_file_that_a_scan_saw_is_not_followed_when_it_becomes_a_link_midway(host: Host, root: Path) -> None:
    secret = host.home / "secret.md"
    secret.write_text("not the agent's\n")

    def become_links() -> None:
        for path in sorted((root / "notes").iterdir()):
            path.unlink()
            path.symlink_to(secret)

    record = snapshot_with(host, become_links, expecting=0)
    manifest = host.manifest(record["snapshot_id"])
    assert len(manifest["symlinks"]) == FILES
    subtree = restored(host, record, expecting=3)  # told of, since each link leads out
    found = [path for path in subtree.rglob("*") if path.is_file() and path.suffix == ".md"]
    assert found == []


@pytest.fixture
def small_root(host: Host) -> Path:
    """So that a snapshot of it is quick, however often it has to begin again."""
    root = host.home / "ana"
    root.mkdir()
    make_database(root / "memory.sqlite", "first")
    host.configure({"ana": f"root = {quoted(root)}"})
    return root


def test_files_that_are_replaced_all_the_time_are_never_torn_and_never_out_of_order(
    host: Host, small_root: Path
) -> None:
    """`b` follows `a`: at every instant b is at a's generation or at the one before."""

    def replace_both(generation: int) -> None:
        for name in ("a", "b"):
            beside = small_root / f".{name}.tmp"
            beside.write_bytes(f"{generation:08}".encode() * 20_000)
            beside.rename(small_root / name)

    replace_both(0)
    levels = set()
    with busy(replace_both):
        for _ in range(4):
            record = host.document("snapshot")
            levels.add(record["consistency"]["level"])
            back = restored(host, record) / "files"
            a, b = (content_of_one_generation(back / name) for name in ("a", "b"))
            if record["consistency"]["level"] == "point_in_time":
                assert b <= a <= b + 1
            else:
                assert set(record["consistency"]["moved"]) & {"a", "b"}
    assert levels <= {"point_in_time", "per_source"}


def content_of_one_generation(path: Path) -> int:
    content = path.read_bytes()
    assert content == content[:8] * 20_000
    return int(content[:8])


def test_a_file_that_is_rewritten_in_place_all_the_time_is_as_it_was_at_an_instant_or_owned_up_to(
    host: Host, small_root: Path
) -> None:
    """At every instant it begins with one generation and ends with that or the one before; a copy that was
    made while it was rewritten begins with the older one."""
    path = small_root / "big.bin"

    def rewrite(generation: int) -> None:
        with path.open("r+b", buffering=0) as stream:
            for _ in range(200):
                stream.write(f"{generation:08}".encode() * 100)

    path.write_bytes(b"00000000" * 20_000)
    with busy(rewrite):
        records = [host.document("snapshot") for _ in range(3)]
    for record in records:
        if record["consistency"]["level"] == "point_in_time":
            content = (restored(host, record) / "files/big.bin").read_bytes()
            generations = [int(content[start : start + 8]) for start in range(0, len(content), 8)]
            assert generations == sorted(generations, reverse=True)
            assert generations[0] - generations[-1] in (0, 1)
        else:
            assert "big.bin" in record["consistency"]["moved"]


def test_a_log_that_is_appended_to_all_the_time_is_a_whole_beginning_of_itself(
    host: Host, small_root: Path
) -> None:
    path = small_root / "session.jsonl"
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def append(generation: int) -> None:
        line = f'{{"round": {generation}, "text": "{"word " * 200}"}}\n'.encode()
        os.write(log, line[:500])
        os.write(log, line[500:])

    append(0)
    try:
        with busy(append):
            records = [host.document("snapshot") for _ in range(3)]
    finally:
        os.close(log)
    whole = path.read_bytes()
    for record in records:
        captured = (restored(host, record) / "files/session.jsonl").read_bytes()
        assert captured
        assert captured.endswith(b"\n")
        assert whole.startswith(captured)
        moved = record["consistency"]["moved"]
        assert moved == ([] if record["consistency"]["level"] == "point_in_time" else ["session.jsonl"])
