"""Copies of databases: how long a pin is held, what is left out of them, what is found wrong with them."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from daemon.capture.copies import CopyOptions, DatabaseCopies
from daemon.capture.secret_tables import empty_tables, tables_in_raw_bytes
from daemon.capture.sqlite import (
    DatabaseUnreadable,
    PinnedDatabase,
    check_copy,
    open_database,
)
from tests.unit.test_capture import digests, dump_of, files_not_larger_than, run_sql

NEEDLE = b"hunter2-topsecret"
ROWS = (
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count})"
    " INSERT INTO {table} SELECT {value} FROM n"
)


def rows(table: str, count: int, value: str) -> str:
    return ROWS.format(table=table, count=count, value=value)


class Pinned:
    """Databases of an agent, opened and pinned."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self.root = root
        self._stack = stack
        self.databases: list[tuple[str, PinnedDatabase]] = []

    def add(self, name: str, *statements: str) -> PinnedDatabase:
        run_sql(self.root / name, *statements)
        return self.pin(name)

    def pin(self, name: str) -> PinnedDatabase:
        database = open_database(self.root / name, self.root)
        self._stack.callback(database.close)
        database.pin()
        self.databases.append((name, database))
        return database


@pytest.fixture
def pinned(tmp_path: Path) -> Iterator[Pinned]:
    root = tmp_path / "ana"
    root.mkdir()
    with ExitStack() as stack:
        yield Pinned(root, stack)


@pytest.fixture
def room(tmp_path: Path) -> Path:
    room = tmp_path / "room"
    room.mkdir()
    return room


LARGE = ("CREATE TABLE t (x)", "INSERT INTO t VALUES (zeroblob(4000000))", "INSERT INTO t VALUES ('then')")
"""More than is copied in one step, so that a deadline can pass in between."""


def commit_at_once(path: Path, statement: str = "INSERT INTO t VALUES ('now')") -> str:
    """By another process that does not wait; what it complains of."""
    said = subprocess.run(
        ["sqlite3", "-cmd", ".timeout 0", path, statement], capture_output=True, text=True, check=False
    )
    return said.stderr


# --- pins -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_copy_is_the_pinned_state_and_the_pin_is_let_go(pinned: Pinned, room: Path, mode: str) -> None:
    database = pinned.add("a.sqlite", f"PRAGMA journal_mode = {mode}", *LARGE)
    if mode == "wal":
        assert commit_at_once(pinned.root / "a.sqlite") == ""
    else:
        assert "locked" in commit_at_once(pinned.root / "a.sqlite")
    copies = DatabaseCopies(room, CopyOptions())
    copies.copy_pinned(pinned.databases, held_since=time.monotonic())
    assert (copies.moved, copies.failures, database.is_pinned) == (set(), {}, False)
    dump = dump_of(copies.done["a.sqlite"].file)
    assert ("'then'" in dump, "'now'" in dump) == (True, False)
    assert commit_at_once(pinned.root / "a.sqlite") == ""


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("delete", CopyOptions(rollback_pin_seconds=0.0)),
        ("wal", CopyOptions(wal_pin_seconds=0.0)),
        ("truncate", CopyOptions(rollback_pin_seconds=0.0)),
    ],
)
def test_a_pin_that_was_held_long_enough_is_let_go_and_the_copy_left_for_later(
    pinned: Pinned, room: Path, mode: str, options: CopyOptions
) -> None:
    database = pinned.add("a.sqlite", f"PRAGMA journal_mode = {mode}", *LARGE)
    copies = DatabaseCopies(room, options)
    copies.copy_pinned(pinned.databases, held_since=time.monotonic())
    assert (copies.done, copies.moved, copies.failures) == ({}, set(), {})
    assert (database.is_pinned, list(room.iterdir())) == (False, [])  # not even half a copy is left
    assert commit_at_once(pinned.root / "a.sqlite") == ""
    copies.copy_rest(pinned.databases)
    assert (copies.moved, copies.failures) == ({"a.sqlite"}, {})
    assert "'now'" in dump_of(copies.done["a.sqlite"].file)  # some state of its own, and a whole one
    check_copy(copies.done["a.sqlite"].file)


