"""Reading live SQLite databases: probed, pinned, copied through SQLite's own backup API.

Connections are read-only and made only as the database's owner: another user's connection would leave
`-wal` and `-shm` files that the agent cannot write. `immutable` is never used on a live database: it
misses the WAL silently. A read-only connection does not checkpoint when it closes, so no byte of the
database or its WAL changes.

Source: https://sqlite.org/isolation.html, /wal.html, /backup.html, /pragma.html#pragma_data_version.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

_BUSY_TIMEOUT_MS = 250
_STEP_PAGES = 512
_SQLITE_DONE = 101
_NO_ROOM = ("SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_TRUNCATE", "SQLITE_IOERR_CLOSE")
_UNPINNED_LIMIT_SECONDS = 120.0


class DatabaseUnreadable(Exception):
    """A database that cannot be captured: `reason` and what to do about it in `hint`."""

    def __init__(self, reason: str, *, hint: str, may_pass: bool = False) -> None:
        super().__init__(reason)
        self.hint = hint
        self.may_pass = may_pass
        """Whether the next attempt, milliseconds later, may find it otherwise."""


class PinExpired(Exception):
    """The copy took longer than a pin may be held."""


class LiveDatabase:
    """One database of an agent, open for reading through two connections.

    The probe never holds a transaction, so its `data_version` moves with every commit of others. The pin
    holds a read transaction from `pin` to `release`: what it reads is one state of this database.
    """

    def __init__(self, path: Path) -> None:
        """Raises DatabaseUnreadable."""
        self.path = path
        self._pin: sqlite3.Connection | None = None
        try:
            _check_owner(path)
            self.identity = _identity(path)
            self._probe = _open_read_only(path)
        except OSError as exc:
            raise DatabaseUnreadable(
                f"cannot be read: {exc.strerror}", hint="run agentkeep as the owner of the agent's files"
            ) from exc
        except sqlite3.Error as exc:
            raise explain(exc, path) from exc
        try:
            self.is_wal = _first(self._probe, "PRAGMA journal_mode") == "wal"
            self.user_version = int(_first(self._probe, "PRAGMA user_version"))
            _first(self._probe, "SELECT count(*) FROM sqlite_schema")
            self._pin = _open_read_only(path)
        except sqlite3.Error as exc:
            self.close()
            raise explain(exc, path) from exc

    def reading(self) -> tuple[object, ...]:
        """Equal readings around a pin prove that no other connection committed; the path is still this
        file. Raises sqlite3.Error (busy) and OSError (vanished, or another file has its name)."""
        if _identity(self.path) != self.identity:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self.path))
        return (_first(self._probe, "PRAGMA data_version"),)

    def pin(self) -> None:
        """Hold the database's present state. Raises sqlite3.Error (busy)."""
        connection = self._connection()
        connection.execute("BEGIN")
        _first(connection, "SELECT count(*) FROM sqlite_schema")  # BEGIN alone pins nothing

    def release(self) -> None:
        """Let go of the pinned state. Idempotent."""
        if self._pin is not None and self._pin.in_transaction:
            self._pin.rollback()

    @property
    def is_pinned(self) -> bool:
        return self._pin is not None and self._pin.in_transaction

    def connection(self) -> sqlite3.Connection:
        """The pinned connection, to read from within the cut."""
        return self._connection()

    def copy_to(self, target: Path, *, deadline: float) -> None:
        """Copy the database page by page; layout and rowids stay. With a pin the copy is the pinned state.

        Raises PinExpired past `deadline` (time.monotonic), DatabaseUnreadable, and OSError (no room).
        """

        def check_deadline(status: int, _remaining: int, _total: int) -> None:
            if status != _SQLITE_DONE and time.monotonic() > deadline:
                raise PinExpired

        connection = self._connection()
        try:
            with closing(sqlite3.connect(target, isolation_level=None)) as copy:
                copy.execute("PRAGMA journal_mode=OFF")
                copy.execute("PRAGMA synchronous=OFF")  # the bundle is what gets fsynced
                connection.backup(copy, pages=_STEP_PAGES, progress=check_deadline, sleep=0.005)
        except sqlite3.Error as exc:
            if (
                getattr(exc, "sqlite_errorname", "") in _NO_ROOM
            ):  # for the copy: the agent's own file is only read
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from exc
            raise explain(exc, self.path) from exc

    def copy_unpinned(self, target: Path) -> None:
        """Copy in short steps, each holding its lock for milliseconds; SQLite starts over when a writer
        came between, so the copy is one state. Raises DatabaseUnreadable, OSError."""
        self.release()
        try:
            self.copy_to(target, deadline=time.monotonic() + _UNPINNED_LIMIT_SECONDS)
        except PinExpired as exc:
            raise DatabaseUnreadable(
                f"written to so steadily that no whole copy was had in {_UNPINNED_LIMIT_SECONDS:.0f} s",
                hint="turn WAL on in the agent (PRAGMA journal_mode=WAL), or snapshot when it is idle",
            ) from exc

    def close(self) -> None:
        """Idempotent."""
        self.release()
        self._probe.close()
        if self._pin is not None:
            self._pin.close()
            self._pin = None

    def _connection(self) -> sqlite3.Connection:
        assert self._pin is not None
        return self._pin


