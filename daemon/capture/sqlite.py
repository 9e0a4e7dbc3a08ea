"""Reading live SQLite databases: probed, pinned, copied through SQLite's own backup API.

Connections are read-only and made only as the database's owner: another user's connection would leave
`-wal` and `-shm` files that the agent cannot write. `immutable` is never used on a live database: it
misses the WAL silently. A read-only connection does not checkpoint when it closes, so no byte of the
database or its WAL changes.

Source: https://sqlite.org/isolation.html, /wal.html, /backup.html, /pragma.html#pragma_data_version.
"""

from __future__ import annotations

import errno
import math
import os
import sqlite3
import time
from abc import ABC, abstractmethod
from contextlib import closing
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from urllib.parse import quote

from daemon.capture.files import Staging, signatures
from daemon.capture.scan import SIDECARS, Signature

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


class HotJournal(DatabaseUnreadable):
    """A crashed writer's journal has to be rolled back before anything can be read."""


class PinExpired(Exception):
    """The copy took longer than a pin may be held."""


class PinBroken(PinExpired):
    """The file was written to in spite of the pin."""


class PinnedDatabase(ABC):
    """One database of an agent, whose state is ours from `pin` to `release`."""

    path: Path
    identity: tuple[int, int]
    is_wal: bool
    user_version: int

    @abstractmethod
    def reading(self) -> tuple[object, ...]:
        """Equal readings around a pin prove that nobody else committed, and that the path is still this
        file. Raises sqlite3.Error (busy) and OSError (vanished, or another file has its name)."""

    @abstractmethod
    def pin(self) -> None:
        """Hold the database's present state. Raises sqlite3.Error (busy)."""

    @abstractmethod
    def release(self) -> None:
        """Let go of the pinned state. Idempotent."""

    @property
    @abstractmethod
    def is_pinned(self) -> bool: ...

    @abstractmethod
    def connection(self) -> sqlite3.Connection:
        """A connection to read from within the cut."""

    @abstractmethod
    def copy_to(self, target: Path, *, deadline: float) -> None:
        """Copy the database page by page; layout and rowids stay. With a pin the copy is the pinned state.

        Raises PinExpired past `deadline` (time.monotonic), DatabaseUnreadable, and OSError (no room).
        """

    @abstractmethod
    def copy_unpinned(self, target: Path) -> None:
        """Copy one state of the database, whichever that is. Raises DatabaseUnreadable, OSError."""

    @abstractmethod
    def is_outdated(self) -> bool:
        """Whether it has to be opened anew: its writer crashed, or came back after a crash."""

    @abstractmethod
    def close(self) -> None:
        """Idempotent."""


def open_database(path: Path, scratch: Path) -> PinnedDatabase:
    """A database ready to be pinned. One that a crashed writer left with a hot journal is rolled back in a
    copy in `scratch`. Raises DatabaseUnreadable, OSError (no room in scratch)."""
    try:
        return LiveDatabase(path)
    except HotJournal:
        return CrashedDatabase(path, scratch)


