"""Tables that hold secrets: emptied in a private copy so that no byte of their rows is left, and looked for
in the raw bytes of a database that cannot be opened.

The live database is none of this module's business. What it leaves: gaps in pages that other tables have
taken over since may hold bytes of rows that were deleted long ago.
"""

from __future__ import annotations

import re
import sqlite3
import struct
from collections.abc import Iterable
from contextlib import closing
from fnmatch import fnmatchcase
from pathlib import Path

from daemon.capture.sqlite import DatabaseUnreadable


def empty_tables(copy: Path, patterns: Iterable[str]) -> dict[str, int]:
    """Take all rows out of the tables of a private copy that match one of `patterns` (globs, in any case),
    and overwrite where they were; how many rows each of them had.

    The rest of the pages stays as it is. Raises DatabaseUnreadable.
    """
    counts: dict[str, int] = {}
    try:
        with closing(sqlite3.connect(copy, isolation_level=None)) as connection:
            connection.execute("PRAGMA trusted_schema=OFF")
            connection.execute("PRAGMA secure_delete=ON")
            for table in _tables_like(connection, patterns):
                counts[table] = _empty_table(connection, table)
        if counts:
            _zero_free_pages(copy)
    except (sqlite3.Error, sqlite3.Warning) as exc:  # a warning: two statements where one should be
        raise DatabaseUnreadable(
            f"its tables that hold secrets cannot be emptied in the copy: {exc}",
            hint="leave the database out with `exclude`, or those tables in, without `secret_tables`",
        ) from exc
    return counts


def _zero_free_pages(copy: Path) -> None:
    """Overwrite what is left of rows that the agent deleted before, without `secure_delete`.

    The list is sound: the copy has passed its check. Source: https://sqlite.org/fileformat2.html#the_freelist.
    """
    with copy.open("r+b") as stream:
        header = stream.read(100)
        page_bytes = int.from_bytes(header[16:18], "big")
        page_bytes = 65536 if page_bytes == 1 else page_bytes
        trunk = int.from_bytes(header[32:36], "big")
        while trunk:
            start = (trunk - 1) * page_bytes
            stream.seek(start)
            page = stream.read(page_bytes)
            trunk, count, *leaves = struct.unpack(f">{len(page) // 4}I", page)
            stream.seek(start + 8 + 4 * count)
            stream.write(bytes(page_bytes - 8 - 4 * count))
            for leaf in leaves[:count]:
                stream.seek((leaf - 1) * page_bytes)
                stream.write(bytes(page_bytes))


def _tables_like(connection: sqlite3.Connection, patterns: Iterable[str]) -> list[str]:
    names = [row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
    return sorted(_matching(names, patterns))


def _matching(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    lowered = [pattern.lower() for pattern in patterns]
    return {name for name in names if any(fnmatchcase(name.lower(), pattern) for pattern in lowered)}


_CREATES_TABLE = re.compile(
    rb"""CREATE\s+(?:VIRTUAL\s+)?TABLE\s+(?:IF\s+NOT\s+EXISTS\s+)?"""
    rb"""(?:"([^"]{1,200})"|'([^']{1,200})'|`([^`]{1,200})`|\[([^\]]{1,200})\]|([^\s("'`\[]{1,200}))""",
    re.IGNORECASE,
)
_RAW_CHUNK_BYTES = 1 << 20
_LONGEST_STATEMENT_HEAD_BYTES = 512


def tables_in_raw_bytes(file: Path, patterns: Iterable[str]) -> set[str] | None:
    """The tables matching one of `patterns` whose making is spelled out in a database that cannot be opened,
    or in its sidecar; None if no table's making is. Raises OSError."""
    names: set[str] = set()
    tail = b""
    with file.open("rb") as stream:
        while chunk := stream.read(_RAW_CHUNK_BYTES):
            # Without NULs UTF-16 reads as ASCII does, as far as names are.
            found = _CREATES_TABLE.findall((tail + chunk).replace(b"\0", b""))
            names.update(b"".join(groups).decode("utf-8", "replace") for groups in found)
            tail = chunk[-_LONGEST_STATEMENT_HEAD_BYTES:]
    return _matching(names, patterns) if names else None


def _empty_table(connection: sqlite3.Connection, table: str) -> int:
    triggers = connection.execute(
        "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger' AND tbl_name = ? COLLATE NOCASE", (table,)
    ).fetchall()
    quoted = _quoted(table)
    connection.execute("BEGIN")
    for name, _ in triggers:  # the agent's own code has no business in here
        connection.execute(f"DROP TRIGGER {_quoted(name)}")
    removed = connection.execute(f"DELETE FROM {quoted}").rowcount  # noqa: S608  of the schema
    for _, sql in triggers:
        connection.execute(sql)
    for samples in _tables_like(connection, ("sqlite_stat[34]",)):  # of what its indexes hold
        connection.execute(f"DELETE FROM {samples} WHERE tbl = ? COLLATE NOCASE", (table,))  # noqa: S608
    connection.execute("COMMIT")
    if _is_full_text(connection, table):  # what was deleted is only marked in its index
        connection.execute(f"INSERT INTO {quoted}({quoted}) VALUES ('rebuild')")  # noqa: S608
    return removed


def _is_full_text(connection: sqlite3.Connection, table: str) -> bool:
    (sql,) = connection.execute("SELECT sql FROM sqlite_schema WHERE name = ?", (table,)).fetchone()
    return (
        re.match(r"CREATE\s+VIRTUAL\s+TABLE.*?USING\s+fts[345]\b", sql, re.IGNORECASE | re.DOTALL) is not None
    )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