def test_the_time_runs_from_when_the_window_opened(pinned: Pinned, room: Path) -> None:
    pinned.add("a.sqlite", *LARGE)
    copies = DatabaseCopies(room, CopyOptions(rollback_pin_seconds=1000.0))
    copies.copy_pinned(pinned.databases, held_since=time.monotonic() - 1001)
    assert copies.done == {}


def test_one_time_that_is_up_is_nobody_elses(pinned: Pinned, room: Path) -> None:
    pinned.add("slow.sqlite", *LARGE)
    pinned.add("quick.sqlite", "PRAGMA journal_mode = WAL", *LARGE)
    copies = DatabaseCopies(room, CopyOptions(rollback_pin_seconds=0.0))
    copies.copy_pinned(pinned.databases, held_since=time.monotonic())
    assert copies.done.keys() == {"quick.sqlite"}
    copies.copy_rest(pinned.databases)
    assert (set(copies.done), copies.moved) == ({"quick.sqlite", "slow.sqlite"}, {"slow.sqlite"})


def test_what_is_not_pinned_is_left_for_later(pinned: Pinned, room: Path) -> None:
    pinned.add("a.sqlite", *LARGE).release()
    copies = DatabaseCopies(room, CopyOptions())
    copies.copy_pinned(pinned.databases, held_since=time.monotonic())
    assert copies.done == {}
    copies.copy_rest(pinned.databases)
    assert copies.moved == {"a.sqlite"}


def test_what_is_copied_already_is_not_copied_again(pinned: Pinned, room: Path) -> None:
    pinned.add("a.sqlite", *LARGE)
    copies = DatabaseCopies(room, CopyOptions())
    copies.copy_pinned(pinned.databases, held_since=time.monotonic())
    first = copies.done["a.sqlite"]
    copies.copy_pinned(pinned.databases, held_since=time.monotonic())
    copies.copy_rest(pinned.databases)
    assert (copies.done["a.sqlite"], copies.moved, len(list(room.iterdir()))) == (first, set(), 1)


def test_a_cut_that_did_not_come_about_leaves_no_copies(pinned: Pinned, room: Path) -> None:
    database = pinned.add("a.sqlite", *LARGE)
    corrupt(pinned.root / "b.sqlite")
    pinned.pin("b.sqlite")
    pinned.add("c.sqlite", *LARGE).release()
    copies = DatabaseCopies(room, CopyOptions())
    copies.copy_pinned(pinned.databases, held_since=time.monotonic())
    copies.copy_rest(pinned.databases)
    assert (set(copies.done), set(copies.failures)) == ({"a.sqlite", "c.sqlite"}, {"b.sqlite"})
    kept = [copy.file for copy in copies.done.values()]
    copies.discard()
    assert (copies.done, copies.moved, copies.failures) == ({}, set(), {})
    assert not any(copy.exists() for copy in kept)
    assert commit_at_once(pinned.root / "a.sqlite") == ""
    database.pin()
    copies.copy_pinned([("a.sqlite", database)], held_since=time.monotonic())
    assert "'now'" in dump_of(copies.done["a.sqlite"].file)


def corrupt(path: Path) -> None:
    run_sql(path, *LARGE)
    with path.open("r+b") as stream:
        stream.seek(4096)
        stream.write(b"\xff" * 8)


def test_one_that_is_corrupt_stops_no_other(pinned: Pinned, room: Path) -> None:
    for name in ("1", "2", "3", "4"):
        if name in "13":
            corrupt(pinned.root / name)
            pinned.pin(name)
        else:
            pinned.add(name, *LARGE)
    copies = DatabaseCopies(room, CopyOptions())
    copies.copy_pinned(pinned.databases, held_since=time.monotonic())
    copies.copy_rest(pinned.databases)
    assert (set(copies.done), set(copies.failures), copies.moved) == ({"2", "4"}, {"1", "3"}, set())
    assert all("quick check" in str(failure) for failure in copies.failures.values())