class LiveDatabase(PinnedDatabase):
    """One database of an agent, open for reading through two connections.

    The probe never holds a transaction, so its `data_version` moves with every commit of others. The pin
    holds a read transaction from `pin` to `release`: what it reads is one state of this database.
    """

    def __init__(self, path: Path) -> None:
        """Raises DatabaseUnreadable."""
        self.path = path
        self._pin: sqlite3.Connection | None = None
        self._pinned_bytes: Signature | None = None
        try:
            _check_files(path)
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
        if _identity(self.path) != self.identity:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self.path))
        return _first(self._probe, "PRAGMA data_version"), self._bytes_signature()

    def _bytes_signature(self) -> Signature | None:
        """Without WAL nobody who minds locks writes to the file while we hold it; some do not mind them."""
        name = self.path.name
        return None if self.is_wal else signatures(self.path.parent, [name]).get(name)

    def pin(self) -> None:
        connection = self._connection()
        connection.execute("BEGIN")
        _first(connection, "SELECT count(*) FROM sqlite_schema")  # BEGIN alone pins nothing
        self._pinned_bytes = self._bytes_signature()

    def release(self) -> None:
        if self._pin is not None and self._pin.in_transaction:
            self._pin.rollback()

    @property
    def is_pinned(self) -> bool:
        return self._pin is not None and self._pin.in_transaction

    def connection(self) -> sqlite3.Connection:
        return self._connection()

    def copy_to(self, target: Path, *, deadline: float) -> None:
        _backup(self._connection(), target, source=self.path, deadline=deadline)
        if self.is_pinned and self._bytes_signature() != self._pinned_bytes:
            raise PinBroken

    def copy_unpinned(self, target: Path) -> None:
        """With WAL from a pin of its own, which keeps no writer waiting. Without, in short steps that hold
        their lock for milliseconds; SQLite starts over when a writer came between, so the copy is one state.
        Raises DatabaseUnreadable, OSError."""
        self.release()
        try:
            if self.is_wal:
                self.pin()
            self.copy_to(target, deadline=time.monotonic() + _UNPINNED_LIMIT_SECONDS)
        except PinExpired as exc:
            raise DatabaseUnreadable(
                f"written to so steadily that no whole copy was had in {_UNPINNED_LIMIT_SECONDS:.0f} s",
                hint="turn WAL on in the agent (PRAGMA journal_mode=WAL), or snapshot when it is idle",
            ) from exc
        except sqlite3.Error as exc:
            raise explain(exc, self.path) from exc
        finally:
            self.release()

    def is_outdated(self) -> bool:
        try:
            _first(self._probe, "PRAGMA data_version")
        except sqlite3.Error as exc:
            return isinstance(explain(exc, self.path), HotJournal)
        return False

    def close(self) -> None:
        self.release()
        self._probe.close()
        if self._pin is not None:
            self._pin.close()
            self._pin = None

    def _connection(self) -> sqlite3.Connection:
        assert self._pin is not None
        return self._pin


class CrashedDatabase(PinnedDatabase):
    """A database with a hot journal: both are copied, and the copy is rolled back as the agent's own next
    start would do with the original. Nobody has it open, so its files' signatures say whether it moved.

    Source: https://sqlite.org/fileformat2.html#the_rollback_journal, https://sqlite.org/atomiccommit.html.
    """

    is_wal = False
    is_pinned = True

    def __init__(self, path: Path, scratch: Path) -> None:
        """Raises DatabaseUnreadable, OSError (no room in scratch)."""
        self.path = path
        self._names = (path.name, f"{path.name}-journal")
        copying = Staging(path.parent, Path(mkdtemp(prefix="crashed-", dir=scratch)))
        copying.refresh(signatures(path.parent, self._names))
        staged = copying.files
        if any(name not in staged for name in self._names):
            raise DatabaseUnreadable("changed while it was read", hint=_AGAIN_HINT, may_pass=True)
        self._as_staged = {name: staged[name].signature for name in self._names}
        self.identity = self._as_staged[path.name].identity
        self._copy = staged[path.name].copy
        self._connection = self._rolled_back(staged[self._names[1]].copy)
        self.user_version = int(_first(self._connection, "PRAGMA user_version"))

    def _rolled_back(self, journal: Path) -> sqlite3.Connection:
        """A connection to the copy after its rollback."""
        committed = _settle_super_journal(journal)
        beside = self._copy.with_name(f"{self._copy.name}-journal")
        try:
            if committed:
                journal.unlink()
            else:
                journal.rename(beside)
            connection = sqlite3.connect(self._copy, isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA trusted_schema=OFF")
            _first(connection, "SELECT count(*) FROM sqlite_schema")
            connection.execute("PRAGMA query_only=ON")
        except sqlite3.Error as exc:
            raise explain(exc, self.path) from exc
        return connection

    def reading(self) -> tuple[object, ...]:
        now = signatures(self.path.parent, self._names)
        if now.get(self.path.name) is None or now[self.path.name].identity != self.identity:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self.path))
        return tuple(sorted(now.items())) if now == self._as_staged else (time.monotonic_ns(),)

    def pin(self) -> None:
        """The copy is as it was made."""

    def release(self) -> None:
        """The copy stays as it is."""

    def connection(self) -> sqlite3.Connection:
        return self._connection

    def copy_to(self, target: Path, *, deadline: float) -> None:  # noqa: ARG002  nobody waits for a copy
        self.copy_unpinned(target)

    def copy_unpinned(self, target: Path) -> None:
        _backup(self._connection, target, source=self.path, deadline=math.inf)

    def is_outdated(self) -> bool:
        return signatures(self.path.parent, self._names) != self._as_staged

    def close(self) -> None:
        self._connection.close()


_JOURNAL_MAGIC = b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7"


