"""From held sources to the files of a snapshot: state values read, databases copied, git packed, raw bytes
kept. What anybody could wait for comes first: databases are copied and let go before anything else.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from daemon.capture import state
from daemon.capture.copies import DatabaseCopies
from daemon.capture.files import StagedFile, Staging, signatures, whole_lines_bytes
from daemon.capture.git import RepositoryUnreadable
from daemon.capture.secret_tables import tables_in_raw_bytes
from daemon.capture.sources import GIT, OpenSources
from daemon.capture.sqlite import open_copy
from daemon.model import (
    AgentSpec,
    ArtifactKind,
    Consistency,
    Directory,
    Excluded,
    Failure,
    GitFacts,
    StateHome,
    StateSource,
    Symlink,
    encode_bytes,
    to_member_name,
)


@dataclass(frozen=True, slots=True)
class CapturedArtifact:
    """One file of the cut: always the same `size_bytes` bytes, for as long as the scratch lives."""

    path_in_bundle: str
    kind: ArtifactKind
    size_bytes: int
    mode: int
    mtime_ns: int | None
    _copy: Path

    def open(self) -> BinaryIO:
        return self._copy.open("rb")


@dataclass(slots=True)
class Capture:
    """One agent as of one cut. Complete means: nothing that should be here is missing."""

    spec: AgentSpec
    created_at_ms: int
    consistency: Consistency
    artifacts: list[CapturedArtifact] = field(default_factory=list)
    directories: tuple[Directory, ...] = ()
    symlinks: tuple[Symlink, ...] = ()
    memdir: str | None = None
    root_mode: int | None = None
    memdir_mode: int | None = None
    fingerprint: str | None = None
    """What is known by it later has not changed since (fingerprint.py). None: that cannot be told."""
    git: GitFacts | None = None
    schema_versions: dict[str, int] = field(default_factory=dict)
    cut_logs: dict[str, int] = field(default_factory=dict)
    """How many bytes those logs had of which only the whole lines are here."""
    states: dict[str, StateHome] = field(default_factory=dict)
    excluded: tuple[Excluded, ...] = ()
    failures: list[Failure] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return not self.failures

    @property
    def content_bytes(self) -> int:
        return sum(artifact.size_bytes for artifact in self.artifacts)


def collect(
    sources: OpenSources,
    copies: DatabaseCopies,
    capture: Capture,
    *,
    scratch: Path,
    held_since: float,
    let_go: Callable[[], None],
) -> None:
    """Fill `capture` from sources that are held at one instant; they are released on the way.

    held_since: when they were pinned, of the monotonic clock; let_go: called as soon as the agent may do
    what it likes. Raises OSError (our own side: scratch is full).
    """
    _Collector(sources, copies, capture, scratch).run(held_since=held_since, let_go=let_go)


class _Collector:
    def __init__(self, sources: OpenSources, copies: DatabaseCopies, capture: Capture, scratch: Path) -> None:
        self._sources = sources
        self._copies = copies
        self._spec = sources.spec
        self._scan = sources.scan
        self._capture = capture
        self._scratch = scratch
        self._memdir = self._spec.relative(self._spec.memdir) if self._spec.memdir else None
        self._names: set[str] = set()

    def run(self, *, held_since: float, let_go: Callable[[], None]) -> None:
        self._copies.copy_pinned(self._sources.wanted(), held_since=held_since)
        self._sources.release()
        self._copies.copy_rest(self._sources.wanted())
        fingerprint = self._sources.fingerprint_held()
        let_go()
        self._collect_databases()
        for source in self._spec.states:
            self._collect_state(source)
        self._collect_git()
        self._collect_files()
        self._collect_failures()
        # What a log was cut of is to be had as soon as its writer leaves it alone.
        is_all = self._capture.is_complete and not self._capture.cut_logs
        if is_all and self._capture.consistency.level == "point_in_time":
            self._capture.fingerprint = fingerprint
        self._capture.memdir = self._memdir
        self._capture.root_mode = _mode_of(self._spec.root)
        self._capture.memdir_mode = _mode_of(self._spec.memdir)
        self._capture.excluded = (*self._scan.exclusions(), *self._emptied_tables())

    def _room(self, name: str) -> Path:
        room = self._scratch / name
        room.mkdir(exist_ok=True)
        return room

    def _add(self, name: str, kind: ArtifactKind, copy: Path, *, staged: StagedFile | None = None) -> str:
        """Record a finished private copy as an artifact, with the attributes of what it was staged from."""
        size_bytes = found_bytes = copy.stat().st_size
        if staged is not None and kind in (ArtifactKind.FILE, ArtifactKind.MEMORY_FILE):
            size_bytes = whole_lines_bytes(name, staged)
            if size_bytes < found_bytes:
                self._capture.cut_logs[name] = found_bytes
        mode = staged.signature.mode if staged else 0o600
        mtime_ns = staged.signature.mtime_ns if staged else None
        self._names.add(name)
        self._capture.artifacts.append(CapturedArtifact(name, kind, size_bytes, mode, mtime_ns, copy))
        return name

    # --- databases --------------------------------------------------------------------------------

    def _collect_databases(self) -> None:
        for path, exc in self._copies.failures.items():
            self._sources.fail_database(path, exc)
        self._note_moved(self._copies.moved)
        for path, copy in sorted(self._copies.done.items()):
            name = f"sqlite/{to_member_name(path)}"
            signature = self._scan.databases[path]
            self._capture.schema_versions[name] = self._sources.databases[path].user_version
            self._add(name, ArtifactKind.SQLITE, copy.file, staged=StagedFile(copy.file, signature, 0))

    def _emptied_tables(self) -> tuple[Excluded, ...]:
        return tuple(
            Excluded(reason="rows of a table that holds secrets", pattern=f"{path}: {table}", count=rows)
            for path, copy in sorted(self._copies.done.items())
            for table, rows in copy.emptied.items()
        )

    def _note_moved(self, moved: set[str]) -> None:
        """Sources that are of another moment than the rest."""
        if not moved:
            return
        held = self._capture.consistency
        self._capture.consistency = Consistency(
            level="per_source",
            window_ms=held.window_ms,
            attempts=held.attempts,
            moved=tuple(sorted({*held.moved, *moved})),
        )

    # --- git, files, state ------------------------------------------------------------------------

    def _collect_git(self) -> None:
        facts = self._sources.git
        if self._sources.repository is None or facts is None:
            return
        try:
            written = self._sources.repository.write_bundle(facts, self._room("git"))
        except RepositoryUnreadable as exc:
            self._sources.fail_repository(exc)
            return
        self._capture.git = self._sources.repository.captured
        if written is not None:
            bundle, index = written
            self._add("git/memory.bundle", ArtifactKind.GIT_BUNDLE, bundle)
            self._add("git/memory.idx", ArtifactKind.GIT_INDEX, index)

    def _collect_files(self) -> None:
        for path in sorted(self._scan.files):
            staged = self._sources.staging.files.get(path)
            if staged is not None:
                self._add(*self._place(path), staged.copy, staged=staged)
        self._capture.directories = tuple(
            Directory(path=self._place(path)[0], mode=mode)
            for path, mode in sorted(self._scan.directories.items())
            if path != self._memdir
        )
        self._capture.symlinks = tuple(
            Symlink(path=self._place(path)[0], target_b64=encode_bytes(target))
            for path, target in sorted(self._scan.symlinks.items())
        )

    def _place(self, path: str) -> tuple[str, ArtifactKind]:
        """The room in the bundle for a plain file of the agent."""
        if self._memdir == ".":
            return f"memory_files/{to_member_name(path)}", ArtifactKind.MEMORY_FILE
        if self._memdir is not None and path.startswith(f"{self._memdir}/"):
            inner = path.removeprefix(f"{self._memdir}/")
            return f"memory_files/{to_member_name(inner)}", ArtifactKind.MEMORY_FILE
        return f"files/{to_member_name(path)}", ArtifactKind.FILE

    def _collect_state(self, source: StateSource) -> None:
        """A state value: its staged copy, the rows of a database as of the cut, what a command printed."""
        home = source.file or source.sqlite
        staged = self._sources.staging.files.get(self._sources.path_of(source.file)) if source.file else None
        if source.optional and home is not None and not os.path.lexists(home):
            return
        self._capture.states[source.name] = self._home_of(source)
        try:
            data = self._state_bytes(source, staged)
        except state.StateUnreadable as exc:
            failure = Failure(
                source=f"state {source.name} ({home or source.command[0]})",
                reason=str(exc),
                hint="mend the value, or its entry under `state` in the configuration",
            )
            self._fail(failure, [self._sources.path_of(source.file)] if source.file else [])
            return
        copy = self._room("state") / f"{source.name}.json"
        copy.write_bytes(data)
        self._add(f"state/{source.name}.json", ArtifactKind.STATE, copy, staged=staged)

    def _home_of(self, source: StateSource) -> StateHome:
        if source.file is not None:
            return StateHome(kind="file", path=to_member_name(self._sources.path_of(source.file)))
        if source.sqlite is not None:
            return StateHome(kind="rows", path=to_member_name(self._sources.path_of(source.sqlite)))
        return StateHome(kind="command", path=to_member_name(source.command[0]))

    def _state_bytes(self, source: StateSource, staged: StagedFile | None) -> bytes:
        """Raises StateUnreadable."""
        if source.file is not None:
            if staged is None:
                raise state.StateUnreadable("is not there, or cannot be read")
            with staged.copy.open("rb") as stream:
                return state.check_json(stream.read(state.MAX_STATE_BYTES + 1))
        if source.sqlite is not None:
            assert source.query is not None
            copy = self._copies.done.get(self._sources.path_of(source.sqlite))
            if copy is not None:
                with closing(open_copy(copy.file)) as connection:
                    return state.query_rows(connection, source.query, agent_id=self._spec.agent_id)
            is_there = os.path.lexists(source.sqlite)
            missing = state.StateUnreadable(
                "its database cannot be opened" if is_there else "its database is not there"
            )
            return _or_raise(self._sources.rows.get(source.name, missing))
        return _or_raise(self._sources.command_values[source.name])

    # --- what could not be captured ---------------------------------------------------------------

    def _collect_failures(self) -> None:
        """Name every failure, and keep the raw bytes of what it is about where they can be read."""
        for path, failure in sorted(self._all_failures().items()):
            if path in self._scan.databases:
                self._sources.forget(path)  # nothing of ours has it open while its bytes are read
                self._fail(failure, [path, f"{path}-wal", f"{path}-journal"], is_database=True)
            elif path == GIT:
                self._fail(failure, list(self._git_files()))
            elif path in self._scan.suspects or path in self._scan.files:
                self._fail(failure, [path], is_database=path in self._scan.suspects)
            else:
                self._fail(failure, [])

    def _all_failures(self) -> dict[str, Failure]:
        return {
            **self._scan.failures,
            **self._scan.suspects,
            **self._sources.staging.failures,
            **self._sources.missed(),
            **self._sources.failures,
        }

    def _git_files(self) -> Iterable[str]:
        assert self._spec.memdir is not None
        git = self._spec.memdir / ".git"
        # Of a linked work tree `.git` is a file that says where the repository is: outside, mostly.
        for path in [git, *sorted(git.rglob("*"))]:
            if path.is_file() and not path.is_symlink():
                yield self._spec.relative(path)

    def _fail(self, failure: Failure, raw: list[str], *, is_database: bool = False) -> None:
        """Record a failure; what of `raw` can be read goes into the bundle's `opaque/` as it is."""
        keeping = Staging(self._spec.root, self._room(f"opaque-{len(self._capture.failures)}"))
        kept_already = tuple(_opaque(path) for path in raw if _opaque(path) in self._names)
        wanted = [path for path in raw if _opaque(path) not in self._names]
        keeping.refresh(signatures(self._spec.root, wanted))
        if is_database and (secrets := self._secrets_in(keeping)):
            keeping.refresh({})
            why = f"its raw bytes are not kept, since they may hold {secrets}"
            failure = failure.model_copy(update={"hint": f"{failure.hint}; {why}"})
        kept = tuple(
            self._add(_opaque(path), ArtifactKind.OPAQUE, staged.copy, staged=staged)
            for path, staged in sorted(keeping.files.items())
        )
        self._capture.failures.append(failure.model_copy(update={"kept_as": (*kept_already, *kept)}))

    def _secrets_in(self, keeping: Staging) -> str:
        """Which tables of secrets the raw bytes of a database may hold: any, where they name no table."""
        patterns = self._spec.secret_tables
        if not patterns or not keeping.files:
            return ""
        found = [tables_in_raw_bytes(file.copy, patterns) for file in keeping.files.values()]
        if all(tables is None for tables in found):
            return "tables of secrets"
        return ", ".join(sorted(set().union(*filter(None, found))))


def _or_raise(value: bytes | state.StateUnreadable) -> bytes:
    if isinstance(value, state.StateUnreadable):
        raise value
    return value


def _mode_of(directory: Path | None) -> int | None:
    return stat.S_IMODE(directory.stat().st_mode) if directory is not None and directory.is_dir() else None


def _opaque(path: str) -> str:
    return "opaque/" + to_member_name(path.lstrip("/"))
