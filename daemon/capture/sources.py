"""An agent's sources, opened for one cut: databases probed and pinned, repository, staged files.

Three kinds of reading prove that nothing moved. A `Moment` is quick and taken on both sides of the pins:
databases, refs, and the files that are being written to these days (the hot ones), small ones with their
content. The lengths of logs are read between the two moments, twice within microseconds: a log that only
grows is known exactly, however often it does. The many other files were read when they were staged, and
once more after the window (`moved_since_staged`): a longer interval proves just as much of a file that
nobody touches, and keeps the window at a few milliseconds however many files there are.

Everything opened here is closed by the caller's ExitStack.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from heapq import nlargest
from pathlib import Path, PurePosixPath

from daemon.capture import state
from daemon.capture.files import Staging, is_append_only, is_fresh, signatures
from daemon.capture.fingerprint import database_signatures, fingerprint
from daemon.capture.git import LiveRepository, RepositoryUnreadable
from daemon.capture.mapped import mapped_for_writing
from daemon.capture.scan import RECENT_NS, Listing, Scan, Scanner, Signature, open_quietly, spec_path
from daemon.capture.sqlite import DatabaseUnreadable, PinnedDatabase, open_database
from daemon.errors import RefusedError
from daemon.model import AgentSpec, Failure, GitFacts

_MOST_HOT_FILES = 100
_MOST_HOT_DIRECTORIES = 50
_MOST_LISTED = 500
_BURNING_NS = 2_000_000_000
_MOST_BURNING_FILES = 16
_BURNING_BYTES = 64 << 10
_LOG_PASSES = 20

GIT = ".git"
"""Under this name the repository's failures and movements are kept, beside paths of files."""


@dataclass(frozen=True, slots=True)
class HotFile:
    """content: of a small file that was written to seconds ago; else None"""

    signature: Signature
    content: bytes | None = None


@dataclass(frozen=True, slots=True)
class Moment:
    """The facts that move: equal ones on both sides of the pins mean that nothing did in between."""

    databases: dict[str, tuple[object, ...]]
    git: GitFacts | None
    hot_files: dict[str, HotFile]
    directories: dict[str, Listing | None]
    unread: frozenset[str]
    """Databases that could not be read just then: busy, or gone."""

    def differences(self, other: Moment) -> set[str]:
        """Names of the sources that are not provably the same in both."""
        moved = set(self.unread | other.unread)
        moved |= _unequal(self.databases, other.databases) | _unequal(self.hot_files, other.hot_files)
        moved |= {f"{path}/" for path in _unequal(self.directories, other.directories)}
        if self.git != other.git:
            moved.add(GIT)
        return moved


def _unequal(some: Mapping[str, object], others: Mapping[str, object]) -> set[str]:
    return {key for key in some.keys() | others.keys() if some.get(key) != others.get(key)}


