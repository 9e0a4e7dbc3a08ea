"""The agent at work: round after round, store after store, always in the order of `layout.STEPS`.

Each step changes one store in one piece: a line appended, a transaction committed, a file renamed into
place, a branch moved. What a step is about to write is in the journal before it is written. A writer
that finds the stores of a killed one in the middle of a round finishes that round.

Crash model: killed anywhere, every store holds the last step or the one before it. Durability is left
to SQLite's and git's defaults, as agents leave it.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Self

import pygit2

from tests.harness.sample_agent import content, layout, rows
from tests.harness.sample_agent.journal import JournalFile
from tests.harness.sample_agent.layout import Database

_AUTO_CHECKPOINT_PAGES = 64  # far below the default, so that checkpoints happen in the shortest of tests
_BUSY_TIMEOUT_SECONDS = 10.0
_AUTHOR = ("Sample Agent", "agent@example.invalid")


class SampleWriter:
    """Writes one step at a time. `pause` is called with a fraction of the pause between two steps."""

    def __init__(
        self,
        root: Path,
        *,
        journal: Path,
        commit_every_rounds: int = 3,
        pause: Callable[[float], None] = lambda _fraction: None,
    ) -> None:
        self._root = root
        self._commit_every_rounds = commit_every_rounds
        self._pause = pause
        self._identity = json.loads((root / layout.IDENTITY).read_bytes())
        self._seed: int = self._identity["seed"]
        self._connections = {database.name: _connect(root / database.path) for database in layout.DATABASES}
        self._next_ids = {d.name: _next_id(self._connections[d.name], d) for d in layout.DATABASES}
        self._memdir = pygit2.Repository(str(root / layout.MEMDIR))
        self._log = os.open(root / layout.CURRENT_LOG, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        self.counters = self._read_counters()
        self._journal = JournalFile(journal)
        self._journal.start(identity=self._identity, counters=self.counters, refs=self._refs())
        self._write: dict[str, Callable[[int], None]] = {
            "session_log": self._write_session_log,
            **{database.name: partial(self._write_rows, database) for database in layout.DATABASES},
            "cursor": self._write_cursor,
            "worktree": self._write_worktree,
            "commit": self._write_commit,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._memdir.free()
        os.close(self._log)
        self._journal.close()

    def next_step(self) -> tuple[int, str]:
        """Do the next step; returns its round and name."""
        round_number, step = self.upcoming()
        self._write[step](round_number)
        self._journal.done(step, round_number=round_number)
        self.counters[step] = round_number
        return round_number, step

    def upcoming(self) -> tuple[int, str]:
        """The first step that is not done of the round that was begun last, else the next round's first."""
        current_round = max(self.counters.values())
        for step in layout.STEPS:
            if self._is_due(step, current_round):
                return current_round, step
        return current_round + 1, layout.STEPS[0]

    def write_until(self, *, round_number: int, step: str = layout.STEPS[-1]) -> None:
        """Go on until `step` of `round_number` is done, or would have been (not every round commits)."""
        last = (round_number, layout.STEPS.index(step))
        while True:
            next_round, next_step = self.upcoming()
            if (next_round, layout.STEPS.index(next_step)) > last:
                return
            self.next_step()

    def _is_due(self, step: str, round_number: int) -> bool:
        commits = round_number % self._commit_every_rounds == 0
        return self.counters[step] < round_number and (step != "commit" or commits)

    def _write_session_log(self, round_number: int) -> None:
        line = content.log_line(self._seed, round_number)
        self._journal.intend("session_log", round_number=round_number, digests=[content.digest(line)])
        rest = line.removeprefix(_partial_last_line(self._log))
        middle = len(rest) // 2  # a log is often flushed in the middle of a line
        os.write(self._log, rest[:middle])
        self._pause(0.5)
        os.write(self._log, rest[middle:])

    def _write_rows(self, database: Database, round_number: int) -> None:
        first_id = self._next_ids[database.name]
        batch = rows.rows_of_round(database, seed=self._seed, round_number=round_number, first_id=first_id)
        digests = [content.digest_of_row(row) for row in batch]
        self._journal.intend(database.name, round_number=round_number, digests=digests)
        connection = self._connections[database.name]
        connection.execute("BEGIN IMMEDIATE")
        round_row = (round_number, len(batch), content.digest_of_rows(batch))
        connection.execute("INSERT INTO rounds VALUES (?, ?, ?)", round_row)
        rows.insert_rows(connection, database, batch[:1])
        self._pause(0.2)  # so that there are open transactions to be looked at
        rows.insert_rows(connection, database, batch[1:])
        connection.execute("UPDATE head SET round = ?", (round_number,))
        connection.execute("COMMIT")
        self._next_ids[database.name] += len(batch)

    def _write_cursor(self, round_number: int) -> None:
        log_size_bytes = os.fstat(self._log).st_size
        document = content.cursor_document(round_number=round_number, log_size_bytes=log_size_bytes)
        self._journal.intend("cursor", round_number=round_number, digests=[content.digest(document)])
        _replace(self._root / layout.CURSOR, document)

    def _write_worktree(self, round_number: int) -> None:
        note = content.round_note(self._seed, round_number)
        self._journal.intend("worktree", round_number=round_number, digests=[content.digest(note)])
        _replace(self._root / layout.MEMDIR / layout.ROUND_NOTE, note)

    def _write_commit(self, round_number: int) -> None:
        """Objects first, which nothing shows yet; then the journal, the index and the branch."""
        index = self._memdir.index
        index.read()
        blob = self._memdir.create_blob(content.round_note(self._seed, round_number))
        index.add(pygit2.IndexEntry(layout.ROUND_NOTE, blob, pygit2.enums.FileMode.BLOB))
        signature = pygit2.Signature(*_AUTHOR, int(content.moment_of(round_number).timestamp()), 0)
        head = self._memdir.head
        message = f"round {round_number}\n"
        commit = self._memdir.create_commit(
            None, signature, signature, message, index.write_tree(), [head.target]
        )
        self._journal.intend("commit", round_number=round_number, digests=[str(commit)])
        index.write()
        head.set_target(commit, message)

    def _read_counters(self) -> dict[str, int]:
        memdir = self._root / layout.MEMDIR
        databases = {name: _head_round(connection) for name, connection in self._connections.items()}
        return {
            "session_log": _last_logged_round(self._log),
            **databases,
            "cursor": json.loads((self._root / layout.CURSOR).read_bytes())["round"],
            "worktree": content.round_of_note((memdir / layout.ROUND_NOTE).read_bytes()),
            "commit": int(self._memdir.head.peel(pygit2.Commit).message.removeprefix("round ")),
        }

    def _refs(self) -> dict[str, str]:
        """Every ref but the branch that the rounds move."""
        moving = self._memdir.head.name
        names = [name for name in self._memdir.references if name != moving]
        return {name: str(self._memdir.references[name].target) for name in sorted(names)}


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_TIMEOUT_SECONDS)
    connection.execute(f"PRAGMA wal_autocheckpoint = {_AUTO_CHECKPOINT_PAGES}")
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


