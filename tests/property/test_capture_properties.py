"""Any tree of files and any database come back from a snapshot as they were: captured, bundled, restored.

Files are compared by bytes, modes and times; databases page by page, which is more than any dump shows, and
by rows, which is what their owner sees.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.bundle.frames import REGION_BYTES
from daemon.locate import LocalBundle
from daemon.model import AgentSpec, SnapshotRecord
from daemon.restore import RestoreReport, restore_agent
from daemon.snapshots import Sealing, Store, take_snapshot
from tests.e2e.trees import Entry, listing

WITH_FILES = settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
NOISE = os.urandom(REGION_BYTES + 5000)


@dataclass(frozen=True)
class Trip:
    """What became of an agent: how it was captured, what the restore says, and where it is now."""

    record: SnapshotRecord
    report: RestoreReport
    root: Path


@contextmanager
def an_empty_agent() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory, "ana")
        root.mkdir()
        yield root


def there_and_back(root: Path) -> Trip:
    """Take a snapshot of all that is in `root`, and bring it back beside it."""
    spec = AgentSpec("default", "ana", root, include=("**",))
    store = Store(root.with_name("state"))
    record = take_snapshot(store, spec, sealing=Sealing(compression_level=1))
    assert record.complete, record.failures
    assert record.consistency.level == "point_in_time"
    elsewhere = replace(spec, root=root.with_name("back"))
    report = restore_agent(LocalBundle(store.path_of(record.key)), elsewhere)
    assert report.unsound == ()
    return Trip(record, report, elsewhere.root)


# --- files ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Content:
    """Bytes of a file, and how many of them a snapshot keeps. is_sparse: written with a hole before them."""

    data: bytes
    kept_bytes: int
    is_sparse: bool = False


# Told by their suffix, so that a file of that name which is none would be an alarm.
_DATABASE_SUFFIXES = (b".sqlite", b".sqlite3", b".db3")
NAMES = (
    st.binary(min_size=1, max_size=30)
    | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).map(str.encode)
    | st.sampled_from([b"x" * 255, b" ", b"-wal", b"a-journal", b"~", b"...", b"*", b"[", b"\\x41", b"\xff"])
).filter(
    lambda name: (
        not set(b"/\0") & set(name)
        and name not in (b".", b"..", b".git")
        and not name.endswith(_DATABASE_SUFFIXES)
        and len(name) <= 255
    )
)
MODES = st.integers(0, 0o777)
TIMES_NS = st.integers(-2_000_000_000, 9_000_000_000).flatmap(
    lambda seconds: st.integers(0, 999_999_999).map(lambda ns: seconds * 1_000_000_000 + ns)
)
SIZES = st.integers(0, 3000) | st.integers(-2, 2).map(lambda n: REGION_BYTES + n)


@st.composite
def plain_contents(draw: st.DrawFn) -> Content:
    size, start = draw(SIZES), draw(st.integers(0, 1000))
    data = NOISE[start : start + size] if draw(st.booleans()) else bytes(size)
    return Content(data, len(data), is_sparse=draw(st.booleans()))


@st.composite
def log_contents(draw: st.DrawFn) -> Content:
    """JSON Lines whose last line may be torn: then it is left out, unless only its newline is to come."""
    lines = b"".join(b'{"n": %d}\n' % n for n in range(draw(st.integers(0, 40))))
    torn = draw(st.sampled_from([b"", b'{"n', b'{"text": "\xc3', b'{"n": 1}x']))
    whole = draw(st.sampled_from([b"", b'{"n": 7}', b"[]"]))
    tail = torn or whole
    return Content(lines + tail, len(lines) + (0 if torn else len(tail)))


def targets(link: bytes, others: list[bytes]) -> st.SearchStrategy[bytes]:
    """Where a symlink may lead: to something of the agent's, to nothing, or out."""
    directory = os.path.dirname(link)  # noqa: PTH120
    inside = [os.path.relpath(other, directory or b".") for other in others]
    out = [b"/etc/hostname", os.path.relpath(b"../elsewhere", directory or b".")]
    return NAMES | st.sampled_from([b".", *inside, *out])


@st.composite
def trees(draw: st.DrawFn) -> dict[bytes, Any]:
    """Relative paths to what is there: a Content, a symlink's target (bytes), or None for a directory."""
    directories = [b""]
    tree: dict[bytes, Any] = {}
    kinds = ["directory", "file", "file", "file", "log", "symlink"]
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=10)):
        name = draw(NAMES)
        if kind == "log":
            name = name[:240] + draw(st.sampled_from([b".jsonl", b".ndjson"]))
        path = os.path.join(draw(st.sampled_from(directories)), name)  # noqa: PTH118
        if path in tree:
            continue
        if kind == "directory":
            directories.append(path)
            tree[path] = None
        elif kind == "symlink":
            tree[path] = draw(targets(path, list(tree)))
        else:
            tree[path] = draw(log_contents() if kind == "log" else plain_contents())
    return tree


