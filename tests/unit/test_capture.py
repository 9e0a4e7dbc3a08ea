"""Capture of one agent, every kind of source and file; what is captured is compared byte by byte."""

from __future__ import annotations

import base64
import dataclasses
import errno
import json
import os
import resource
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from daemon.capture import Capture, CutOptions, take_cut
from daemon.capture.copies import CopyOptions, DatabaseCopies
from daemon.capture.cut import _attempt as attempt_to_hold
from daemon.capture.sources import OpenSources
from daemon.capture.sqlite import PinExpired, open_database
from daemon.errors import AgentNotFound, ExitCode, NotOneInstant, RefusedError
from daemon.model import AgentSpec, ArtifactKind, StateSource, from_member_name
from tests.e2e.commands import wait_until
from tests.e2e.trees import access_times, listing
from tests.harness.sample_agent.builder import run_git

SIDECARS = ("-wal", "-shm")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "ana"
    root.mkdir()
    return root


def spec_of(root: Path, **fields: Any) -> AgentSpec:
    return AgentSpec("default", "ana", root, **{"include": ("**",), **fields})


def captured(root: Path, **fields: Any) -> Capture:
    """A capture that must be complete."""
    capture = captured_anyhow(root, **fields)
    assert capture.failures == []
    return capture


def captured_anyhow(root: Path, **fields: Any) -> Capture:
    scratch = root.with_name(f"scratch-{len(list(root.parent.iterdir()))}")
    scratch.mkdir()
    return take_cut(spec_of(root, **fields), scratch)


def contents(capture: Capture) -> dict[str, bytes]:
    found = {}
    for artifact in capture.artifacts:
        with artifact.open() as stream:
            found[artifact.path_in_bundle] = stream.read(artifact.size_bytes)
            assert len(found[artifact.path_in_bundle]) == artifact.size_bytes
    return found