def _next_id(connection: sqlite3.Connection, database: Database) -> int:
    (last_id,) = connection.execute(f"SELECT max(id) FROM {database.table}").fetchone()
    return int(last_id) + 1


def _head_round(connection: sqlite3.Connection) -> int:
    (round_number,) = connection.execute("SELECT round FROM head").fetchone()
    return int(round_number)


def _replace(path: Path, new_content: bytes) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(new_content)
    beside.replace(path)


def _tail(log: int) -> bytes:
    size_bytes = os.fstat(log).st_size
    return os.pread(log, 1 << 16, max(0, size_bytes - (1 << 16)))


def _partial_last_line(log: int) -> bytes:
    return _tail(log).rpartition(b"\n")[2]


def _last_logged_round(log: int) -> int:
    lines = _tail(log).splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    return int(json.loads(whole[-1])["round"])


def work(
    root: Path, *, journal: Path, pause_ms: float, commit_every_rounds: int, stopping: Callable[[], bool]
) -> int:
    """Keep writing until `stopping` says so, between two steps. Returns the round that it reached."""

    def pause(fraction: float) -> None:
        # Not the agent's seeded stream: when things happen is the one thing that must not repeat.
        jitter = 0.5 + int.from_bytes(os.urandom(2)) / 65536
        time.sleep(pause_ms / 1000 * fraction * jitter)

    with SampleWriter(root, journal=journal, commit_every_rounds=commit_every_rounds, pause=pause) as writer:
        while not stopping():
            writer.next_step()
            pause(1.0)
        return max(writer.counters.values())