def build(root: Path, tree: Mapping[bytes, Any], attributes: Mapping[bytes, tuple[int, int]]) -> None:
    for path, what in tree.items():
        target = root / os.fsdecode(path)
        if what is None:
            target.mkdir()
        elif isinstance(what, bytes):
            target.symlink_to(os.fsdecode(what))
        else:
            write(target, what)
    for path, (mode, mtime_ns) in sorted(attributes.items(), reverse=True):  # what is inside comes first
        target = root / os.fsdecode(path)
        if tree[path] is None:
            target.chmod(mode | stat.S_IRWXU)  # what nobody may enter is not restored so, either
        elif not isinstance(tree[path], bytes):
            os.utime(target, ns=(mtime_ns, mtime_ns))
            target.chmod(mode)


def write(target: Path, content: Content) -> None:
    with target.open("wb") as stream:
        if content.is_sparse:
            stream.truncate(len(content.data))
            hole = len(content.data) - len(content.data.lstrip(b"\0"))
            stream.seek(hole)
            stream.write(content.data[hole:])
        else:
            stream.write(content.data)


def leads_out(root: Path, link: bytes, target: bytes) -> bool:
    leads_to = os.path.realpath(root / os.fsdecode(link))
    return target.startswith(b"/") or not Path(leads_to).is_relative_to(os.path.realpath(root))


def expected(
    tree: Mapping[bytes, Any], listed: Mapping[bytes, Entry], *, without: set[bytes]
) -> dict[bytes, Entry]:
    return {
        path: replace(entry, content=entry.content[: tree[path].kept_bytes])
        if entry.kind == "file"
        else entry
        for path, entry in listed.items()
        if path not in without
    }


@given(st.data())
@WITH_FILES
def test_any_tree_comes_back_with_its_bytes_modes_and_times(data: st.DataObject) -> None:
    tree = data.draw(trees())
    attributes = {path: data.draw(st.tuples(MODES, TIMES_NS)) for path in tree}
    with an_empty_agent() as root:
        build(root, tree, attributes)
        before = listing(root)
        if not any(isinstance(what, Content | bytes) for what in tree.values()):
            return  # of directories alone there is no snapshot
        links = {path: what for path, what in tree.items() if isinstance(what, bytes)}
        outward = {path for path, target in links.items() if leads_out(root, path, target)}
        trip = there_and_back(root)
        assert listing(trip.root) == expected(tree, before, without=outward)
        assert len(trip.report.not_put_back) == len(outward)
        assert listing(root) == before


# --- databases --------------------------------------------------------------------------------------------

# In the header: change counter, schema cookie, what the change counter was at the last writing, and the
# version of the library that did it. SQLite's backup moves each of them in the copy.
_MOVED_BY_A_COPY = (slice(24, 28), slice(40, 44), slice(92, 96), slice(96, 100))


@dataclass(frozen=True)
class Shape:
    """How a database is laid out, before there is anything in it."""

    page_bytes: int
    encoding: str
    auto_vacuum: int
    journal_mode: str


SHAPES = st.builds(
    Shape,
    page_bytes=st.sampled_from([512, 1024, 4096, 8192, 32768, 65536]),
    encoding=st.sampled_from(["UTF-8", "UTF-16le", "UTF-16be"]),
    auto_vacuum=st.integers(0, 2),
    journal_mode=st.sampled_from(["WAL", "WAL", "DELETE", "TRUNCATE", "PERSIST"]),
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    ["\0", "a\0b", "é" * 999]
)
VALUES = (
    st.none()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False)
    | TEXTS
    | st.binary(max_size=20)
    | st.integers(0, 70_000).map(bytes)
)
ROWIDS = st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(0, 50)
TABLES = {
    "plain": "CREATE TABLE plain (value)",
    "keyed": "CREATE TABLE keyed (name TEXT PRIMARY KEY, value) WITHOUT ROWID",
    "strict": "CREATE TABLE strict (id INTEGER PRIMARY KEY AUTOINCREMENT, value ANY) STRICT",
    "generated": "CREATE TABLE generated (value, kind AS (typeof(value)) STORED, size AS (length(value)))",
    "words": "CREATE VIRTUAL TABLE words USING fts5(value, tokenize = 'porter')",
    "boxes": "CREATE VIRTUAL TABLE boxes USING rtree(id, low, high)",
}
EXTRAS = [
    "CREATE INDEX by_value ON plain (value) WHERE value IS NOT NULL",
    "CREATE INDEX by_kind ON generated (kind, size)",
    "CREATE VIEW both AS SELECT value FROM plain UNION ALL SELECT value FROM keyed",
    "CREATE TRIGGER noted AFTER INSERT ON strict BEGIN INSERT INTO plain VALUES (new.value); END",
    "PRAGMA user_version = 77",
    "PRAGMA application_id = 1095188304",
]