def check_copy(copy: Path) -> None:
    """Prove a finished private copy sound with SQLite's quick check. Raises DatabaseUnreadable."""
    # immutable: ours alone, no WAL beside it, and no sidecars wanted
    uri = f"file:{quote(os.fsencode(copy))}?mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            connection.execute("PRAGMA trusted_schema=OFF")
            problems = [row[0] for row in connection.execute("PRAGMA quick_check(3)")]
    except sqlite3.Error as exc:
        if needs_the_application(exc):
            return
        raise explain(exc, copy) from exc
    if problems != ["ok"]:
        raise DatabaseUnreadable(
            f"fails SQLite's quick check: {'; '.join(map(str, problems))[:300]}", hint=_CORRUPT_HINT
        )


def needs_the_application(exc: sqlite3.Error) -> bool:
    """Whether a check stopped at a collation, function or module that only the agent's own program
    registers. The pages are no worse for it: they cannot be checked further here."""
    message = str(exc)
    return any(what in message for what in ("no such collation", "unknown function", "no such module"))


_CORRUPT_HINT = (
    "the database is corrupt: `agentkeep restore` an earlier snapshot, or save what can be read with "
    "`sqlite3 DB .recover`; its raw bytes are in this bundle"
)


def explain(exc: sqlite3.Error, path: Path) -> DatabaseUnreadable:
    """What SQLite said, with what to do about it."""
    message = str(exc)
    code = getattr(exc, "sqlite_errorname", "")
    if code.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or "malformed" in message:
        return DatabaseUnreadable(message, hint=_CORRUPT_HINT)
    if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return DatabaseUnreadable(
            f"locked by its writer for longer than {_BUSY_TIMEOUT_MS} ms",
            hint="turn WAL on in the agent (PRAGMA journal_mode=WAL): readers and writers no longer wait",
            may_pass=True,
        )
    if code == "SQLITE_READONLY_ROLLBACK":
        return DatabaseUnreadable(
            f"{message}: a crashed writer's journal has to be rolled back first",
            hint="start the agent once (or open the database with sqlite3): that rolls it back",
        )
    if not os.path.lexists(path):
        return _vanished()
    return DatabaseUnreadable(
        message,
        hint=f"run agentkeep as the owner of {path}, with write permission on its directory (WAL needs it)",
    )


def _vanished() -> DatabaseUnreadable:
    return DatabaseUnreadable("vanished during the snapshot", hint="take the snapshot again", may_pass=True)


def _check_owner(path: Path) -> None:
    try:
        owner = path.stat().st_uid
    except FileNotFoundError as exc:
        raise _vanished() from exc
    if owner != os.geteuid():
        raise DatabaseUnreadable(
            f"belongs to user id {owner}, and agentkeep runs as {os.geteuid()}",
            hint="run agentkeep as the agent's user: another user's connection leaves files it cannot write",
        )


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _open_read_only(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"file:{quote(os.fsencode(path))}?mode=ro",
        uri=True,
        isolation_level=None,
        timeout=_BUSY_TIMEOUT_MS / 1000,
        check_same_thread=False,  # one thread at a time: the copying pool, after the window
    )
    connection.execute("PRAGMA trusted_schema=OFF")
    connection.execute("PRAGMA query_only=ON")
    return connection


def _first(connection: sqlite3.Connection, sql: str) -> Any:
    return connection.execute(sql).fetchone()[0]