def run_sql(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


def dump_of(path: Path) -> str:
    """Everything a database holds, by the sqlite3 tool."""
    said = subprocess.run(["sqlite3", path, ".dump"], capture_output=True, text=True, check=True)
    return said.stdout


def dump_of_copy(capture: Capture, name: str, tmp_path: Path) -> str:
    copy = tmp_path / "copy.sqlite"
    copy.unlink(missing_ok=True)
    copy.write_bytes(contents(capture)[name])
    with closing(sqlite3.connect(f"file:{copy}?mode=ro&immutable=1", uri=True)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    return dump_of(copy)


# --- never hurt the agent ---------------------------------------------------------------------------------


def test_the_agents_own_files_are_as_before_to_the_byte_and_the_nanosecond(root: Path) -> None:
    (root / "notes/deep").mkdir(parents=True)
    (root / "notes/deep/a.md").write_bytes(b"a note\n")
    (root / "notes/run.sh").write_bytes(b"#!/bin/sh\n")
    (root / "notes/run.sh").chmod(0o750)
    (root / "notes/link").symlink_to("deep/a.md")
    (root / "session.jsonl").write_bytes(b'{"a": 1}\n{"b"')
    run_sql(root / "rollback.sqlite", "CREATE TABLE t (x)", "INSERT INTO t VALUES (1)")
    run_sql(
        root / "wal.sqlite", "PRAGMA journal_mode = WAL", "CREATE TABLE t (x)", "INSERT INTO t VALUES (1)"
    )
    for path in root.rglob("*"):
        if not path.is_symlink():
            os.utime(path, ns=(1_700_000_000_123_456_789, 1_750_000_000_987_654_321))
    before = listing(root, skip=SIDECARS)
    captured(root)
    assert listing(root, skip=SIDECARS) == before
    assert {path.name for path in root.rglob("*-journal")} == set()


def test_plain_files_keep_their_access_time(root: Path) -> None:
    for name in ("a.md", "b.jsonl", "c.bin", "cursor.json"):
        (root / name).write_bytes(b'{"a": 1}\n')
        os.utime(root / name, ns=(1_000_000_000, 1_700_000_000_000_000_000))
    before = access_times(root)
    captured(root, states=(StateSource("cursor", file=root / "cursor.json"),))
    assert access_times(root) == before


def test_a_wal_that_a_writer_holds_is_read_and_not_changed(root: Path) -> None:
    path = root / "memory.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("PRAGMA wal_autocheckpoint = 0")
        writer.execute("CREATE TABLE t (x)")
        writer.execute("INSERT INTO t VALUES ('in the WAL alone')")
        # By another process: closing a descriptor of the database in this one would drop its locks.
        before = digests(path, Path(f"{path}-wal"))
        capture = captured(root)
        assert digests(path, Path(f"{path}-wal")) == before
        writer.execute("INSERT INTO t VALUES ('and it writes on')")
    assert b"in the WAL alone" in contents(capture)["sqlite/memory.sqlite"]


def digests(*paths: Path) -> str:
    return subprocess.run(["sha256sum", *paths], capture_output=True, text=True, check=True).stdout


def test_an_open_transaction_is_left_out_and_may_commit_afterwards(root: Path) -> None:
    path = root / "memory.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("CREATE TABLE t (x)")
        writer.execute("INSERT INTO t VALUES ('committed')")
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("INSERT INTO t VALUES ('not yet')")
        capture = captured(root)
        assert capture.consistency.level == "point_in_time"
        writer.execute("COMMIT")
    copy = contents(capture)["sqlite/memory.sqlite"]
    assert b"committed" in copy
    assert b"not yet" not in copy


def test_an_agent_that_is_not_there_is_an_error(root: Path) -> None:
    root.rmdir()
    with pytest.raises(AgentNotFound, match="ana"):
        captured(root)


# --- plain files ------------------------------------------------------------------------------------------


def test_every_file_is_captured_with_its_bytes_mode_and_time(root: Path) -> None:
    (root / "sub").mkdir()
    expected = {"files/empty": b"", "files/sub/text.md": b"text\n", "files/bin": os.urandom(3_000_000)}
    for number, (name, content) in enumerate(expected.items()):
        path = root / name.removeprefix("files/")
        path.write_bytes(content)
        path.chmod(0o640 + number)
        os.utime(path, ns=(5, -1_500_000_001 + number))
    capture = captured(root)
    assert contents(capture) == expected
    by_name = {artifact.path_in_bundle: artifact for artifact in capture.artifacts}
    for number, name in enumerate(expected):
        assert (by_name[name].mode, by_name[name].mtime_ns) == (0o640 + number, -1_500_000_001 + number)
        assert by_name[name].kind == ArtifactKind.FILE
    assert [(d.path, d.mode) for d in capture.directories] == [("files/sub", 0o755)]


@pytest.mark.parametrize(
    ("name", "written", "kept"),
    [
        ("a.jsonl", b'{"a": 1}\n{"b": 2}\n', b'{"a": 1}\n{"b": 2}\n'),
        ("a.jsonl", b'{"a": 1}\n{"b": 2', b'{"a": 1}\n'),
        ("a.ndjson", b'{"a": 1}\n{"b"', b'{"a": 1}\n'),
        ("a.jsonl", b'{"a": 1}\n{"b": 2}', b'{"a": 1}\n{"b": 2}'),  # whole, only the newline is to come
        ("a.jsonl", b'{"a": "\xc3', b""),
        ("a.jsonl", b"", b""),
        ("a.log", b"a line\nhalf a li", b"a line\nhalf a li"),  # may be complete: logs need not be JSON
        ("a.json", b'{"a": 1}\n{"b": 2', b'{"a": 1}\n{"b": 2'),
    ],
)
def test_logs_of_json_lines_end_with_a_whole_line(root: Path, name: str, written: bytes, kept: bytes) -> None:
    (root / name).write_bytes(written)
    assert contents(captured(root)) == {f"files/{name}": kept}


ODD_NAMES = [
    b"with space",
    b"new\nline",
    b"tab\tand\x01control\x7f",
    b"back\\slash",
    b"\\x41",
    b"latin1-\xe9",
    b"half-\xe2\x82",
    "emoji-\U0001f9e0".encode(),
    "combining-e\u0301".encode(),
    b"question?hash#percent%41",
    b"-leading-dash",
    b"quote'\"`$(id)",
    b"x" * 255,
    b"\xff" * 255,
    b".hidden",
    b"trailing ",
    b"manifest.json",
    b"agentkeep.json",
]


def test_odd_names_are_captured_and_can_be_told_apart(root: Path) -> None:
    for number, name in enumerate(ODD_NAMES):
        (root / os.fsdecode(name)).write_bytes(b"%d" % number)
    found = contents(captured(root))
    assert len(found) == len(ODD_NAMES)
    for number, name in enumerate(ODD_NAMES):
        member = next(key for key, content in found.items() if content == b"%d" % number)
        assert member.isprintable()
        assert os.fsencode(from_member_name(member.removeprefix("files/"))) == name


def test_a_file_of_an_odd_name_that_cannot_be_captured_is_named(root: Path) -> None:
    """Its name cannot be said as it is; it has to be said anyhow."""
    name = os.fsdecode(b"latin1-\xe9.sqlite")
    (root / name).write_bytes(b"no database")
    capture = captured_anyhow(root)
    (failure,) = capture.failures
    assert "latin1-\\xe9.sqlite" in failure.source
    assert contents(capture) == {"opaque/latin1-\\xe9.sqlite": b"no database"}


def test_sockets_fifos_and_devices_are_left_out_and_counted(root: Path) -> None:
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(root / "socket"))
    os.mknod(root / "device", stat.S_IFCHR | 0o600, os.makedev(0, 0))  # the one that anybody may make
    (root / "note.md").write_bytes(b"a note")
    capture = captured(root)
    assert contents(capture) == {"files/note.md": b"a note"}
    assert {(e.pattern, e.count) for e in capture.excluded} == {("fifo", 1), ("socket", 1), ("device", 1)}


def test_symlinks_are_recorded_and_never_followed(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.md").write_bytes(b"not the agent's")
    targets = {
        "to-file": os.fsencode(outside / "secret.md"),
        "to-directory": os.fsencode(outside),
        "dangling": b"nowhere",
        "to-itself": b"to-itself",
        "odd": b"latin1-\xe9",
    }
    for name, target in targets.items():
        (root / name).symlink_to(os.fsdecode(target))
    capture = captured(root)
    assert contents(capture) == {}
    assert {link.path: base64.b64decode(link.target_b64) for link in capture.symlinks} == {
        f"files/{name}": target for name, target in targets.items()
    }


def test_exclusions_and_secrets_are_counted_by_pattern_and_reason(root: Path) -> None:
    for name in ("keep.md", "a.tmp", "b.tmp", "sub/c.tmp", ".env", "sub/.env", "scratch/x", "scratch/deep/y"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    capture = captured(root, exclude=("*.tmp", "scratch/**"), secrets=(".env",))
    assert contents(capture) == {"files/keep.md": b"x"}
    assert {(e.reason, e.pattern, e.count) for e in capture.excluded} == {
        ("excluded by pattern", "*.tmp", 3),
        ("excluded by pattern", "scratch/**", 1),  # a directory that is not even looked into
        ("looks like a secret", ".env", 2),
    }


def test_a_sparse_file_is_captured_with_its_holes_as_zeroes(root: Path) -> None:
    with (root / "sparse").open("wb") as stream:
        stream.seek(20_000_000)
        stream.write(b"end")
    assert contents(captured(root)) == {"files/sparse": bytes(20_000_000) + b"end"}


def test_the_memdir_goes_to_a_room_of_its_own(root: Path) -> None:
    (root / "memory/deep").mkdir(parents=True)
    (root / "memory/deep/note.md").write_bytes(b"a note")
    (root / "else.md").write_bytes(b"else")
    capture = captured(root, memdir=root / "memory")
    assert contents(capture) == {"memory_files/deep/note.md": b"a note", "files/else.md": b"else"}
    assert capture.memdir == "memory"


def test_a_memdir_is_captured_whole_even_where_the_patterns_do_not_reach(root: Path) -> None:
    (root / "memory").mkdir()
    (root / "memory/note.md").write_bytes(b"a note")
    (root / "else.md").write_bytes(b"else")
    capture = captured(root, memdir=root / "memory", include=("*.sqlite",))
    assert contents(capture) == {"memory_files/note.md": b"a note"}


# --- databases --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [512, 1024, 4096, 65536])
@pytest.mark.parametrize("journal_mode", ["delete", "wal"])
def test_databases_of_every_page_size_and_journal_mode(
    root: Path, tmp_path: Path, page_size: int, journal_mode: str
) -> None:
    path = root / "memory.sqlite"
    run_sql(
        path,
        f"PRAGMA page_size = {page_size}",
        f"PRAGMA journal_mode = {journal_mode}",
        "PRAGMA user_version = 42",
        "CREATE TABLE t (id INTEGER PRIMARY KEY, x TEXT)",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300)"
        " INSERT INTO t SELECT i, hex(randomblob(100)) FROM n",
        "DELETE FROM t WHERE id % 7 = 0",
    )
    capture = captured(root)
    assert contents(capture).keys() == {"sqlite/memory.sqlite"}
    assert dump_of_copy(capture, "sqlite/memory.sqlite", tmp_path) == dump_of(path)
    assert capture.schema_versions == {"sqlite/memory.sqlite": 42}
    copy = contents(capture)["sqlite/memory.sqlite"]
    assert int.from_bytes(copy[16:18]) in (page_size, 1 if page_size == 65536 else page_size)


@pytest.mark.parametrize(
    "statements",
    [
        ["CREATE TABLE t (k TEXT PRIMARY KEY, v BLOB) WITHOUT ROWID", "INSERT INTO t VALUES ('a', x'00ff')"],
        ["CREATE VIRTUAL TABLE t USING fts5(body)", "INSERT INTO t VALUES ('the quick brown fox')"],
        ["CREATE TABLE t (a INT, b INT GENERATED ALWAYS AS (a * 2) STORED)", "INSERT INTO t (a) VALUES (21)"],
        ["CREATE TABLE t (a INT, b INT AS (a * 2) VIRTUAL)", "INSERT INTO t (a) VALUES (21)"],
        ["PRAGMA auto_vacuum = INCREMENTAL", "CREATE TABLE t (x)", "INSERT INTO t VALUES (zeroblob(99999))"],
        ["PRAGMA encoding = 'UTF-16le'", "CREATE TABLE t (x)", "INSERT INTO t VALUES ('\u00e9\U0001f9e0')"],
        [
            "CREATE TABLE t (x)",
            "CREATE VIEW w AS SELECT x FROM t",
            "CREATE TRIGGER g AFTER INSERT ON t BEGIN SELECT 1; END",
        ],
        ["CREATE TABLE t (x ANY)", "CREATE INDEX i ON t (lower(x))"],
        ["CREATE VIRTUAL TABLE t USING rtree(id, a, b)", "INSERT INTO t VALUES (1, 0.5, 1.5)"],
    ],
    ids=[
        "without-rowid",
        "fts5",
        "stored",
        "virtual",
        "auto-vacuum",
        "utf16",
        "view-and-trigger",
        "index",
        "rtree",
    ],
)
def test_databases_of_every_kind_of_table(root: Path, tmp_path: Path, statements: list[str]) -> None:
    path = root / "memory.sqlite"
    run_sql(path, *statements)
    capture = captured(root)
    assert dump_of_copy(capture, "sqlite/memory.sqlite", tmp_path) == dump_of(path)


ODD_DIRECTORIES = [
    b"a?b",
    b"a#b",
    b"a%41b",
    b"a b",
    b"a&mode=rwc",
    b"a;b",
    b"new\nline",
    "\u00e9\U0001f9e0".encode(),
    b"latin1-\xe9",
    b"back\\slash",
]


@pytest.mark.parametrize("directory", ODD_DIRECTORIES, ids=repr)
def test_databases_are_found_below_odd_directories(root: Path, tmp_path: Path, directory: bytes) -> None:
    path = root / os.fsdecode(directory) / "memory.db"
    path.parent.mkdir()
    run_sql(root / "memory.db", "PRAGMA journal_mode = WAL", "CREATE TABLE t (x)", "INSERT INTO t VALUES (7)")
    (root / "memory.db").rename(path)
    capture = captured(root)
    (name,) = contents(capture)
    assert os.fsencode(from_member_name(name)) == b"sqlite/" + directory + b"/memory.db"
    assert "INSERT INTO t VALUES(7);" in dump_of_copy(capture, name, tmp_path)


def test_a_database_is_known_by_its_header_whatever_its_name(root: Path) -> None:
    run_sql(root / "no-suffix", "CREATE TABLE t (x)")
    run_sql(root / "note.md", "CREATE TABLE t (x)")
    (root / "text.db").write_bytes(b"a text that somebody called .db")
    kinds = {artifact.path_in_bundle: artifact.kind for artifact in captured(root).artifacts}
    assert kinds == {
        "sqlite/no-suffix": ArtifactKind.SQLITE,
        "sqlite/note.md": ArtifactKind.SQLITE,
        "files/text.db": ArtifactKind.FILE,
    }


def test_an_empty_file_with_a_databases_name_is_an_empty_file(root: Path) -> None:
    (root / "memory.sqlite").touch()
    assert contents(captured(root)) == {"files/memory.sqlite": b""}


def test_an_empty_file_where_a_database_was_promised_is_incomplete(root: Path) -> None:
    (root / "memory.sqlite").touch()
    capture = captured_anyhow(root, sqlite=("*.sqlite",))
    assert [failure.source for failure in capture.failures] == [str(root / "memory.sqlite")]
    assert contents(capture) == {"opaque/memory.sqlite": b""}


def test_a_large_wal_that_a_killed_writer_left_is_captured_with_its_database(
    root: Path, tmp_path: Path
) -> None:
    path = root / "memory.sqlite"
    script = (
        "import os, sqlite3, sys\n"
        "db = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "db.execute('PRAGMA journal_mode = WAL')\n"
        "db.execute('PRAGMA wal_autocheckpoint = 0')\n"
        "db.execute('CREATE TABLE t (id INTEGER PRIMARY KEY, x)')\n"
        "for n in range(40):\n"
        "    db.execute('INSERT INTO t (x) VALUES (randomblob(100000))')\n"
        "db.execute('BEGIN')\n"
        "db.execute('PRAGMA cache_size = 1')\n"
        "db.executemany('INSERT INTO t (x) VALUES (?)', [('never committed' * 1000,)] * 50)\n"
        "os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", script, path], check=False)
    wal = Path(f"{path}-wal")
    before = path.read_bytes(), wal.read_bytes()
    assert len(before[1]) > 4_000_000
    capture = captured(root)
    assert (path.read_bytes(), wal.read_bytes()) == before
    name = "sqlite/memory.sqlite"
    assert contents(capture).keys() == {name}
    (tmp_path / "copy.sqlite").write_bytes(contents(capture)[name])
    with closing(sqlite3.connect(tmp_path / "copy.sqlite")) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert copy.execute("SELECT count(*), max(id), sum(length(x)) FROM t").fetchone() == (
            40,
            40,
            4_000_000,
        )


def test_sidecars_of_a_database_are_left_out_and_counted(root: Path) -> None:
    path = root / "memory.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("CREATE TABLE t (x)")
        capture = captured(root)
    assert contents(capture).keys() == {"sqlite/memory.sqlite"}
    assert {(e.pattern, e.count) for e in capture.excluded} == {("*-wal", 1), ("*-shm", 1)}


def test_a_file_that_is_called_like_a_sidecar_of_nothing_is_captured(root: Path) -> None:
    (root / "notes-wal").write_bytes(b"about a wall")
    assert contents(captured(root)) == {"files/notes-wal": b"about a wall"}


def test_hard_links_to_one_database_are_captured_under_each_name(root: Path, tmp_path: Path) -> None:
    run_sql(root / "one.sqlite", "CREATE TABLE t (x)", "INSERT INTO t VALUES (7)")
    os.link(root / "one.sqlite", root / "two.sqlite")
    capture = captured(root)
    for name in ("sqlite/one.sqlite", "sqlite/two.sqlite"):
        assert "INSERT INTO t VALUES(7);" in dump_of_copy(capture, name, tmp_path)


def test_a_database_that_runs_code_of_its_own_is_copied_without_running_it(root: Path) -> None:
    """Extensions and functions that the schema asks for are the agent's; a page copy needs none of them."""
    path = root / "memory.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.create_function("twice", 1, lambda x: 2 * x, deterministic=True)
        connection.execute("CREATE TABLE t (x)")
        connection.execute("CREATE INDEX i ON t (twice(x))")
        connection.execute("INSERT INTO t VALUES (21)")
    copy = contents(captured(root))["sqlite/memory.sqlite"]
    assert b"twice(x)" in copy


# --- state values -----------------------------------------------------------------------------------------


def test_a_state_file_is_captured_as_it_is_and_once(root: Path) -> None:
    (root / "cursor.json").write_bytes(b'{ "offset" : 12.50 }')
    capture = captured(root, states=(StateSource("cursor", file=root / "cursor.json"),))
    assert contents(capture) == {"state/cursor.json": b'{ "offset" : 12.50 }'}
    assert (capture.states["cursor"].kind, capture.states["cursor"].path) == ("file", "cursor.json")


def test_a_state_query_is_bound_to_the_agent_and_keeps_every_type(root: Path) -> None:
    run_sql(
        root / "registry.sqlite",
        "CREATE TABLE runs (agent_id TEXT, at INTEGER, ratio REAL, note TEXT, raw BLOB)",
        "INSERT INTO runs VALUES ('ana', 9007199254740993, 0.1, 'café', x'00ff')",
        "INSERT INTO runs VALUES ('bob', 1, 1.0, NULL, NULL)",
    )
    query = "SELECT * FROM runs WHERE agent_id = :agent"
    capture = captured(root, states=(StateSource("run", sqlite=root / "registry.sqlite", query=query),))
    assert json.loads(contents(capture)["state/run.json"]) == [
        {"agent_id": "ana", "at": 9007199254740993, "ratio": 0.1, "note": "café", "raw": {"base64": "AP8="}}
    ]


def test_a_state_value_may_come_from_outside_the_root(root: Path, tmp_path: Path) -> None:
    (tmp_path / "shared.json").write_bytes(b"[1]")
    run_sql(tmp_path / "shared.sqlite", "CREATE TABLE t (x)", "INSERT INTO t VALUES (7)")
    capture = captured(
        root,
        states=(
            StateSource("file", file=tmp_path / "shared.json"),
            StateSource("rows", sqlite=tmp_path / "shared.sqlite", query="SELECT x FROM t"),
        ),
    )
    assert contents(capture).keys() == {"state/file.json", "state/rows.json"}  # the database itself is not


# --- how an instant is proven ------------------------------------------------------------------------------


@pytest.fixture
def still(root: Path, tmp_path: Path) -> Iterator[OpenSources]:
    """An agent with every kind of source, opened and staged, at a moment at which nothing moves."""
    for name in ("wal", "rollback"):
        mode = "wal" if name == "wal" else "delete"
        run_sql(root / f"{name}.sqlite", f"PRAGMA journal_mode = {mode}", "CREATE TABLE t (x)")
    for number in range(150):  # more than are looked at within the window
        (root / f"{number:03}.md").write_bytes(b"a note")
    (root / "cursor.json").write_bytes(b"1")
    (root / "memory").mkdir()
    run_git(root / "memory", "init", "--quiet", "--initial-branch=main")
    run_git(root / "memory", "commit", "--quiet", "--allow-empty", "--message=first")
    spec = spec_of(root, memdir=root / "memory", states=(StateSource("cursor", file=root / "cursor.json"),))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with ExitStack() as stack:
        sources = OpenSources(spec, scratch, stack)
        wait_until(lambda: not moved_in_an_attempt(sources, lambda: None), "a quiet moment")
        yield sources


def moved_in_an_attempt(
    sources: OpenSources,
    in_the_window: Callable[[], object],
    *,
    before_the_window: Callable[[], object] = lambda: None,
) -> set[str]:
    """What an attempt finds to have moved when something happens at some moment of it."""
    sources.release()
    copied = sources.spec.root.parent / "copied"
    copied.mkdir(exist_ok=True)
    copies = DatabaseCopies(copied, CopyOptions())
    with (
        happening_after(sources, "catch_up", before_the_window),
        happening_after(sources, "pin", in_the_window),
    ):
        moved = attempt_to_hold(sources, copies, is_last=True).moved
    copies.discard()
    return moved


@contextmanager
def happening_after(sources: OpenSources, step: str, happening: Callable[[], object]) -> Iterator[None]:
    """Within the block, something happens right after a step of an attempt."""
    original = getattr(sources, step)

    def and_then() -> object:
        result = original()
        happening()
        return result

    setattr(sources, step, and_then)
    try:
        yield
    finally:
        setattr(sources, step, original)


HAPPENINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "commit to WAL": (lambda root: commit_elsewhere(root / "wal.sqlite"), "wal.sqlite"),
    "hot file": (lambda root: (root / "149.md").write_bytes(b"A NOTE"), "149.md"),
    "cold file": (lambda root: (root / "000.md").write_bytes(b"A NOTE"), "000.md"),
    "state file": (lambda root: (root / "cursor.json").write_bytes(b"2"), "cursor.json"),
    "new file": (lambda root: (root / "new.md").write_bytes(b"new"), "new.md"),
    "file gone": (lambda root: (root / "000.md").unlink(), "000.md"),
    "new link": (lambda root: (root / "link").symlink_to("x"), "link"),
    "new database": (lambda root: commit_elsewhere(root / "new.sqlite"), "new.sqlite"),
    "database gone": (lambda root: (root / "wal.sqlite").rename(root.parent / "x"), "wal.sqlite"),
    "database replaced": (lambda root: replace(root / "wal.sqlite"), "wal.sqlite"),
    "new commit": (lambda root: commit_to_git(root), ".git"),
    "new branch": (lambda root: run_git(root / "memory", "branch", "side"), ".git"),
    "other head": (lambda root: run_git(root / "memory", "symbolic-ref", "HEAD", "refs/heads/x"), ".git"),
}