def make(path: Path, shape: Shape, extras: list[str]) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(f"PRAGMA page_size = {shape.page_bytes}")
    connection.execute(f"PRAGMA encoding = '{shape.encoding}'")
    connection.execute(f"PRAGMA auto_vacuum = {shape.auto_vacuum}")
    connection.execute(f"PRAGMA journal_mode = {shape.journal_mode}")
    connection.execute("PRAGMA synchronous = OFF")
    for statement in (*TABLES.values(), *extras):
        connection.execute(statement)
    return connection


def fill(connection: sqlite3.Connection, rows: list[tuple[int, Any]]) -> None:
    """Each row in every table, later ones in place of earlier ones with the same id."""
    connection.execute("BEGIN")
    for rowid, value in rows:
        connection.execute("INSERT OR REPLACE INTO plain (rowid, value) VALUES (?, ?)", (rowid, value))
        connection.execute("INSERT OR REPLACE INTO keyed VALUES (?, ?)", (str(rowid), value))
        connection.execute("INSERT INTO strict (value) VALUES (?)", (value,))
        connection.execute("INSERT INTO generated (value) VALUES (?)", (value,))
        connection.execute("INSERT OR REPLACE INTO words (rowid, value) VALUES (?, ?)", (rowid, repr(value)))
        connection.execute(
            "INSERT OR REPLACE INTO boxes VALUES (?, ?, ?)", (rowid, rowid % 97, rowid % 97 + 1)
        )
    connection.execute("COMMIT")


def thin_out(connection: sqlite3.Connection, *, every: int) -> None:
    """Leave free pages and half-filled ones, as years of use do."""
    connection.execute("BEGIN")
    for table in ("plain", "strict", "generated"):
        connection.execute(f"DELETE FROM {table} WHERE rowid % {every} = 0")
    connection.execute("COMMIT")
    connection.execute("PRAGMA incremental_vacuum(2)")


def pages(connection: sqlite3.Connection) -> bytes:
    """Every page as this connection sees it, WAL and all."""
    image = bytearray(connection.serialize())
    for where in _MOVED_BY_A_COPY:
        image[where] = bytes(4)
    return bytes(image)


def rows_of(connection: sqlite3.Connection) -> dict[str, list[Any]]:
    found = {
        name: connection.execute(f"SELECT rowid, * FROM {name} ORDER BY rowid").fetchall()
        for name in TABLES
        if name != "keyed"
    }
    found["keyed"] = connection.execute("SELECT * FROM keyed").fetchall()
    found["schema"] = connection.execute("SELECT rowid, * FROM sqlite_schema").fetchall()
    return found


@given(
    SHAPES,
    st.lists(st.sampled_from(EXTRAS), unique=True),
    st.lists(st.tuples(ROWIDS, VALUES), max_size=12),
    st.lists(st.tuples(ROWIDS, VALUES), max_size=6),
    st.integers(2, 5),
    st.booleans(),
)
@WITH_FILES
def test_any_database_comes_back_page_by_page(
    shape: Shape,
    extras: list[str],
    first: list[tuple[int, Any]],
    later: list[tuple[int, Any]],
    every: int,
    is_in_transaction: bool,
) -> None:
    """With the agent's connection open, and what it has not committed left out."""
    with an_empty_agent() as root, closing(make(root / "memory.db", shape, extras)) as agent:
        fill(agent, first)
        agent.execute("PRAGMA wal_checkpoint")
        thin_out(agent, every=every)
        fill(agent, later)
        before, rows = pages(agent), rows_of(agent)
        if is_in_transaction:
            agent.execute("BEGIN IMMEDIATE")
            agent.execute("INSERT INTO keyed VALUES ('not committed', 1)")
        trip = there_and_back(root)
        restored = trip.root / "memory.db"
        assert os.listdir(trip.root) == ["memory.db"]  # noqa: PTH208
        with closing(sqlite3.connect(f"file:{restored}?mode=ro&immutable=1", uri=True)) as back:
            assert pages(back) == before
        with closing(sqlite3.connect(restored)) as back:
            assert rows_of(back) == rows
            assert back.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert back.execute("SELECT count(*) FROM keyed").fetchone() == (len(rows["keyed"]),)
