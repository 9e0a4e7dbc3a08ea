"""Private copies of an agent's databases, each proven sound.

What anybody could wait for comes first: a pin on a database with a rollback journal keeps its writer from
committing, so such databases are copied right after the window, before anything else is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from daemon.capture.secret_tables import empty_tables
from daemon.capture.sqlite import DatabaseUnreadable, PinExpired, PinnedDatabase, check_copy


@dataclass(frozen=True, slots=True)
class CopyOptions:
    wal_pin_seconds: float = 30.0
    """How long a pin is held at most: a checkpoint that truncates the WAL waits for it."""
    rollback_pin_seconds: float = 1.0
    """Without WAL a pin keeps the agent from committing."""
    threads: int = 2
    secret_tables: tuple[str, ...] = ()
    """Globs of tables whose rows are left out."""


@dataclass(frozen=True, slots=True)
class DatabaseCopy:
    """emptied: how many rows were left out, by table"""

    file: Path
    emptied: dict[str, int]


class DatabaseCopies:
    """Copies by path. `moved` are those that are of another moment than the cut."""

    def __init__(self, directory: Path, options: CopyOptions) -> None:
        self._directory = directory
        self._options = options
        self._serial = 0
        self.done: dict[str, DatabaseCopy] = {}
        self.moved: set[str] = set()
        self.failures: dict[str, DatabaseUnreadable] = {}

    def copy_pinned(self, databases: Iterable[tuple[str, PinnedDatabase]], *, held_since: float) -> None:
        """Copy databases as they are pinned, and let each go. One that cannot be copied within the time
        that its pin may be held (from `held_since`, monotonic) is let go and left for `copy_rest`.

        Raises OSError (no room).
        """
        with ThreadPoolExecutor(self._options.threads) as pool:
            jobs = [
                (path, pool.submit(self._copy_as_pinned, database, self._new_target(), held_since))
                for path, database in databases
                if database.is_pinned and not self._is_dealt_with(path)
            ]
        for path, job in jobs:
            self._keep(path, job.result)

    def copy_rest(self, databases: Iterable[tuple[str, PinnedDatabase]]) -> None:
        """Copy what has no copy yet in some state of its own, in short steps. Raises OSError (no room)."""
        for path, database in databases:
            if not self._is_dealt_with(path):
                self.moved.add(path)
                self._keep(path, partial(self._copy_unpinned, database, self._new_target()))

    def discard(self) -> None:
        """Forget everything: the cut that it belongs to did not come about."""
        for copy in self.done.values():
            copy.file.unlink()
        self.done.clear()
        self.moved.clear()
        self.failures.clear()

    def _is_dealt_with(self, path: str) -> bool:
        return path in self.done or path in self.failures

    def _new_target(self) -> Path:
        self._serial += 1
        return self._directory / f"{self._serial:06d}"

    def _keep(self, path: str, result: Callable[[], DatabaseCopy | None]) -> None:
        try:
            copy = result()
        except DatabaseUnreadable as exc:
            self.failures[path] = exc
            return
        if copy is not None:
            self.done[path] = copy

    def _copy_as_pinned(
        self, database: PinnedDatabase, target: Path, held_since: float
    ) -> DatabaseCopy | None:
        options = self._options
        allowed_seconds = options.wal_pin_seconds if database.is_wal else options.rollback_pin_seconds
        try:
            database.copy_to(target, deadline=held_since + allowed_seconds)
        except PinExpired:
            target.unlink()
            return None
        finally:
            database.release()
        return self._proven(target)

    def _copy_unpinned(self, database: PinnedDatabase, target: Path) -> DatabaseCopy:
        database.copy_unpinned(target)
        return self._proven(target)

    def _proven(self, target: Path) -> DatabaseCopy:
        check_copy(target)
        tables = self._options.secret_tables
        return DatabaseCopy(target, empty_tables(target, tables) if tables else {})