def commit_elsewhere(path: Path) -> None:
    """By another process, as agents do."""
    statement = "CREATE TABLE IF NOT EXISTS t (x); INSERT INTO t VALUES (1)"
    subprocess.run(["sqlite3", path, statement], check=True)


def replace(path: Path) -> None:
    commit_elsewhere(path.with_name("beside"))
    path.with_name("beside").rename(path)


def commit_to_git(root: Path) -> None:
    run_git(root / "memory", "commit", "--quiet", "--allow-empty", "--message=next")


@pytest.mark.parametrize(("happening", "named"), HAPPENINGS.values(), ids=HAPPENINGS.keys())
def test_whatever_moves_within_the_window_is_found_and_named(
    still: OpenSources, root: Path, happening: Callable[[Path], object], named: str
) -> None:
    assert named in moved_in_an_attempt(still, lambda: happening(root))


def test_what_moves_after_it_was_staged_and_before_the_window_is_found(
    still: OpenSources, root: Path
) -> None:
    change = lambda: (root / "000.md").write_bytes(b"2")  # noqa: E731
    assert moved_in_an_attempt(still, lambda: None, before_the_window=change) == {"000.md"}


@pytest.mark.parametrize("name", ["149.md", "cursor.json"])
def test_a_small_file_that_was_just_written_is_taken_as_the_window_sees_it(
    still: OpenSources, root: Path, name: str
) -> None:
    change = lambda: (root / name).write_bytes(b"2")  # noqa: E731
    assert moved_in_an_attempt(still, lambda: None, before_the_window=change) == set()
    assert still.staging.files[name].copy.read_bytes() == b"2"


