"""An agent's sources, opened for one cut: databases probed and pinned, repository, staged files.

Two kinds of reading prove that nothing moved. A `Moment` is quick and taken on both sides of the pins:
databases, refs, and the files that are being written to these days (the hot ones). The many others were
read when they were staged, and once more after the window (`moved_since_staged`): a longer interval
proves just as much of a file that nobody touches, and keeps the window at a few milliseconds however
many files there are.

Everything opened here is closed by the caller's ExitStack.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from heapq import nlargest
from pathlib import Path

from daemon.capture.files import Staging
from daemon.capture.git import LiveRepository, RepositoryUnreadable
from daemon.capture.scan import Scan, Scanner, Signature, spec_path
from daemon.capture.sqlite import DatabaseUnreadable, LiveDatabase
from daemon.model import AgentSpec, Failure, GitFacts

_HOT_NS = 60_000_000_000
_MOST_HOT_FILES = 100

GIT = ".git"
"""Under this name the repository's failures and movements are kept, beside paths of files."""


@dataclass(frozen=True, slots=True)
class Moment:
    """The facts that move: equal ones on both sides of the pins mean that nothing did in between."""

    databases: dict[str, tuple[object, ...]]
    git: GitFacts | None
    hot_files: dict[str, Signature]
    unread: frozenset[str]
    """Databases that could not be read just then: busy, or gone."""

    def differences(self, other: Moment) -> set[str]:
        """Names of the sources that are not provably the same in both."""
        moved = set(self.unread | other.unread)
        moved |= {path for path, _ in self.databases.items() ^ other.databases.items()}
        moved |= {path for path, _ in self.hot_files.items() ^ other.hot_files.items()}
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
        self.scan = Scan()
        """What was found last."""
        self.git: GitFacts | None = None
        """The refs as they were read last."""
        self._scanner = Scanner(spec)
        self._seen: set[str] = set()
        self._hot: set[str] = set()
        self.repository = self._open_repository()

    def prepare(self) -> set[str]:
        """Open what is new and stage what changed; the names of databases that could not be opened yet.

        The slow part. Staging takes its time, so what moved meanwhile is brought up to date, and what was
        written to lately is looked at again within the window.
        """
        self.scan = self._scanner.scan()
        unready = self._open_databases(self.scan)
        self._stage()
        self.scan = self._scanner.scan()
        self._stage()
        self._hot = self._written_lately()
        return unready

    def catch_up(self) -> None:
        """Bring the copies of hot files up to date: the last thing before the window."""
        self.staging.update(signatures(self.spec.root, self._hot))

    def read(self) -> Moment:
        unread: set[str] = set()
        versions: dict[str, tuple[object, ...]] = {}
        for path, database in self.databases.items():
            try:
                versions[path] = database.reading()
            except (sqlite3.Error, OSError):
                unread.add(path)
        self.git = self._read_repository()
        return Moment(versions, self.git, signatures(self.spec.root, self._hot), frozenset(unread))

    def not_as_staged(self, moment: Moment) -> set[str]:
        """Hot files whose copy is not provably what the moment saw."""
        return {
            path
            for path, signature in moment.hot_files.items()
            if not self.staging.is_current(path, signature) and path not in self.staging.failures
        }

    def moved_since_staged(self) -> set[str]:
        """Look at everything once more, after the window: what is there and is not as it was staged, what
        came and what went. Hot files have been judged by the moments. Updates `scan`."""
        before, self.scan = self.scan, self._scanner.scan()
        now = {**self.scan.files, **self._state_files()}
        moved = {path for path, signature in now.items() if not self.staging.is_current(path, signature)}
        moved -= self._hot | self.staging.failures.keys()
        moved |= before.files.keys() - self.scan.files.keys()
        moved |= before.databases.keys() ^ self.scan.databases.keys()
        moved |= self._unopened()
        moved |= {path for path, _ in before.symlinks.items() ^ self.scan.symlinks.items()}
        return moved

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

    def _unopened(self) -> set[str]:
        """Databases that came after the others were opened."""
        return self.scan.databases.keys() - self.databases.keys() - self.failures.keys()

    def missed(self) -> dict[str, Failure]:
        """Databases that were there when the snapshot began and are not in its cut, or came during it."""
        return self._vanished() | {
            path: Failure(
                source=str(self.spec.root / path),
                reason="appeared during the snapshot, which never found a quiet moment to open it",
                hint="take the snapshot again",
            )
            for path in self._unopened()
        }

    def _vanished(self) -> dict[str, Failure]:
        return {
            path: Failure(
                source=str(self.spec.root / path),
                reason="vanished during the snapshot",
                hint="if the agent deleted it, all is well with the next snapshot; if not, look into it now",
            )
            for path in self._seen - self.scan.databases.keys() - self.scan.suspects.keys()
        }

    def path_of(self, path: Path) -> str:
        """As in a scan: relative to the root, or absolute outside of it."""
        return spec_path(self.spec, path)

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

    def _stage(self) -> None:
        self.staging.refresh({**self.scan.files, **self._state_files()})

    def _written_lately(self) -> set[str]:
        """The files most likely to be written to next: those that were last, within a minute."""
        now_ns = time.time_ns()
        candidates = {**self.scan.files, **self._state_files()}
        lately = [
            (signature.ctime_ns, path)
            for path, signature in candidates.items()
            if signature.ctime_ns > now_ns - _HOT_NS
        ]
        return {path for _, path in nlargest(_MOST_HOT_FILES, lately)}

    def _state_files(self) -> dict[str, Signature]:
        """Signatures of the state values' files, which a scan leaves out."""
        found = {}
        for source in self.spec.states:
            if source.file is not None:
                found.update(signatures(self.spec.root, [self.path_of(source.file)]))
        return found


def signatures(root: Path, paths: Iterable[str]) -> dict[str, Signature]:
    """What stat says of each path that is there."""
    found = {}
    for path in paths:
        try:
            found[path] = Signature.of((root / path).lstat())
        except OSError:
            continue  # not there, or not for us: what is missing is named by its failure
    return found