def test_no_room_is_our_error_and_every_pin_is_let_go(pinned: Pinned, room: Path) -> None:
    for number in range(4):
        pinned.add(f"{number}.sqlite", *LARGE)
    copies = DatabaseCopies(room, CopyOptions())
    with files_not_larger_than(100_000), pytest.raises(OSError, match="No space"):
        copies.copy_pinned(pinned.databases, held_since=time.monotonic())
    assert not any(database.is_pinned for _, database in pinned.databases)
    for number in range(4):
        assert commit_at_once(pinned.root / f"{number}.sqlite") == ""


# --- tables of secrets ------------------------------------------------------------------------------------

SECRET = f"'{NEEDLE.decode()}'"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return tmp_path / "copy.sqlite"


def needles(path: Path) -> int:
    return sum(file.read_bytes().count(NEEDLE) for file in path.parent.glob(f"{path.name}*"))


SECRETS: dict[str, tuple[list[str], int]] = {
    "one row": (["CREATE TABLE auth (x)", f"INSERT INTO auth VALUES ({SECRET})"], 1),
    "many pages": (["CREATE TABLE auth (x)", rows("auth", 5000, f"{SECRET} || i")], 5000),
    "overflow pages": (
        ["CREATE TABLE auth (x)", rows("auth", 5, f"replace(hex(zeroblob(20000)), '00', {SECRET})")],
        5,
    ),
    "without rowid": (
        ["CREATE TABLE auth (k PRIMARY KEY, x) WITHOUT ROWID", rows("auth", 1000, f"i, {SECRET}")],
        1000,
    ),
    "indexed": (
        [
            "CREATE TABLE auth (x)",
            "CREATE INDEX i ON auth (x)",
            "CREATE INDEX j ON auth (upper(x)) WHERE x > ''",
            rows("auth", 1000, f"{SECRET} || i"),
            "ANALYZE",
        ],
        1000,
    ),
    "wal": (
        ["PRAGMA journal_mode = WAL", "CREATE TABLE auth (x)", rows("auth", 500, SECRET)],
        500,
    ),
    "rows that were longer once": (
        [
            "PRAGMA secure_delete = OFF",
            "CREATE TABLE auth (id INTEGER PRIMARY KEY, x, y)",
            rows("auth", 1000, f"i, {SECRET}, 1"),
            "UPDATE auth SET y = hex(zeroblob(80))",
        ],
        1000,
    ),
    "pages that were let go": (
        [
            "PRAGMA secure_delete = OFF",
            "CREATE TABLE auth (x)",
            rows("auth", 5000, f"{SECRET} || i"),
            "DELETE FROM auth WHERE rowid > 10",
        ],
        10,
    ),
    "auto-vacuum": (
        [
            "PRAGMA auto_vacuum = FULL",
            "CREATE TABLE auth (x)",
            rows("auth", 500, SECRET),
            "CREATE TABLE z (x)",
        ],
        500,
    ),
    "foreign keys": (
        [
            "PRAGMA foreign_keys = ON",
            "CREATE TABLE auth (id INTEGER PRIMARY KEY, x)",
            "CREATE TABLE child (auth REFERENCES auth (id) ON DELETE CASCADE)",
            rows("auth", 10, f"i, {SECRET}"),
            "INSERT INTO child VALUES (1)",
        ],
        10,
    ),
    "small pages": (
        [
            "PRAGMA page_size = 512",
            "CREATE TABLE auth (x)",
            rows("auth", 300, f"{SECRET} || zeroblob(i * 9)"),
        ],
        300,
    ),
}


