"""What a crashed writer left: its hot journal is rolled back in a copy, as SQLite itself would do it."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from daemon.capture import Capture, take_cut
from daemon.capture.sqlite import CrashedDatabase, LiveDatabase, open_database
from daemon.model import AgentSpec, StateSource

PAGE_BYTES = 1024
JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")

CRASH = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA cache_size = 1")
db.execute("BEGIN")
db.execute("UPDATE facts SET body = body || 'changed'")
db.execute("INSERT INTO facts SELECT NULL, 'new' || body FROM facts")
os._exit(9)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    root = tmp_path / "ana"
    root.mkdir()
    path = root / "facts.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        connection.execute("CREATE TABLE facts (id INTEGER PRIMARY KEY, body TEXT)")
        connection.executemany("INSERT INTO facts (body) VALUES (?)", [("x" * 200,)] * 100)
        connection.execute("PRAGMA user_version = 7")
        connection.commit()
    return path


def crash(path: Path) -> Path:
    """Kill a writer after it wrote to the database and before it committed; its journal."""
    subprocess.run([sys.executable, "-c", CRASH, path], check=False)
    journal = Path(f"{path}-journal")
    assert journal.stat().st_size > 512
    return journal


def captured(path: Path, **fields: object) -> Capture:
    scratch = path.parent.with_name("scratch")
    scratch.mkdir()
    return take_cut(AgentSpec("default", "ana", path.parent, ("**",), **fields), scratch)  # type: ignore[arg-type]


def content(capture: Capture, name: str) -> bytes:
    (artifact,) = [artifact for artifact in capture.artifacts if artifact.path_in_bundle == name]
    with artifact.open() as stream:
        return stream.read()


def as_sqlite_recovers(path: Path, elsewhere: Path) -> list[tuple[int, str]]:
    """The rows that SQLite finds after its own rollback, in copies of the files."""
    elsewhere.mkdir()
    for name in (path.name, f"{path.name}-journal"):
        shutil.copy(path.parent / name, elsewhere / name)
    return rows(elsewhere / path.name)


def rows(path: Path) -> list[tuple[int, str]]:
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return connection.execute("SELECT id, body FROM facts ORDER BY id").fetchall()


def test_a_hot_journal_is_rolled_back_in_the_copy_to_the_byte(path: Path, tmp_path: Path) -> None:
    committed = path.read_bytes()
    journal = crash(path)
    left = path.read_bytes(), journal.read_bytes()
    assert left[0] != committed
    capture = captured(path)
    assert capture.failures == []
    assert capture.consistency.level == "point_in_time"
    assert but_counters(content(capture, "sqlite/facts.sqlite")) == but_counters(committed)
    assert capture.schema_versions == {"sqlite/facts.sqlite": 7}
    assert (path.read_bytes(), journal.read_bytes()) == left
    assert {artifact.path_in_bundle for artifact in capture.artifacts} == {"sqlite/facts.sqlite"}


def but_counters(database: bytes) -> bytes:
    """Without how often it was changed, which any connection that writes counts anew (fileformat2, 1.3)."""
    return database[:24] + database[28:92] + database[96:]


def test_a_state_value_is_read_from_what_was_rolled_back(path: Path) -> None:
    crash(path)
    query = "SELECT count(*) AS rows FROM facts"
    capture = captured(path, states=(StateSource("count", sqlite=path, query=query),))
    assert capture.failures == []
    assert content(capture, "state/count.json").split() == b'[ { "rows": 100 } ]'.split()


def name_super_journal(journal: Path, name: Path) -> None:
    """As a transaction over several databases ends each of their journals."""
    encoded = str(name).encode()
    lock_page = 0x40000000 // PAGE_BYTES + 1
    record = lock_page.to_bytes(4, "big") + encoded + len(encoded).to_bytes(4, "big")
    record += sum(encoded).to_bytes(4, "big") + JOURNAL_MAGIC
    with journal.open("ab") as stream:
        stream.write(record)


def test_a_transaction_over_several_databases_that_was_committed_stays(path: Path, tmp_path: Path) -> None:
    """Its super-journal is gone: that is the commit, and the journals beside the databases mean nothing."""
    journal = crash(path)
    name_super_journal(journal, path.with_name("super-journal"))
    expected = as_sqlite_recovers(path, tmp_path / "elsewhere")
    left = path.read_bytes(), journal.read_bytes()
    (tmp_path / "copy").write_bytes(content(captured(path), "sqlite/facts.sqlite"))
    assert (path.read_bytes(), journal.read_bytes()) == left
    assert rows(tmp_path / "copy") == expected
    assert expected[0][1].endswith("changed")


def test_a_transaction_over_several_databases_that_was_not_committed_is_rolled_back(
    path: Path, tmp_path: Path
) -> None:
    committed = rows(path)
    journal = crash(path)
    super_journal = path.parent.with_name("super-journal")  # outside, so that it is no file of the agent
    super_journal.write_bytes(f"{journal}\0".encode())
    name_super_journal(journal, super_journal)
    (tmp_path / "copy").write_bytes(content(captured(path), "sqlite/facts.sqlite"))
    assert rows(tmp_path / "copy") == committed
    assert super_journal.read_bytes() == f"{journal}\0".encode()
    assert journal.exists()


def test_a_writer_that_comes_back_makes_a_live_database_of_it_again(path: Path, tmp_path: Path) -> None:
    crash(path)
    database = open_database(path, tmp_path)
    assert isinstance(database, CrashedDatabase)
    before = database.reading()
    assert before == database.reading()
    assert not database.is_outdated()
    subprocess.run(["sqlite3", path, "INSERT INTO facts (body) VALUES ('back')"], check=True)
    assert database.reading() != before
    assert database.is_outdated()
    database.close()
    with closing(open_database(path, tmp_path)) as live:
        assert isinstance(live, LiveDatabase)


def test_a_writer_that_crashes_meanwhile_makes_a_live_database_one_to_be_opened_anew(
    path: Path, tmp_path: Path
) -> None:
    with closing(open_database(path, tmp_path)) as database:
        assert not database.is_outdated()
        crash(path)
        assert database.is_outdated()


def test_a_journal_that_is_damaged_is_named_and_its_bytes_are_kept(path: Path) -> None:
    journal = crash(path)
    with journal.open("r+b") as stream:  # its first page record, and so its checksum
        stream.seek(512 + 4)
        stream.write(bytes(PAGE_BYTES))
    with path.open("r+b") as stream:
        stream.seek(PAGE_BYTES)
        stream.write(b"\xff" * PAGE_BYTES)
    capture = captured(path)
    assert not capture.is_complete
    (failure,) = capture.failures
    assert failure.source == str(path)
    assert set(failure.kept_as) == {"opaque/facts.sqlite", "opaque/facts.sqlite-journal"}
    assert content(capture, "opaque/facts.sqlite-journal") == journal.read_bytes()
