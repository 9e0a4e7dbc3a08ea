"""The rows of a round, made again from the seed whenever somebody needs them, and the tables they lie in.

No file of the agent is opened here: connections come from the caller.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

from tests.harness.sample_agent import content, layout
from tests.harness.sample_agent.content import Row
from tests.harness.sample_agent.layout import Database

_ROW_OVERHEAD_BYTES = 24


def rows_of_round(database: Database, *, seed: int, round_number: int, first_id: int) -> list[Row]:
    random = content.random_for(seed, database.name, round_number)
    low, high = database.rows_per_round
    return [
        (first_id + position, round_number, *database.values(random, round_number, position))
        for position in range(random.randint(low, high))
    ]


def base_rows(database: Database, *, seed: int, size_mb: float) -> Iterator[Row]:
    """What the table held before the first round, as ids 1, 2, ...; never all of it in memory."""
    random = content.random_for(seed, database.name, "base")
    budget_bytes = layout.Sizes.of(size_mb).database_bytes(database) / database.page_overhead
    minimum_rows = layout.REGISTRY_BASE_ROWS
    position, written_bytes = 0, 0
    while position < minimum_rows or written_bytes < budget_bytes:
        values = database.values(random, 0, position)
        position += 1
        written_bytes += _size_bytes(values)
        yield (position, 0, *values)


def create_tables(connection: sqlite3.Connection, database: Database) -> None:
    columns = ", ".join(("id INTEGER PRIMARY KEY", "round INTEGER", *database.columns))
    connection.execute(f"CREATE TABLE {database.table} ({columns})")
    connection.execute("CREATE TABLE rounds (round INTEGER PRIMARY KEY, row_count INTEGER, rows_digest TEXT)")
    connection.execute("CREATE TABLE head (id INTEGER PRIMARY KEY CHECK (id = 1), round INTEGER)")
    connection.execute("INSERT INTO head VALUES (1, 0)")
    if database.indexed_column is not None:
        connection.execute(
            f"CREATE VIRTUAL TABLE {fts_table(database)} USING fts5({database.indexed_column})"
        )


def insert_rows(connection: sqlite3.Connection, database: Database, rows: list[Row]) -> None:
    marks = ", ".join("?" * (2 + len(database.columns)))
    connection.executemany(f"INSERT INTO {database.table} VALUES ({marks})", rows)
    if database.indexed_column is not None:
        position = 2 + _column_names(database).index(database.indexed_column)
        connection.executemany(
            f"INSERT INTO {fts_table(database)}(rowid, {database.indexed_column}) VALUES (?, ?)",
            [(row[0], row[position]) for row in rows],
        )


def fts_table(database: Database) -> str:
    return f"{database.table}_fts"


def _column_names(database: Database) -> list[str]:
    return [column.split()[0] for column in database.columns]


def _size_bytes(values: Row) -> int:
    sized = sum(len(value) if isinstance(value, str | bytes) else 8 for value in values)
    return sized + _ROW_OVERHEAD_BYTES