@pytest.mark.parametrize(("statements", "count"), SECRETS.values(), ids=SECRETS.keys())
def test_no_byte_of_the_rows_is_left_in_the_copy(copy: Path, statements: list[str], count: int) -> None:
    run_sql(copy, *statements, "CREATE TABLE notes (x)", "INSERT INTO notes VALUES ('a note')")
    before = dump_of(copy)
    header = copy.read_bytes()[:28]
    assert needles(copy) > 0
    assert empty_tables(copy, ["auth"]) == {"auth": count}
    assert needles(copy) == 0
    expected = [line for line in before.splitlines() if not line.startswith("INSERT INTO auth ")]
    assert dump_of(copy).splitlines() == expected  # schema, statistics and all other rows
    after = copy.read_bytes()[:28]
    assert (after[:24], sorted(copy.parent.glob(f"{copy.name}-*"))) == (header[:24], [])
    with closing(sqlite3.connect(f"file:{copy}?mode=ro&immutable=1", uri=True)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_collation_that_only_the_agent_knows_is_no_reason_to_keep_rows(copy: Path) -> None:
    run_sql(
        copy,
        "CREATE TABLE auth (x)",
        rows("auth", 100, SECRET),
        "CREATE INDEX i ON auth (x)",
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_schema SET sql = 'CREATE INDEX i ON auth (x COLLATE mine)' WHERE name = 'i'",
    )
    assert empty_tables(copy, ["auth"]) == {"auth": 100}
    assert needles(copy) == 0


def test_no_word_of_a_full_text_table_is_left_in_its_index(copy: Path) -> None:
    run_sql(copy, "CREATE VIRTUAL TABLE auth USING fts5 (x)", "INSERT INTO auth VALUES ('hunterseventeen')")
    assert b"hunterseventeen" in copy.read_bytes()
    assert empty_tables(copy, ["auth"]) == {"auth": 1}
    assert b"hunterseventeen" not in copy.read_bytes()
    with closing(sqlite3.connect(copy)) as connection:
        connection.execute("INSERT INTO auth VALUES ('another')")
        assert connection.execute("SELECT x FROM auth WHERE auth MATCH 'another'").fetchall() == [
            ("another",)
        ]


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE auth (x)",
        'create table if not exists "auth" (x)',
        "CREATE TABLE [auth](x)",
        "CREATE VIRTUAL TABLE auth USING fts5 (x)",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16le", "utf-16be"])
def test_tables_are_found_in_the_raw_bytes_of_what_cannot_be_opened(
    tmp_path: Path, statement: str, encoding: str
) -> None:
    path = tmp_path / "raw"
    for start in (0, (1 << 20) - 20):  # also where two readings meet
        path.write_bytes(bytes(start) + statement.encode(encoding) + bytes(100))
        assert tables_in_raw_bytes(path, ["AUTH", "nothing"]) == {"auth"}
        assert tables_in_raw_bytes(path, ["aut"]) == set()
    path.write_bytes(b"nothing is made here")
    assert tables_in_raw_bytes(path, ["*"]) is None


def test_every_other_page_is_as_it_was(copy: Path) -> None:
    """So that what is between rows, rowids and the order of pages are the agent's."""
    run_sql(
        copy,
        "CREATE TABLE notes (x)",
        "CREATE TABLE auth (x)",
        "CREATE INDEX by_x ON notes (x)",
        rows("notes", 2000, "'note ' || i"),
        rows("auth", 2000, f"{SECRET} || i"),
        "DELETE FROM notes WHERE rowid % 3 = 0",  # rowids that a VACUUM would give anew
    )
    layout = "SELECT pageno FROM dbstat WHERE name != 'auth' ORDER BY pageno"
    listed = subprocess.run(["sqlite3", copy, layout], capture_output=True, text=True, check=True)
    pages = list(map(int, listed.stdout.split()))
    assert len(pages) > 10
    with closing(sqlite3.connect(copy)) as connection:
        rowids = connection.execute("SELECT rowid, x FROM notes ORDER BY rowid").fetchall()
    before = copy.read_bytes()
    empty_tables(copy, ["auth"])
    after = copy.read_bytes()
    assert len(after) == len(before)
    changed = [n for n in pages if before[(n - 1) * 4096 : n * 4096] != after[(n - 1) * 4096 : n * 4096]]
    assert changed == [1]
    assert before[100:4096] == after[100:4096]  # of the first only the header: change counter, free pages
    with closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("SELECT rowid, x FROM notes ORDER BY rowid").fetchall() == rowids


def test_triggers_do_not_run_and_are_still_there(copy: Path) -> None:
    run_sql(
        copy,
        'CREATE TABLE "Auth" (x)',
        "CREATE TABLE spill (x)",
        "CREATE TABLE notes (x)",
        'CREATE TRIGGER t1 AFTER DELETE ON "Auth" BEGIN INSERT INTO spill VALUES (old.x); END',
        'CREATE TRIGGER "t \'2"" " BEFORE DELETE ON AUTH BEGIN SELECT raise(ABORT, \'never\'); END',
        "CREATE TRIGGER t3 AFTER DELETE ON notes BEGIN INSERT INTO spill VALUES (1); END",
        f'INSERT INTO "Auth" SELECT {SECRET} UNION ALL SELECT {SECRET}',
        "CREATE TRIGGER t4 AFTER INSERT ON auth WHEN new.x = ';' BEGIN SELECT no_such_function(); END",
    )
    schema = "SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY name"
    with closing(sqlite3.connect(copy)) as connection:
        before = connection.execute(schema).fetchall()
    assert empty_tables(copy, ["auth"]) == {"Auth": 2}
    assert needles(copy) == 0
    with closing(sqlite3.connect(copy)) as connection:
        assert connection.execute(schema).fetchall() == before
        assert connection.execute("SELECT count(*) FROM spill").fetchone() == (0,)


def test_which_tables_is_a_matter_of_globs_in_any_case(copy: Path) -> None:
    names = ["auth_profiles", "AUTH_TOKENS", "author", 'auth"quoted', "[auth]", "sessions", "Key Ring"]
    for name in names:
        quoted = name.replace('"', '""')
        run_sql(copy, f'CREATE TABLE "{quoted}" (x)', f'INSERT INTO "{quoted}" VALUES (1)')
    run_sql(copy, "CREATE VIEW auth_view AS SELECT 1", "CREATE INDEX auth_index ON sessions (x)")
    assert empty_tables(copy, ["Auth_*", 'auth"*', "*ring", "[[]auth]", "none"]) == dict.fromkeys(
        ("auth_profiles", "AUTH_TOKENS", 'auth"quoted', "Key Ring", "[auth]"), 1
    )
    assert empty_tables(copy, ["auth_*"]) == {"auth_profiles": 0, "AUTH_TOKENS": 0}


def test_the_numbers_that_were_given_stay_given(copy: Path) -> None:
    """AUTOINCREMENT goes on where it was: a restored agent gives no number twice."""
    run_sql(copy, "CREATE TABLE auth (id INTEGER PRIMARY KEY AUTOINCREMENT, x)", rows("auth", 7, "i, 'x'"))
    empty_tables(copy, ["auth"])
    run_sql(copy, "INSERT INTO auth (x) VALUES ('y')")
    assert "INSERT INTO auth VALUES(8,'y');" in dump_of(copy)


def test_a_virtual_table_with_all_its_shadows_is_emptied(copy: Path) -> None:
    run_sql(copy, "CREATE VIRTUAL TABLE auth USING fts5(x)", f"INSERT INTO auth VALUES ({SECRET})")
    assert empty_tables(copy, ["auth*"])["auth"] == 1
    assert copy.read_bytes().count(b"topsecret") == 0


def test_the_live_database_is_not_touched(pinned: Pinned, room: Path) -> None:
    path = pinned.root / "a.sqlite"
    run_sql(path, "CREATE TABLE auth (x)", rows("auth", 500, SECRET), "CREATE TABLE t (x)")
    os.utime(path, ns=(1, 1_700_000_000_000_000_000))
    before = (digests(path), path.stat().st_mtime_ns, path.stat().st_size)
    pinned.pin("a.sqlite")
    copies = DatabaseCopies(room, CopyOptions(secret_tables=("auth",)))
    copies.copy_pinned(pinned.databases, held_since=time.monotonic())
    assert copies.done["a.sqlite"].emptied == {"auth": 500}
    assert needles(copies.done["a.sqlite"].file) == 0
    assert (digests(path), path.stat().st_mtime_ns, path.stat().st_size) == before
    assert [name.name for name in room.iterdir()] == ["000001"]  # no sidecar, no journal


def test_a_copy_that_comes_late_is_emptied_too(pinned: Pinned, room: Path) -> None:
    pinned.add("a.sqlite", *LARGE, "CREATE TABLE auth (x)", rows("auth", 500, SECRET))
    copies = DatabaseCopies(room, CopyOptions(rollback_pin_seconds=0.0, secret_tables=("auth",)))
    copies.copy_pinned(pinned.databases, held_since=time.monotonic())
    copies.copy_rest(pinned.databases)
    assert copies.done["a.sqlite"].emptied == {"auth": 500}
    assert needles(copies.done["a.sqlite"].file) == 0


# --- what is wrong with a copy ----------------------------------------------------------------------------


def with_unknown_module(copy: Path) -> None:
    run_sql(copy, "CREATE TABLE notes (x)", rows("notes", 2000, "'note ' || i"))
    run_sql(
        copy,
        "PRAGMA writable_schema = ON",
        "INSERT INTO sqlite_schema VALUES ('table', 'vec', 'vec', 0,"
        " 'CREATE VIRTUAL TABLE vec USING vec0(embedding float[3])')",
    )


def with_unknown_collation(copy: Path) -> None:
    with closing(sqlite3.connect(copy, isolation_level=None)) as connection:
        connection.create_collation("icu", lambda a, b: (a > b) - (a < b))
        connection.execute("CREATE TABLE names (x COLLATE icu)")
        connection.execute("CREATE INDEX by_x ON names (x)")
        connection.execute("INSERT INTO names VALUES ('b'), ('a')")
        connection.execute("CREATE TABLE notes (x)")
        connection.execute(rows("notes", 2000, "'note ' || i"))


def with_unknown_function(copy: Path) -> None:
    with closing(sqlite3.connect(copy, isolation_level=None)) as connection:
        connection.create_function("fold", 1, lambda x: x, deterministic=True)
        connection.execute("CREATE TABLE names (x, CHECK (fold(x) != ''))")
        connection.execute("CREATE INDEX by_x ON names (fold(x))")
        connection.execute("INSERT INTO names VALUES ('b'), ('a')")
        connection.execute("CREATE TABLE notes (x)")
        connection.execute(rows("notes", 2000, "'note ' || i"))


@pytest.mark.parametrize("make", [with_unknown_module, with_unknown_collation, with_unknown_function])
def test_what_only_the_application_knows_is_no_damage_and_hides_none(copy: Path, make: object) -> None:
    assert callable(make)
    make(copy)
    check_copy(copy)
    with closing(sqlite3.connect(copy)) as connection:
        (root_page,) = connection.execute(
            "SELECT rootpage FROM sqlite_schema WHERE name = 'notes'"
        ).fetchone()
    with copy.open("r+b") as stream:
        stream.seek((root_page - 1) * 4096)
        stream.write(b"\xff" * 64)
    with pytest.raises(DatabaseUnreadable) as raised:
        check_copy(copy)
    assert "corrupt" in raised.value.hint


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:5000], id="cut-short"),
        pytest.param(lambda data: data[:4096] + bytes(4096) + data[8192:], id="zeroed"),
        pytest.param(lambda data: data[:100] + b"\xff" * 100 + data[200:], id="schema"),
        pytest.param(lambda data: data[:16] + b"\x00\x03" + data[18:], id="page-size"),
        pytest.param(lambda data: b"no database" * 1000, id="text"),
    ],
)
def test_damage_is_found(copy: Path, damage: object) -> None:
    assert callable(damage)
    run_sql(copy, "CREATE TABLE notes (x)", rows("notes", 2000, "'note ' || i"))
    check_copy(copy)
    copy.write_bytes(damage(copy.read_bytes()))
    with pytest.raises(DatabaseUnreadable) as raised:
        check_copy(copy)
    assert raised.value.hint
    assert sorted(copy.parent.glob(f"{copy.name}-*")) == []