def test_a_pinned_rollback_database_keeps_its_writer_from_committing(still: OpenSources, root: Path) -> None:
    """So nothing can move: there is no other way without a WAL, and it is let go soon."""

    def try_to_commit() -> None:
        with closing(sqlite3.connect(root / "rollback.sqlite", timeout=0)) as writer:
            writer.execute("INSERT INTO t VALUES (1)")
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                writer.commit()

    assert moved_in_an_attempt(still, try_to_commit) == set()
    still.release()
    commit_elsewhere(root / "rollback.sqlite")


def test_what_moved_is_caught_up_with_by_the_next_attempt(still: OpenSources, root: Path) -> None:
    for label, (happening, _) in HAPPENINGS.items():
        if label != "database gone":  # it would have to be there for the next
            happening(root)
    wait_until(lambda: not moved_in_an_attempt(still, lambda: None), "a quiet moment")


@contextmanager
def restlessly_rewritten(path: Path) -> Iterator[None]:
    """By a process of its own, without pause: too large to be read within the window."""
    script = (
        "import sys\n"
        "generation = 0\n"
        "while True:\n"
        "    generation += 1\n"
        "    with open(sys.argv[1], 'r+b') as stream:\n"
        "        stream.write(b'%08d' % generation * 25_000)\n"
        "    if generation == 1: print(flush=True)\n"
    )
    path.write_bytes(bytes(200_000))
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        try:
            yield
        finally:
            writer.kill()


