"""One counter in many stores, each of another kind, raised store after store in the order of `STORES`.

So the agent's state at any instant is known by its shape: a prefix of the stores is at n + 1 and the rest
at n. Whatever is not of that shape is a mixture of several instants.

Every store can tell a whole value from a torn one: each transaction of a database writes to many pages,
each line of the log and each version of the cursor is JSON, each commit holds its counter twice.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from tests.harness.sample_agent.builder import run_git

MEMDIR = "memory"
NOTE = "counter.md"
LOG = "sessions/counter.jsonl"
CHATTER = "sessions/chatter.jsonl"
CURSOR = "state/cursor.json"
DATABASES = tuple(f"db/{name}.sqlite" for name in "abcd")
STORES = (DATABASES[0], LOG, DATABASES[1], "note", "commit", DATABASES[2], CURSOR, DATABASES[3])
"""The order in which the counter is raised."""

BYSTANDERS = tuple(f"db/bystander-{number}.sqlite" for number in range(30))
"""Databases that nobody writes to: to open, read and pin them makes a snapshot's window longer."""

_BALLAST_ROWS = 12
_ROW_BYTES = 3000
_LOOSE_OBJECTS_BEFORE_GC = 300

Pause = Callable[[], None]


class Store(Protocol):
    def value(self) -> int:
        """The counter, 0 before it was raised for the first time."""

    def raise_to(self, counter: int) -> None:
        """Write the counter, as software of this store's kind writes. Raises what refuses it."""

    def close(self) -> None: ...


def open_stores(
    root: Path, *, journal_mode: str, busy_seconds: float, pause: Pause, only_databases: bool = False
) -> dict[str, Store]:
    """The stores of the agent at `root`, made or brought in order after a crash; by name, in order.

    pause: called in the middle of a transaction and of a line, so that a kill meets them half done.
    """
    for directory in (MEMDIR, "sessions", "state", "db"):
        (root / directory).mkdir(parents=True, exist_ok=True)
    databases: dict[str, Store] = {
        name: Database(root / name, journal_mode=journal_mode, busy_seconds=busy_seconds, pause=pause)
        for name in DATABASES
    }
    if only_databases:
        return databases
    others: dict[str, Store] = {
        LOG: Log(root / LOG, pause=pause),
        "note": Document(root / MEMDIR / NOTE),
        "commit": Commit(root / MEMDIR),
        CURSOR: Document(root / CURSOR),
    }
    return {name: databases.get(name) or others[name] for name in STORES}


def make_bystanders(root: Path) -> None:
    for name in BYSTANDERS:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("CREATE TABLE quiet (value INTEGER)")


def is_an_instant(values: Sequence[int]) -> bool:
    """Whether the stores, in their order, can have had these values at one time."""
    falls = [before - after for before, after in pairwise(values)]
    return set(falls) <= {0, 1} and sum(falls) <= 1


class Database:
    """Each transaction writes to more pages than SQLite's cache holds here, so that they reach the database
    (or its WAL) before the commit does: a kill then leaves a hot journal."""

    def __init__(self, path: Path, *, journal_mode: str, busy_seconds: float, pause: Pause) -> None:
        self._pause = pause
        self._connection = sqlite3.connect(path, timeout=busy_seconds, isolation_level=None)
        self._connection.execute(f"PRAGMA journal_mode = {journal_mode}")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.execute("PRAGMA cache_size = 8")
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.execute("CREATE TABLE IF NOT EXISTS counter (value INTEGER)")
        self._connection.execute("CREATE TABLE IF NOT EXISTS history (value INTEGER PRIMARY KEY)")
        self._connection.execute("CREATE TABLE IF NOT EXISTS ballast (value INTEGER, text TEXT)")
        if self._connection.execute("SELECT count(*) FROM counter").fetchone() == (0,):
            self._connection.execute("INSERT INTO counter VALUES (0)")
            rows = [("x" * _ROW_BYTES,)] * _BALLAST_ROWS
            self._connection.executemany("INSERT INTO ballast VALUES (0, ?)", rows)
        self._connection.execute("COMMIT")

    def value(self) -> int:
        return int(self._connection.execute("SELECT value FROM counter").fetchone()[0])

    def raise_to(self, counter: int) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.execute("UPDATE ballast SET value = ?", (counter,))
        self._pause()
        self._connection.execute("INSERT INTO history VALUES (?)", (counter,))
        self._connection.execute("UPDATE counter SET value = ?", (counter,))
        self._connection.execute("COMMIT")

    def close(self) -> None:
        self._connection.close()


class Log:
    """JSON Lines, only ever appended to. After a crash a torn line is ended and stays, as with real logs."""

    def __init__(self, path: Path, *, pause: Pause) -> None:
        self._path = path
        self._pause = pause
        self._stream = path.open("ab", buffering=0)
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            self._stream.write(b"\n")

    def value(self) -> int:
        return last_of_log(self._path.read_bytes())

    def raise_to(self, counter: int) -> None:
        line = json.dumps({"counter": counter, "text": "remember " * 20}).encode() + b"\n"
        self._stream.write(line[:60])
        self._pause()
        self._stream.write(line[60:])

    def close(self) -> None:
        self._stream.close()


def last_of_log(content: bytes) -> int:
    """The counter in the last whole line; every whole line before it has to be the one before."""
    counters = []
    for line in content.split(b"\n"):
        with suppress(ValueError):
            counters.append(json.loads(line)["counter"])
    assert counters == list(range(1, len(counters) + 1)), "a line of the log is lost or doubled"
    return len(counters)


class Document:
    """A small JSON file, written aside and renamed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def value(self) -> int:
        return value_of_document(self._path.read_bytes()) if self._path.exists() else 0

    def raise_to(self, counter: int) -> None:
        aside = self._path.with_name(self._path.name + ".tmp")
        aside.write_text(json.dumps({"counter": counter, "again": [counter] * 50}))
        aside.rename(self._path)

    def close(self) -> None:
        pass


def value_of_document(content: bytes) -> int:
    document = json.loads(content)
    assert document["again"] == [document["counter"]] * 50
    return int(document["counter"])


class Commit:
    """A commit by git itself, which collects its garbage now and then."""

    def __init__(self, memdir: Path) -> None:
        self._memdir = memdir
        if not (memdir / ".git").exists():
            run_git(memdir, "init", "--quiet", "--initial-branch=main")
            run_git(memdir, "config", "gc.auto", str(_LOOSE_OBJECTS_BEFORE_GC))
            run_git(memdir, "config", "gc.autoDetach", "false")
            run_git(memdir, "commit", "--quiet", "--allow-empty", "--message", "counter 0")
        for lock in (memdir / ".git").rglob("*.lock"):  # of a git that was killed
            lock.unlink()

    def value(self) -> int:
        return value_of_commit(run_git(self._memdir, "log", "-1", "--format=%s", "main"))

    def raise_to(self, counter: int) -> None:
        run_git(self._memdir, "add", NOTE)
        run_git(self._memdir, "commit", "--quiet", "--allow-empty", "--message", f"counter {counter}")

    def close(self) -> None:
        pass


def value_of_commit(subject: str) -> int:
    return int(subject.removeprefix("counter "))


def size_bytes(path: Path) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116
    except FileNotFoundError:
        return 0