class OpenSources:
    """Paths are relative to the agent's root, or absolute where a state value lies outside of it."""

    def __init__(self, spec: AgentSpec, scratch: Path, stack: ExitStack) -> None:
        self.spec = spec
        self._scratch = scratch
        self.staging = Staging(spec.root, scratch)
        self.databases: dict[str, PinnedDatabase] = {}
        self.failures: dict[str, Failure] = {}
        self._stack = stack
        self.scan = Scan()
        """What was found last."""
        self.git: GitFacts | None = None
        """The refs as they were read last."""
        self.command_values: dict[str, bytes | state.StateUnreadable] = {}
        """What the commands of state values printed last, by name."""
        self.rows: dict[str, bytes | state.StateUnreadable] = {}
        """What queries of databases that are not copied gave, by the name of their state value."""
        self.unprovable: set[str] = set()
        """Files that some process has mapped to write to."""
        self._asked_for_maps: set[tuple[int, int]] = set()
        self._scanner = Scanner(spec)
        self._seen: set[str] = set()
        self._hot: set[str] = set()
        self._burning: set[str] = set()
        self._hot_logs: list[str] = []
        self._hot_directories: list[str] = []
        self._gone: dict[str, Signature] = {}
        self._held = Moment({}, None, {}, {}, frozenset())
        self.repository = self._open_repository()

    def prepare(self) -> set[str]:
        """Open what is new and stage what changed; the names of databases that could not be opened yet.

        The slow part. Staging takes its time, so what moved meanwhile is brought up to date, and what was
        written to lately is looked at again within the window. Raises RefusedError (larger than allowed).
        """
        self.scan = self._scanner.scan()
        self._check_size()
        unready = self._open_databases(self.scan)
        self._stage()
        self.command_values = self._run_commands(known=self.command_values)
        self.scan = self._scanner.scan()
        self._stage()
        self._choose_hot()
        return unready

    def catch_up(self) -> None:
        """Bring the copies of hot files up to date: the last thing before the window."""
        self.staging.update(signatures(self.spec.root, [*self._hot, *self._hot_logs]))

    def read(self) -> Moment:
        unread: set[str] = set()
        versions: dict[str, tuple[object, ...]] = {}
        for path, database in self.databases.items():
            try:
                versions[path] = database.reading()
            except (sqlite3.Error, OSError):
                unread.add(path)
        self.git = self._read_repository()
        listings = {directory: self._scanner.listing(directory) for directory in self._hot_directories}
        self._held = Moment(versions, self.git, self._read_hot_files(), listings, frozenset(unread))
        return self._held

    def _read_hot_files(self) -> dict[str, HotFile]:
        found = {
            path: HotFile(signature)
            for path, signature in signatures(self.spec.root, self._hot - self._burning).items()
        }
        for path in self._burning:
            try:
                with open_quietly(self.spec.root / path) as descriptor:
                    content = os.pread(descriptor, _BURNING_BYTES + 1, 0)
                    found[path] = HotFile(Signature.of(os.fstat(descriptor)), content)
            except OSError:
                continue  # gone, or not for us: the readings differ, or staging has named it
        return found

    def read_logs(self) -> tuple[dict[str, Signature], set[str]]:
        """The signatures of all hot logs at one instant between the pins and now, and the names of those
        for which there was none: two passes in a row that are equal, microseconds apart, show one.
        """
        now = signatures(self.spec.root, self._hot_logs)
        moved: set[str] = set()
        for _ in range(_LOG_PASSES):
            before, now = now, signatures(self.spec.root, self._hot_logs)
            moved = _unequal(before, now)
            if not moved:
                break
        return now, moved | (set(self._hot_logs) - now.keys())

    def read_outside_rows(self) -> None:
        """State values in databases that are not copied: read from their pins, which are let go at once. What
        an earlier attempt read is of another moment, and forgotten."""
        self.rows.clear()
        deadline = time.monotonic() + state.MAX_QUERY_SECONDS  # all of them: a writer may be waiting
        copied = self.scan.databases.keys()
        for source in self.spec.states:
            if source.sqlite is None or source.query is None or self.path_of(source.sqlite) in copied:
                continue
            database = self.databases.get(self.path_of(source.sqlite))
            if database is not None and database.is_pinned:
                try:
                    self.rows[source.name] = state.query_rows(
                        database.connection(), source.query, agent_id=self.spec.agent_id, deadline=deadline
                    )
                except state.StateUnreadable as exc:
                    self.rows[source.name] = exc
        for path, database in self.databases.items():
            if path not in copied:
                database.release()

    def keep(self, moment: Moment, logs: dict[str, Signature]) -> set[str]:
        """Make the copies of hot files and logs what they were in the window; the names of those for which
        that cannot be shown, or that their writer had not finished. Raises OSError (no space)."""
        moved = {path for path, signature in logs.items() if not self._cut_log(path, signature)}
        for path, hot in moment.hot_files.items():
            if hot.content is not None and len(hot.content) == hot.signature.size_bytes:
                self.staging.put(path, hot.signature, hot.content)
            if path in self.staging.failures:
                continue
            if not self.staging.is_current(path, hot.signature) or self.staging.is_half_written(path):
                moved.add(path)
        return moved

    def _cut_log(self, path: str, signature: Signature) -> bool:
        return path in self.staging.failures or self.staging.cut_log(path, signature)

    def moved_since_staged(self) -> set[str]:
        """Look at everything once more, after the window: what is there and is not as it was staged, what
        came and what went. Hot files have been judged by the moments. Updates `scan`."""
        before, self.scan = self.scan, self._scanner.scan()
        now = {**self.scan.files, **self._state_files()}
        judged = self._hot | set(self._hot_logs) | self.staging.failures.keys()
        moved = {
            path
            for path, signature in now.items()
            if path not in judged and not self.staging.is_current(path, signature)
        }
        gone = before.files.keys() - self.scan.files.keys()
        self._gone = {path: before.files[path] for path in gone}
        moved |= gone
        moved |= before.databases.keys() ^ self.scan.databases.keys()
        moved |= self._unopened()
        moved |= _unequal(before.symlinks, self.scan.symlinks)
        moved |= _unequal(before.directories, self.scan.directories)
        moved |= {f"{path}/" for path in self._changed_directories(before)}
        return moved | self._changed_values()

    def _changed_directories(self, before: Scan) -> set[str]:
        """Directories in which something may have come and gone again between the looks. What is in hot ones
        was seen at the moments; the others have to be as they were."""
        now, hot = self.scan, set(self._hot_directories)
        marks = _unequal(before.marks, now.marks)
        fresh = {
            path for path in before.listings if is_fresh("", before.marks[path], read_at_ns=before.began_ns)
        }
        # One that was let alone for so long by now that it is not listed any more is as it was.
        seen = {path: now.listings.get(path, before.listings.get(path)) for path in hot}
        return (marks | fresh) - hot | _unequal(seen, self._held.directories)

    def settle(self, moved: set[str]) -> None:
        """Before files that moved are kept all the same: see that each copy is one state of its file.
        Raises OSError (no space)."""
        there = self.scan.files.keys() | self._state_files().keys()
        moved_files = (moved | self.unprovable) & there
        logs = {path for path in moved_files if is_append_only(path)}
        self.staging.update(signatures(self.spec.root, logs))
        unstaged = logs - self.staging.files.keys()
        self.staging.settle(sorted(moved_files - logs | unstaged))
        # The last look may have missed what is renamed to and fro: rather kept twice than never.
        self.scan.files |= {p: old for p, old in self._gone.items() if self._may_be_kept(p, old)}

    def _may_be_kept(self, path: str, signature: Signature) -> bool:
        """Whether there is a sound copy of a file that is gone, and nothing else is in its place now."""
        now = self.scan
        leaves = now.files.keys() | now.databases.keys() | now.symlinks.keys() | now.suspects.keys()
        above = {str(parent) for parent in PurePosixPath(path).parents}
        is_free = path not in leaves and path not in now.directories and not above & leaves
        return is_free and self.staging.is_current(path, signature)

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

    def fingerprint_held(self) -> str | None:
        """The digest that goes with the cut (fingerprint.py); None if something could have changed after it
        without leaving a trace. To be called while databases are still open."""
        staged = self.staging.files
        is_sound = not (self.scan.failures or self.scan.suspects or self.failures or self.staging.failures)
        if not is_sound or self.unprovable:
            return None
        databases = database_signatures(self.spec.root, self.databases)
        now_ns = time.time_ns()
        if any(is_fresh(path, signature, read_at_ns=now_ns) for path, signature in databases.items()):
            return None
        if any(is_fresh(p, file.signature, read_at_ns=file.staged_at_ns) for p, file in staged.items()):
            return None
        try:
            if {path: db.reading() for path, db in self.databases.items()} != self._held.databases:
                return None
        except (sqlite3.Error, OSError):
            return None
        return self._fingerprint({path: file.signature for path, file in staged.items()}, databases)

    def fingerprint_now(self) -> str | None:
        """The same of what is there now, without opening databases or copying anything."""
        self.scan = self._scanner.scan()
        self.git = self._read_repository()
        self.command_values = self._run_commands(known={})
        if self.scan.failures or self.scan.suspects or self.failures:
            return None
        databases = database_signatures(self.spec.root, {*self.scan.databases, *self._state_databases()})
        return self._fingerprint({**self.scan.files, **self._state_files()}, databases)

    def _fingerprint(self, files: dict[str, Signature], databases: dict[str, Signature]) -> str | None:
        values = self.command_values
        if any(isinstance(value, state.StateUnreadable) for value in values.values()):
            return None
        return fingerprint(
            self.spec, self.scan, files=files, databases=databases, git=self.git, values=values
        )

    def waited_for(self) -> list[tuple[str, PinnedDatabase]]:
        """Databases to be copied whose pin keeps their writer from committing."""
        return [item for item in self.wanted() if not item[1].is_wal]

    def wanted(self) -> list[tuple[str, PinnedDatabase]]:
        """Databases to be copied."""
        return [(path, self.databases[path]) for path in sorted(self.databases.keys() & self.scan.databases)]

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
        """Databases that were there when the snapshot began and are not in its cut, and whatever came during
        it and is there without a copy."""
        unstaged = self.scan.files.keys() - self.staging.files.keys() - self.staging.failures.keys()
        return self._vanished() | {
            path: Failure(
                source=str(self.spec.root / path),
                reason="appeared during the snapshot, which never found a quiet moment for it",
                hint="take the snapshot again",
            )
            for path in (*self._unopened(), *signatures(self.spec.root, unstaged))
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
        wanted = dict.fromkeys([*scan.databases, *self._state_databases()])
        for path in [path for path in self.databases if path not in wanted]:
            self.forget(path)
        unready = set()
        for path in wanted:
            opened = self.databases.get(path)
            found = scan.databases.get(path)
            is_same = opened is not None and (found is None or found.identity == opened.identity)
            if is_same and opened is not None and not opened.is_outdated():
                continue
            self.forget(path)
            self.failures.pop(path, None)
            try:
                database = open_database(self.spec.root / path, self._scratch)
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

    def _choose_hot(self) -> None:
        """The files most likely to be written to next: those that were last, within a minute."""
        now_ns = time.time_ns()
        candidates = {**self.scan.files, **self._state_files()}
        lately = [
            (signature.ctime_ns, path)
            for path, signature in candidates.items()
            if signature.ctime_ns > now_ns - RECENT_NS
        ]
        self._look_for_maps({path: candidates[path] for _, path in lately})
        moved_lately = [
            (self.scan.marks[path].ctime_ns, path)
            for path, listing in self.scan.listings.items()
            if len(listing) <= _MOST_LISTED  # the window is no place for more
        ]
        self._hot_directories = [path for _, path in nlargest(_MOST_HOT_DIRECTORIES, moved_lately)]
        hottest = nlargest(_MOST_HOT_FILES, lately)
        self._hot_logs = [path for _, path in hottest if is_append_only(path)]
        self._hot = {path for _, path in hottest} - set(self._hot_logs)
        burning = [
            path
            for ctime_ns, path in hottest
            if path in self._hot
            and ctime_ns > now_ns - _BURNING_NS
            and candidates[path].size_bytes <= _BURNING_BYTES
        ]
        self._burning = set(burning[:_MOST_BURNING_FILES])

    def _look_for_maps(self, lately: Mapping[str, Signature]) -> None:
        """A file that is mapped and written to gets a new mtime whenever it was written back, so it is among
        those that were written to lately. Each is looked for once in each state: every process is asked."""
        unknown = {
            path: signature
            for path, signature in lately.items()
            if signature.size_bytes and (signature.inode, signature.ctime_ns) not in self._asked_for_maps
        }
        if unknown:
            self.unprovable |= mapped_for_writing(unknown)
            self._asked_for_maps |= {(item.inode, item.ctime_ns) for item in unknown.values()}

    def _check_size(self) -> None:
        limit_bytes = self.spec.max_agent_bytes
        if limit_bytes is None:
            return
        found = {**self.scan.files, **self.scan.databases}
        total_bytes = sum(signature.size_bytes for signature in found.values())
        if total_bytes > limit_bytes:
            largest = nlargest(3, found, key=lambda path: found[path].size_bytes)
            raise RefusedError(
                f"agent {self.spec.agent_id!r} has {total_bytes} bytes, more than its max_agent_bytes"
                f" {limit_bytes}; the largest: {', '.join(largest)}",
                hint="raise `max_agent_bytes`, or leave something out with `exclude`",
            )

    def _run_commands(
        self, *, known: Mapping[str, bytes | state.StateUnreadable]
    ) -> dict[str, bytes | state.StateUnreadable]:
        """The values of all states that commands print; what is `known` is not asked for again."""
        values = dict(known)
        for source in self.spec.states:
            if source.command and source.name not in values:
                values[source.name] = state.command_value(source, self.spec)
        return values

    def _changed_values(self) -> set[str]:
        """Ask the commands again; which of them say something else by now."""
        before, self.command_values = self.command_values, self._run_commands(known={})
        return {
            f"state {name}"
            for name, value in self.command_values.items()
            if isinstance(value, bytes) and value != before.get(name)
        }

    def _state_databases(self) -> list[str]:
        return [
            self.path_of(source.sqlite)
            for source in self.spec.states
            if source.sqlite is not None and os.path.lexists(source.sqlite)
        ]

    def _state_files(self) -> dict[str, Signature]:
        """Signatures of the state values' files, which a scan leaves out."""
        found = {}
        for source in self.spec.states:
            if source.file is not None:
                found.update(signatures(self.spec.root, [self.path_of(source.file)]))
        return found