def _backup(connection: sqlite3.Connection, target: Path, *, source: Path, deadline: float) -> None:
    """Copy what a connection reads, page by page. Raises as PinnedDatabase.copy_to."""

    def check_deadline(status: int, _remaining: int, _total: int) -> None:
        if status != _SQLITE_DONE and time.monotonic() > deadline:
            raise PinExpired

    try:
        with closing(sqlite3.connect(target, isolation_level=None)) as copy:
            copy.execute("PRAGMA journal_mode=OFF")
            copy.execute("PRAGMA synchronous=OFF")  # the bundle is what gets fsynced
            connection.backup(copy, pages=_STEP_PAGES, progress=check_deadline, sleep=0.005)
    except sqlite3.Error as exc:
        # No room is for the copy: the agent's own file is only read.
        if getattr(exc, "sqlite_errorname", "") in _NO_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from exc
        raise explain(exc, source) from exc


def _settle_super_journal(journal: Path) -> bool:
    """Whether a transaction over several databases was committed after all; what names it is cut off the
    copied journal, so that rolling that back touches nothing of the agent's.

    The record at the end: a page number, the name, its length, a checksum, the journal's magic.
    """
    with journal.open("r+b") as stream:
        size_bytes = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size_bytes - 16))
        tail = stream.read()
        if len(tail) < 16 or tail[8:] != _JOURNAL_MAGIC:
            return False
        name_bytes = int.from_bytes(tail[:4], "big")
        start = size_bytes - 16 - name_bytes
        if not 0 < name_bytes <= _MAX_PATH_BYTES or start < 4:
            return False
        stream.seek(start)
        name = stream.read(name_bytes)
        if sum(int.from_bytes([byte], "big", signed=True) for byte in name) & 0xFFFFFFFF != int.from_bytes(
            tail[4:8], "big"
        ):
            return False
        stream.truncate(start - 4)
    return not os.path.lexists(name)


def check_copy(copy: Path) -> None:
    """Prove a finished private copy sound with SQLite's quick check. Raises DatabaseUnreadable."""
    try:
        with closing(open_copy(copy)) as connection:
            problems = _quick_check(connection)
    except sqlite3.Error as exc:
        raise explain(exc, copy) from exc
    if problems:
        raise DatabaseUnreadable(
            f"fails SQLite's quick check: {'; '.join(map(str, problems))[:300]}", hint=_CORRUPT_HINT
        )


def _quick_check(connection: sqlite3.Connection) -> list[str]:
    """What SQLite has against a database. Where it stops at what only the application knows, table by
    table, as far as it goes."""
    try:
        return _problems(connection, "PRAGMA quick_check(3)")
    except sqlite3.Error as exc:
        if not needs_the_application(exc):
            raise
    problems: list[str] = []
    for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall():
        quoted = name.replace("'", "''")
        try:
            problems += _problems(connection, f"PRAGMA quick_check('{quoted}')")
        except sqlite3.Error as exc:
            if not needs_the_application(exc):
                raise
    return problems


def _problems(connection: sqlite3.Connection, check: str) -> list[str]:
    found = [str(row[0]) for row in connection.execute(check)]
    return [] if found == ["ok"] else found


def open_copy(copy: Path) -> sqlite3.Connection:
    """A database that is ours alone, to read from; it leaves no sidecars. Raises sqlite3.Error."""
    # immutable: nobody else writes to it, and there is no WAL beside it
    connection = sqlite3.connect(f"file:{quote(os.fsencode(copy))}?mode=ro&immutable=1", uri=True)
    connection.execute("PRAGMA trusted_schema=OFF")
    return connection


def needs_the_application(exc: sqlite3.Error) -> bool:
    """Whether a check stopped at a collation, function or module that only the agent's own program
    registers. The pages are no worse for it: they cannot be checked further here."""
    message = str(exc)
    return any(what in message for what in ("no such collation", "unknown function", "no such module"))


_AGAIN_HINT = "take the snapshot again"
_MAX_PATH_BYTES = 4096
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
        return HotJournal(
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
    return DatabaseUnreadable("vanished during the snapshot", hint=_AGAIN_HINT, may_pass=True)


def _check_files(path: Path) -> None:
    """SQLite opens a database and its sidecars with no regard for what they are, and waits for a FIFO."""
    try:
        owner = path.stat().st_uid
    except FileNotFoundError as exc:
        raise _vanished() from exc
    for name in (path, *(path.with_name(f"{path.name}{suffix}") for suffix in SIDECARS)):
        if name.exists() and not name.is_file():
            raise DatabaseUnreadable(f"{name.name} is no file", hint=f"find out what made {name}; remove it")
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
