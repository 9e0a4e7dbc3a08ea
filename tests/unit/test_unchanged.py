"""Nothing to do costs nothing: a snapshot of an agent that did not change is noted and not written again."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from daemon.bundle.encryption import new_identity
from daemon.model import AgentSpec, SnapshotRecord, StateSource, UploadState
from daemon.snapshots import Sealing, Store, take_snapshot
from tests.harness.sample_agent.builder import run_git

LONG_AGO_NS = 1_700_000_000_123_456_789


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An agent with every kind of source, all of it old."""
    root = tmp_path / "ana"
    (root / "notes").mkdir(parents=True)
    (root / "notes/a.md").write_text("a note\n")
    (root / "log.jsonl").write_text('{"line": 1}\n')
    (root / "cursor.json").write_text("1\n")
    (root / "link").symlink_to("notes/a.md")
    for name, mode in (("wal", "wal"), ("rollback", "delete")):
        with closing(sqlite3.connect(root / f"{name}.sqlite")) as connection:
            connection.execute(f"PRAGMA journal_mode = {mode}")
            connection.execute("CREATE TABLE t (x)")
            connection.commit()
    (root / "memory").mkdir()
    run_git(root / "memory", "init", "--quiet", "--initial-branch=main")
    (root / "memory/fact.md").write_text("a fact\n")
    run_git(root / "memory", "add", "fact.md")
    run_git(root / "memory", "commit", "--quiet", "--message=first")
    return root


def spec_of(root: Path, **fields: Any) -> AgentSpec:
    states = (StateSource("cursor", file=root / "cursor.json"),)
    given: dict[str, Any] = {"include": ("**",), "memdir": root / "memory", "states": states, **fields}
    return AgentSpec("default", "ana", root, **given)


def snapshot(store: Store, root: Path, **options: Any) -> SnapshotRecord:
    spec = options.pop("spec", None) or spec_of(root)
    return take_snapshot(store, spec, **{"sealing": Sealing(), "unless_unchanged": True, **options})


def settled(store: Store, root: Path, **options: Any) -> SnapshotRecord:
    """The snapshot that later ones are compared with: what was written within the last tick of the file
    system's clock proves nothing, so it may be the second or third."""
    for _ in range(20):
        record = snapshot(store, root, **options)
        if record.unchanged_at_ms is not None:
            return record
    raise AssertionError("the agent never was as before")


def test_an_agent_that_did_not_change_is_noted_and_nothing_is_written(store: Store, root: Path) -> None:
    record = settled(store, root)
    bundles = sorted(store.state_dir.rglob("*.tar.zst"))
    again = snapshot(store, root)
    assert again.snapshot_id == record.snapshot_id
    assert again.unchanged_at_ms is not None
    assert again.current_at > again.created_at
    assert sorted(store.state_dir.rglob("*.tar.zst")) == bundles
    assert store.catalog.last_attempt_ms("default", "ana") == again.unchanged_at_ms
    assert store.catalog.latest("default", "ana") == again


def commit(path: Path) -> None:
    subprocess.run(["sqlite3", path, "INSERT INTO t VALUES (1)"], check=True)


def same_length_same_mtime(path: Path) -> None:
    status = path.stat()
    path.write_bytes(path.read_bytes().swapcase())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "commit to WAL": lambda root: commit(root / "wal.sqlite"),
    "commit without WAL": lambda root: commit(root / "rollback.sqlite"),
    "file": lambda root: (root / "notes/a.md").write_text("A NOTE\n"),
    "file whose mtime is put back": lambda root: same_length_same_mtime(root / "notes/a.md"),
    "file replaced": lambda root: (root / "notes/a.md").rename(root / "notes/b.md"),
    "new file": lambda root: (root / "notes/new.md").write_text("new\n"),
    "file gone": lambda root: (root / "notes/a.md").unlink(),
    "longer log": lambda root: (root / "log.jsonl").write_text('{"line": 1}\n{"line": 2}\n'),
    "mode": lambda root: (root / "notes/a.md").chmod(0o640),
    "new directory": lambda root: (root / "empty").mkdir(),
    "mode of a directory": lambda root: (root / "notes").chmod(0o700),
    "state file": lambda root: (root / "cursor.json").write_text("2\n"),
    "link": lambda root: ((root / "link").unlink(), (root / "link").symlink_to("log.jsonl")),
    "commit to git": lambda root: run_git(root / "memory", "commit", "-q", "--allow-empty", "-m", "next"),
    "branch": lambda root: run_git(root / "memory", "branch", "side"),
    "other head": lambda root: run_git(root / "memory", "symbolic-ref", "HEAD", "refs/heads/x"),
    "new database": lambda root: sqlite3.connect(root / "new.sqlite").execute("CREATE TABLE t (x)"),
    "work tree": lambda root: (root / "memory/fact.md").write_text("another fact\n"),
    "only staged": lambda root: stage_and_put_back(root / "memory"),
}


def stage_and_put_back(memdir: Path) -> None:
    """A version that is in git's index alone."""
    before = (memdir / "fact.md").read_text()
    (memdir / "fact.md").write_text("staged\n")
    run_git(memdir, "add", "fact.md")
    (memdir / "fact.md").write_text(before)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_whatever_changes_makes_a_new_snapshot(
    store: Store, root: Path, change: Callable[[Path], object]
) -> None:
    record = settled(store, root)
    change(root)
    assert snapshot(store, root).snapshot_id != record.snapshot_id