def test_who_wants_one_instant_or_nothing_gets_nothing_from_an_agent_that_never_holds_still(
    root: Path, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    spec = spec_of(root, require_point_in_time=True)
    with (
        restlessly_rewritten(root / "big.bin"),
        pytest.raises(NotOneInstant, match=r"big\.bin moved") as raised,
    ):
        take_cut(spec, scratch, options=CutOptions(attempts=2))
    assert raised.value.exit_code == ExitCode.BUSY
    assert "before" in raised.value.hint


def test_who_does_not_insist_gets_what_moved_by_name(root: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (root / "note.md").write_bytes(b"a note")
    with restlessly_rewritten(root / "big.bin"):
        capture = take_cut(spec_of(root), scratch, options=CutOptions(attempts=2))
    assert (capture.consistency.level, capture.consistency.moved) == ("per_source", ("big.bin",))
    assert capture.fingerprint is None
    assert contents(capture)["files/note.md"] == b"a note"
    if capture.is_complete:  # two readings in a row were equal: one state of it
        assert "files/big.bin" in contents(capture)
    else:
        assert [failure.source for failure in capture.failures] == [str(root / "big.bin")]
        assert "opaque/big.bin" in contents(capture)


def test_a_log_that_grows_without_pause_is_a_whole_beginning_of_itself(root: Path) -> None:
    script = (
        "import sys\n"
        "with open(sys.argv[1], 'ab', buffering=0) as log:\n"
        "    for number in range(10_000_000):\n"
        "        log.write(b'{\"line\": %d}\\n' % number)\n"
        "        if number == 10: print(flush=True)\n"
    )
    path = root / "session.jsonl"
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        try:
            capture = captured(root)
        finally:
            writer.kill()
    lines = contents(capture)["files/session.jsonl"].splitlines()
    assert [json.loads(line)["line"] for line in lines] == list(range(len(lines)))
    level, moved = capture.consistency.level, capture.consistency.moved
    assert (level, moved) in [("point_in_time", ()), ("per_source", ("session.jsonl",))]


def test_an_agent_that_is_larger_than_it_may_be_is_refused_with_what_is_large(root: Path) -> None:
    (root / "small").write_bytes(bytes(10))
    (root / "large").write_bytes(bytes(5000))
    with pytest.raises(RefusedError, match=r"5010 bytes.* the largest: large, small") as raised:
        captured(root, max_agent_bytes=5009)
    assert "max_agent_bytes" in raised.value.hint
    captured(root, max_agent_bytes=5010)


def test_how_long_a_log_was_that_ended_in_half_a_line_is_recorded(root: Path) -> None:
    (root / "a.jsonl").write_bytes(b'{"a": 1}\n{"b": 2')
    (root / "b.jsonl").write_bytes(b'{"a": 1}\n')
    capture = captured(root)
    assert capture.cut_logs == {"files/a.jsonl": 16}
    assert contents(capture)["files/a.jsonl"] == b'{"a": 1}\n'


def test_raw_bytes_that_may_hold_a_table_of_secrets_are_not_kept(root: Path) -> None:
    for name, table in (("plain", "notes"), ("secret", "auth_profiles")):
        path = root / f"{name}.sqlite"
        run_sql(path, f"CREATE TABLE {table} (x)", f"INSERT INTO {table} VALUES ('a value')")
        with path.open("r+b") as stream:  # its second page, the table's own, so that only a check finds it
            stream.seek(4096)
            stream.write(b"\xff" * 8)
    capture = captured_anyhow(root, secret_tables=("AUTH_*",))
    kept = {failure.source: failure.kept_as for failure in capture.failures}
    assert kept == {str(root / "plain.sqlite"): ("opaque/plain.sqlite",), str(root / "secret.sqlite"): ()}
    assert "auth_profiles" in next(f.hint for f in capture.failures if "secret" in f.source)
    assert set(contents(capture)) == {"opaque/plain.sqlite"}


def test_what_comes_and_goes_between_two_looks_is_found_in_the_window(still: OpenSources, root: Path) -> None:
    """At the instant of the pins it is there, and neither before nor after."""
    original = still.read

    def read() -> object:
        (root / "mark.md").write_bytes(b"here")
        try:
            return original()
        finally:
            (root / "mark.md").unlink()

    still.read = read  # type: ignore[method-assign, assignment]
    assert "./" in moved_in_an_attempt(still, lambda: None)


def test_a_link_that_is_another_one_only_in_the_window_is_found(still: OpenSources, root: Path) -> None:
    (root / "link").symlink_to("000.md")
    wait_until(lambda: not moved_in_an_attempt(still, lambda: None), "a quiet moment")
    original = still.read

    def relink(target: str) -> None:
        (root / "beside").symlink_to(target)
        (root / "beside").rename(root / "link")

    def read() -> object:
        relink("001.md")
        try:
            return original()
        finally:
            relink("000.md")

    still.read = read  # type: ignore[method-assign, assignment]
    assert "./" in moved_in_an_attempt(still, lambda: None)


def test_a_database_that_is_rewritten_in_spite_of_its_lock_is_found(root: Path, tmp_path: Path) -> None:
    """By who does not lock: a program that keeps its database in memory and writes all of it out."""
    path = root / "memory.sqlite"
    run_sql(path, "CREATE TABLE t (x)", "INSERT INTO t VALUES (zeroblob(9000000))")
    whole = path.read_bytes()
    (tmp_path / "scratch").mkdir()
    with closing(open_database(path, tmp_path / "scratch")) as database:
        before = database.reading()
        database.pin()
        subprocess.run(["dd", f"of={path}", "conv=notrunc", "status=none"], input=whole, check=True)
        with pytest.raises(PinExpired):
            database.copy_to(tmp_path / "copy", deadline=float("inf"))
        database.release()
        assert database.reading() != before


def test_a_state_value_is_of_the_same_instant_as_its_database(root: Path) -> None:
    path = root / "memory.sqlite"
    run_sql(path, "CREATE TABLE t (n)", "INSERT INTO t VALUES (0)")
    script = (
        "import sqlite3, sys, time\n"
        "db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)\n"
        "print(flush=True)\n"
        "while True: db.execute('UPDATE t SET n = n + 1'); time.sleep(0.005)\n"
    )
    source = StateSource("cursor", sqlite=path, query="SELECT n FROM t")
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        try:
            captures = [captured(root, states=(source,)) for _ in range(8)]
        finally:
            writer.kill()
    for number, capture in enumerate(captures):
        copy = root.parent / f"copy-{number}"
        copy.write_bytes(contents(capture)["sqlite/memory.sqlite"])
        with closing(sqlite3.connect(f"file:{copy}?immutable=1", uri=True)) as connection:
            (n,) = connection.execute("SELECT n FROM t").fetchone()
        assert json.loads(contents(capture)["state/cursor.json"]) == [{"n": n}]


@pytest.mark.parametrize("suffix", ["-journal", "-wal", "-shm"])
def test_a_fifo_beside_a_database_keeps_nobody_waiting(root: Path, suffix: str) -> None:
    run_sql(root / "memory.sqlite", "CREATE TABLE t (x)")
    os.mkfifo(root / f"memory.sqlite{suffix}")
    capture = captured_anyhow(root)
    assert "is no file" in " ".join(failure.reason for failure in capture.failures)


def test_a_fifo_where_a_state_value_should_be_keeps_nobody_waiting(root: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    source = StateSource("cursor", sqlite=tmp_path / "fifo", query="SELECT 1")
    (root / "note.md").write_bytes(b"a note")
    capture = captured_anyhow(root, states=(source,))
    assert not capture.is_complete
    assert contents(capture) == {"files/note.md": b"a note"}


def test_a_clock_that_went_back_does_not_cost_the_instant(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(30):
        (root / f"{number}.md").write_bytes(b"a note")
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() - 3_600_000_000_000)
    assert captured(root).consistency.level == "point_in_time"


def test_a_file_that_the_last_look_misses_is_kept_as_it_was_seen(still: OpenSources, root: Path) -> None:
    """Renamed to and fro all the time, it is always there, and a look may find it in neither place."""
    moved = moved_in_an_attempt(still, lambda: (root / "000.md").unlink())
    assert "000.md" in moved
    assert "000.md" not in still.scan.files
    still.settle(moved)
    assert "000.md" in still.scan.files
    assert still.staging.files["000.md"].copy.read_bytes() == b"a note"


def test_a_file_that_made_room_for_a_directory_is_not_kept(still: OpenSources, root: Path) -> None:
    def make_room() -> None:
        (root / "000.md").unlink()
        (root / "000.md").mkdir()
        (root / "000.md/inside.md").write_bytes(b"another")

    moved = moved_in_an_attempt(still, make_room)
    still.settle(moved)
    assert "000.md" not in still.scan.files
    assert "000.md/inside.md" in still.scan.files


def test_a_state_value_that_an_earlier_attempt_read_is_not_taken_for_this_ones(
    root: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside.sqlite"
    run_sql(outside, "PRAGMA journal_mode = DELETE", "CREATE TABLE t (n)", "INSERT INTO t VALUES (1)")
    source = StateSource("n", sqlite=outside, query="SELECT n FROM t")
    (tmp_path / "scratch").mkdir()
    with ExitStack() as stack:
        sources = OpenSources(spec_of(root, states=(source,)), tmp_path / "scratch", stack)
        assert moved_in_an_attempt(sources, lambda: None) == set()
        assert json.loads(sources.rows["n"]) == [{"n": 1}]  # type: ignore[arg-type]
        with closing(sqlite3.connect(outside, isolation_level=None)) as writer:
            writer.execute("BEGIN EXCLUSIVE")
            assert str(outside) in moved_in_an_attempt(sources, lambda: None)
            assert sources.rows == {}


# --- our own side -----------------------------------------------------------------------------------------


def test_a_full_scratch_is_our_error_and_not_the_agents_failure(root: Path, tmp_path: Path) -> None:
    """No snapshot at all is better than one that calls the agent's sound files unreadable."""
    run_sql(root / "memory.sqlite", "CREATE TABLE t (x)", "INSERT INTO t VALUES (randomblob(900000))")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with files_not_larger_than(100_000), pytest.raises(OSError, match="No space") as raised:
        take_cut(spec_of(root), scratch)
    assert raised.value.errno == errno.ENOSPC


@contextmanager
def files_not_larger_than(limit_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_spec_is_plain_data_that_capture_does_not_change(root: Path) -> None:
    (root / "memory/.git").mkdir(parents=True)
    spec = spec_of(root, memdir_candidates=("memory",))
    before = dataclasses.asdict(spec)
    scratch = root.with_name("scratch")
    scratch.mkdir()
    take_cut(spec, scratch)
    assert dataclasses.asdict(spec) == before
