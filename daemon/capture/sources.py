"""An agent's sources, opened for one cut: databases probed and pinned, repository, staged files.

`read` gives the movable facts of all of them at about one moment; comparing two of these readings is how
the cut is proven. Everything opened here is closed by the caller's ExitStack.
"""

from __future__ import annotations

import sqlite3
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from daemon.capture.files import Staging, is_fresh
from daemon.capture.git import LiveRepository, RepositoryUnreadable
from daemon.capture.scan import Scan, Scanner, Signature
from daemon.capture.sqlite import DatabaseUnreadable, LiveDatabase
from daemon.model import AgentSpec, Failure, GitFacts

GIT = ".git"
"""Under this name the repository's failures and movements are kept, beside paths of files."""


@dataclass(slots=True)
class Reading:
    """The movable facts of every source at about one moment."""

    databases: dict[str, tuple[object, ...]]
    git: GitFacts | None
    scan: Scan
    state_files: dict[str, Signature]

    @property
    def files(self) -> dict[str, Signature]:
        return {**self.scan.files, **self.state_files}

    def differences(self, other: Reading) -> set[str]:
        """Names of the sources that are not the same in both."""
        moved: set[str] = set()
        for mine, theirs in (
            (self.databases, other.databases),
            (self.files, other.files),
            (self.scan.symlinks, other.scan.symlinks),
        ):
            moved |= {path for path, _ in mine.items() ^ theirs.items()}
        moved |= self.scan.databases.keys() ^ other.scan.databases.keys()
        if self.git != other.git:
            moved.add(GIT)
        return moved


class OpenSources:
    """Paths are relative to the agent's root, or absolute where a state value lies outside of it."""

    def __init__(self, spec: AgentSpec, scratch: Path, stack: ExitStack) -> None:
        self.spec = spec
        self.staging = Staging(spec.root, scratch)
        self.databases: dict[str, LiveDatabase] = {}
        self.failures: dict[str, Failure] = {}
        self._stack = stack
        self._scanner = Scanner(spec)
        self._seen: set[str] = set()
        self.repository = self._open_repository()

    def prepare(self) -> set[str]:
        """Open what is new and stage what changed; the names of what could not be opened just now."""
        scan = self._scanner.scan()
        unready = self._open_databases(scan)
        self._stage(scan)
        # Staging took its time: what moved meanwhile is brought up to date, so that the window opens on
        # little or nothing.
        self._stage(self._scanner.scan())
        return unready

    def read(self) -> tuple[Reading, set[str]]:
        """A reading, and the names of databases that could not be read (busy, vanished)."""
        unread: set[str] = set()
        versions: dict[str, tuple[object, ...]] = {}
        for path, database in self.databases.items():
            try:
                versions[path] = database.reading()
            except (sqlite3.Error, OSError):
                unread.add(path)
        git = self._read_repository()
        return Reading(versions, git, self._scanner.scan(), self._state_files()), unread

    def not_as_staged(self, reading: Reading) -> set[str]:
        """Files whose staged copy is not provably what the reading saw."""
        stale = set()
        for path, signature in reading.files.items():
            staged = self.staging.files.get(path)
            if staged is None:
                if path not in self.staging.failures:
                    stale.add(path)
            elif staged.signature != signature or is_fresh(path, signature, read_at_ns=staged.staged_at_ns):
                stale.add(path)
        return stale

    def pin(self) -> set[str]:
        """Pin every database; the names of those whose writer is in the way."""
        busy = set()
        for path, database in self.databases.items():
            try:
                database.pin()
            except sqlite3.Error:
                database.release()
                busy.add(path)
        return busy

    def release(self) -> None:
        for database in self.databases.values():
            database.release()

    def forget(self, path: str) -> None:
        """Close a database, so that its file may be opened as a file again. Idempotent."""
        database = self.databases.pop(path, None)
        if database is not None:
            database.close()
            self._scanner.held_open.discard(database.identity)

    def vanished(self, reading: Reading) -> dict[str, Failure]:
        """Databases that were there when the snapshot began and are not in its cut."""
        return {
            path: Failure(
                source=str(self.spec.root / path),
                reason="vanished during the snapshot",
                hint="if the agent deleted it, all is well with the next snapshot; if not, look into it now",
            )
            for path in self._seen - reading.scan.databases.keys() - reading.scan.suspects.keys()
        }

    def path_of(self, path: Path) -> str:
        """As in a scan: relative to the root, or absolute outside of it."""
        return self.spec.relative(path) if path.is_relative_to(self.spec.root) else str(path)

    def _open_repository(self) -> LiveRepository | None:
        memdir = self.spec.memdir
        if memdir is None or not (memdir / ".git").exists():
            return None
        try:
            repository = LiveRepository(memdir)
        except RepositoryUnreadable as exc:
            self.fail_repository(exc)
            return None
        self._stack.callback(repository.close)
        return repository

    def _read_repository(self) -> GitFacts | None:
        if self.repository is None:
            return None
        try:
            facts = self.repository.reading()
        except RepositoryUnreadable as exc:
            self.fail_repository(exc)
            return None
        self.failures.pop(GIT, None)
        return facts

    def fail_repository(self, exc: RepositoryUnreadable) -> None:
        self.failures[GIT] = Failure(source=str(self.spec.memdir), reason=str(exc), hint=exc.hint)

    def fail_database(self, path: str, exc: DatabaseUnreadable) -> None:
        self.failures[path] = Failure(source=str(self.spec.root / path), reason=str(exc), hint=exc.hint)

    def _open_databases(self, scan: Scan) -> set[str]:
        """Open what is new since the last attempt; reopen what was replaced under its name."""
        self._seen |= scan.databases.keys()
        # A database that only a state value names is pinned with the rest, and not copied.
        named = [self.path_of(source.sqlite) for source in self.spec.states if source.sqlite is not None]
        wanted = dict.fromkeys([*scan.databases, *named])
        for path in [path for path in self.databases if path not in wanted]:
            self.forget(path)
        unready = set()
        for path in wanted:
            opened = self.databases.get(path)
            found = scan.databases.get(path)
            if opened is not None and (found is None or found.identity == opened.identity):
                continue
            self.forget(path)
            self.failures.pop(path, None)
            try:
                database = LiveDatabase(self.spec.root / path)
            except DatabaseUnreadable as exc:
                self.fail_database(path, exc)
                if exc.may_pass:
                    unready.add(path)
                continue
            self.databases[path] = database
            self._stack.callback(database.close)
            self._scanner.held_open.add(database.identity)
        return unready

    def _stage(self, scan: Scan) -> None:
        self.staging.refresh({**scan.files, **self._state_files()})

    def _state_files(self) -> dict[str, Signature]:
        """Signatures of the state values' files, which a scan leaves out."""
        found = {}
        for source in self.spec.states:
            if source.file is not None:
                found.update(signatures(self.spec.root, [self.path_of(source.file)]))
        return found


def signatures(root: Path, paths: list[str]) -> dict[str, Signature]:
    """What stat says of each path that is there."""
    found = {}
    for path in paths:
        try:
            found[path] = Signature.of((root / path).lstat())
        except OSError:
            continue  # not there, or not for us: what is missing is named by its failure
    return found