def test_only_looking_at_an_agent_changes_nothing(store: Store, root: Path) -> None:
    record = settled(store, root)
    (root / "notes/a.md").read_text()
    with closing(sqlite3.connect(root / "wal.sqlite")) as connection:
        connection.execute("SELECT * FROM t").fetchall()
        assert snapshot(store, root).snapshot_id == record.snapshot_id
    run_git(root / "memory", "log")
    assert snapshot(store, root).snapshot_id == record.snapshot_id


def test_a_log_that_a_database_has_in_its_wal_alone_is_seen(store: Store, root: Path) -> None:
    with closing(sqlite3.connect(root / "wal.sqlite", isolation_level=None)) as connection:
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute("INSERT INTO t VALUES (1)")
        record = settled(store, root)
        connection.execute("INSERT INTO t VALUES (2)")
        assert snapshot(store, root).snapshot_id != record.snapshot_id


def test_other_recipients_or_another_description_make_a_new_snapshot(store: Store, root: Path) -> None:
    record = settled(store, root)
    _, recipient = new_identity()
    encrypted = snapshot(store, root, sealing=Sealing(recipients=(recipient,)))
    assert encrypted.snapshot_id != record.snapshot_id
    assert encrypted.key.encrypted
    record = settled(store, root)
    wider = replace(spec_of(root), exclude=("notes/**",))
    assert snapshot(store, root, spec=wider).snapshot_id != record.snapshot_id


def test_a_bundle_that_is_not_where_it_should_be_is_not_relied_upon(store: Store, root: Path) -> None:
    record = settled(store, root)
    elsewhere = snapshot(store, root, destinations=("offsite",))
    assert elsewhere.snapshot_id != record.snapshot_id  # that one would never get to offsite
    record = settled(store, root, destinations=("offsite",))
    store.path_of(record.key).unlink()
    assert snapshot(store, root, destinations=("offsite",)).snapshot_id != record.snapshot_id
    record = settled(store, root, destinations=("offsite",))
    store.catalog.note_upload(record.snapshot_id, "offsite", UploadState.CONFIRMED)
    store.path_of(record.key).unlink()  # as the operator's manual says to free space
    assert snapshot(store, root, destinations=("offsite",)).snapshot_id == record.snapshot_id


def test_an_incomplete_snapshot_is_never_still_current(store: Store, root: Path) -> None:
    (root / "broken.sqlite").write_bytes(b"no database at all")
    taken = {snapshot(store, root).snapshot_id for _ in range(4)}
    assert len(taken) == 4


def test_an_agent_that_comes_back_to_an_older_state_of_its_own_is_taken_again(
    store: Store, root: Path
) -> None:
    settled(store, root)
    (root / "notes/new.md").write_text("new\n")
    second = settled(store, root)
    (root / "notes/new.md").unlink()
    assert snapshot(store, root).snapshot_id != second.snapshot_id


def test_a_value_that_a_command_prints_is_asked_for(store: Store, root: Path, tmp_path: Path) -> None:
    value = tmp_path / "value.json"
    value.write_text("1\n")
    spec = spec_of(root, states=(StateSource("value", command=("cat", str(value))),))
    record = settled(store, root, spec=spec)
    value.write_text("2\n")
    assert snapshot(store, root, spec=spec).snapshot_id != record.snapshot_id


def test_an_agent_that_is_gone_is_an_error_and_not_unchanged(store: Store, root: Path) -> None:
    from daemon.errors import AgentNotFound

    settled(store, root)
    root.rename(root.with_name("away"))
    with pytest.raises(AgentNotFound):
        snapshot(store, root)


def test_no_database_is_opened_to_see_that_nothing_changed(store: Store, root: Path) -> None:
    settled(store, root)
    for path in root.glob("wal.sqlite-*"):
        path.unlink()  # what our own connections left, empty
    snapshot(store, root)
    assert list(root.glob("*.sqlite-*")) == []


def test_what_before_brings_to_disk_is_seen(store: Store, root: Path, tmp_path: Path) -> None:
    """An agent that writes what it knows only when it is told to hold still."""
    (tmp_path / "known").write_text("1\n")
    flush = ("cmp", "-s", str(tmp_path / "known"), "notes/known.md")
    script = f"{' '.join(flush)} || cp {tmp_path / 'known'} notes/known.md"
    spec = spec_of(root, before=("sh", "-c", script))
    record = settled(store, root, spec=spec)
    (tmp_path / "known").write_text("2\n")
    assert snapshot(store, root, spec=spec).snapshot_id != record.snapshot_id


def test_an_agent_that_may_still_hold_still_is_told_of_though_nothing_changed(
    store: Store, root: Path, tmp_path: Path
) -> None:
    thaw = tmp_path / "thaw"
    thaw.touch()
    spec = spec_of(root, after=("test", "-e", str(thaw)))
    record = settled(store, root, spec=spec)
    thaw.unlink()
    alarm = snapshot(store, root, spec=spec)
    assert alarm.snapshot_id != record.snapshot_id
    assert not alarm.complete
    assert [failure.source for failure in alarm.failures] == ["command 'after'"]
