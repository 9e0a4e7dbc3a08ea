"""sqlite-vec and FTS5 through apsw: a vec0 table, which nobody can read without the extension."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import apsw
import sqlite_vec

_DIMENSIONS = 16


@contextmanager
def opened(root: Path) -> Iterator[apsw.Connection]:
    root.mkdir(exist_ok=True)
    with closing(apsw.Connection(str(root / "vectors.db"))) as connection:
        connection.enable_load_extension(True)
        connection.load_extension(sqlite_vec.loadable_path())
        connection.enable_load_extension(False)
        yield connection


def write(connection: apsw.Connection) -> None:
    chance = random.Random(11)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(
        f"CREATE VIRTUAL TABLE memories USING vec0(id INTEGER PRIMARY KEY, vector float[{_DIMENSIONS}],"
        " kind TEXT PARTITION KEY, +text TEXT)"
    )
    connection.execute("CREATE VIRTUAL TABLE words USING fts5(text)")
    with connection:
        for number in range(300):
            vector = sqlite_vec.serialize_float32([chance.random() for _ in range(_DIMENSIONS)])
            text = f"memory number {number}"
            row = (number, vector, "fact" if number % 2 else "dream", text)
            connection.execute("INSERT INTO memories VALUES (?, ?, ?, ?)", row)
            connection.execute("INSERT INTO words VALUES (?)", (text,))


def read(connection: apsw.Connection) -> dict[str, Any]:
    question = sqlite_vec.serialize_float32([0.5] * _DIMENSIONS)
    nearest = "SELECT id, distance, text FROM memories WHERE vector MATCH ? AND k = 7 AND kind = ?"
    return {
        "all": list(
            connection.execute("SELECT id, vec_to_json(vector), kind, text FROM memories ORDER BY id")
        ),
        "facts": list(connection.execute(nearest, (question, "fact"))),
        "dreams": list(connection.execute(nearest, (question, "dream"))),
        "words": list(connection.execute("SELECT rowid, text FROM words WHERE words MATCH '77 OR 99'")),
        "integrity": connection.pragma("integrity_check"),
    }
