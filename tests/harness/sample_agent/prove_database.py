"""Judges one restored database: sound, whole transactions only, every row as it was written.

Works on a connection to a copy; the restored file itself is never opened by SQLite.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import Any

from tests.harness.sample_agent import content, layout, rows
from tests.harness.sample_agent.content import Row
from tests.harness.sample_agent.journal import Journal
from tests.harness.sample_agent.layout import Database
from tests.harness.sample_agent.verdicts import ChangedContent, MissingContent, TornTransaction

_WAL_SUFFIX = "-wal"  # the only sidecar that carries content


@contextmanager
def opened_copy(path: Path, scratch: Path) -> Iterator[sqlite3.Connection]:
    """A connection to a copy of the database, WAL included, that is gone afterwards."""
    if not path.exists():
        raise MissingContent(f"{path}: not there")
    copy = scratch / path.name
    wal = path.with_name(path.name + _WAL_SUFFIX)
    shutil.copyfile(path, copy)
    if wal.exists():
        shutil.copyfile(wal, copy.with_name(copy.name + _WAL_SUFFIX))
    connection = sqlite3.connect(copy, isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()
        for left in scratch.glob(f"{copy.name}*"):
            left.unlink()


def check(connection: sqlite3.Connection, database: Database, journal: Journal) -> tuple[int, int]:
    """Returns the database's counter and how many rows were compared. Raises ProofError."""
    try:
        _check_integrity(connection, database)
        counter = _check_transactions(connection, database)
        row_count = _compare_rows(connection, database, journal, last_round=counter)
        if database.indexed_column is not None:
            _check_full_text(connection, database, last_round=counter)
    except sqlite3.DatabaseError as exc:
        raise ChangedContent(f"{database.name}: SQLite cannot read it: {exc}") from exc
    return counter, row_count


def newest_dream_run(connection: sqlite3.Connection, *, agent_id: str) -> dict[str, Any]:
    cursor = connection.execute(layout.DREAM_RUN_QUERY, {"agent": agent_id})
    names = [column[0] for column in cursor.description]
    return dict(zip(names, cursor.fetchone(), strict=True))


def _check_integrity(connection: sqlite3.Connection, database: Database) -> None:
    problems = [row[0] for row in connection.execute("PRAGMA integrity_check")]
    if problems != ["ok"]:
        raise ChangedContent(f"{database.name}: integrity_check: {'; '.join(problems[:3])}")


def _check_transactions(connection: sqlite3.Connection, database: Database) -> int:
    """Each round is there with all its rows, or not at all; returns the last."""
    (head,) = connection.execute("SELECT round FROM head").fetchone()
    promised = dict(connection.execute("SELECT round, row_count FROM rounds ORDER BY round").fetchall())
    found = dict(
        connection.execute(f"SELECT round, count(*) FROM {database.table} GROUP BY round").fetchall()
    )
    if list(promised) != list(range(head + 1)):
        raise TornTransaction(
            f"{database.name}: head is at round {head}, transactions end at {max(promised)}"
        )
    for round_number in sorted(promised.keys() | found.keys()):
        expected, present = promised.get(round_number, 0), found.get(round_number, 0)
        if expected != present:
            raise TornTransaction(f"{database.name}: round {round_number} has {present} of {expected} rows")
    return int(head)


def _compare_rows(
    connection: sqlite3.Connection, database: Database, journal: Journal, *, last_round: int
) -> int:
    """Base rows against the seed, the rows of each round against the journal and their own checksum."""
    digests = journal.digests(database.name)
    checksums = dict(connection.execute("SELECT round, rows_digest FROM rounds"))
    stored: Iterator[Row] = connection.execute(f"SELECT * FROM {database.table} ORDER BY id")
    row_count = 0
    for round_number, of_round in groupby(stored, key=itemgetter(1)):
        if round_number == 0:
            row_count += _compare_base_rows(of_round, database, journal)
            continue
        batch = list(of_round)
        row_count += len(batch)
        if content.digest_of_rows(batch) != checksums[round_number]:
            raise ChangedContent(f"{database.name}: round {round_number} does not match its own checksum")
        if tuple(content.digest_of_row(row) for row in batch) != digests.get(round_number):
            raise ChangedContent(f"{database.name}: round {round_number} is not in the journal like this")
    if last_round > max(digests, default=0):
        raise ChangedContent(f"{database.name}: at round {last_round}, which was never written")
    return row_count


def _compare_base_rows(stored: Iterator[Row], database: Database, journal: Journal) -> int:
    expected = rows.base_rows(database, seed=journal.seed, size_mb=journal.size_mb)
    row_count = 0
    for found, written in zip_longest(stored, expected):
        if found is None:
            raise MissingContent(f"{database.name}: row {row_count + 1} of the base is not there")
        if found != written:
            raise ChangedContent(f"{database.name}: row {row_count + 1} was not written like this")
        row_count += 1
    return row_count


def _check_full_text(connection: sqlite3.Connection, database: Database, *, last_round: int) -> None:
    """The index agrees with itself, has every row, and finds the newest by a word of theirs."""
    index = rows.fts_table(database)
    connection.execute(f"INSERT INTO {index}({index}) VALUES ('integrity-check')")
    (indexed,) = connection.execute(f"SELECT count(*) FROM {index}").fetchone()
    (present,) = connection.execute(f"SELECT count(*) FROM {database.table}").fetchone()
    if indexed != present:
        raise TornTransaction(
            f"{database.name}: {indexed} rows in the full-text index, {present} in the table"
        )
    found = connection.execute(f"SELECT rowid FROM {index} WHERE {index} MATCH ?", (f"mark{last_round}",))
    of_round = connection.execute(f"SELECT id FROM {database.table} WHERE round = ?", (last_round,))
    if {row[0] for row in found} != {row[0] for row in of_round}:
        raise TornTransaction(
            f"{database.name}: the full-text index does not find the rows of round {last_round}"
        )
