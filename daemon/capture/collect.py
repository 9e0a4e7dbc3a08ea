"""From held sources to the files of a snapshot: databases copied, git packed, raw bytes kept.

What anybody could wait for comes first: pinned databases are copied and let go before anything else.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import BinaryIO

from daemon.capture import state
from daemon.capture.files import StagedFile, Staging, whole_lines_bytes
from daemon.capture.git import RepositoryUnreadable
from daemon.capture.sources import GIT, OpenSources, signatures
from daemon.capture.sqlite import DatabaseUnreadable, LiveDatabase, PinExpired, check_copy
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
class CollectOptions:
    wal_pin_seconds: float = 30.0
    """How long a pin is held at most: a checkpoint that truncates the WAL waits for it."""
    rollback_pin_seconds: float = 1.0
    """Without WAL a pin keeps the agent from committing."""
    threads: int = 2


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
    git: GitFacts | None = None
    schema_versions: dict[str, int] = field(default_factory=dict)
    states: dict[str, StateHome] = field(default_factory=dict)
    excluded: tuple[Excluded, ...] = ()
    failures: list[Failure] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return not self.failures

    @property
    def content_bytes(self) -> int:
        return sum(artifact.size_bytes for artifact in self.artifacts)


def collect(sources: OpenSources, capture: Capture, *, scratch: Path, options: CollectOptions) -> None:
    """Fill `capture` from sources that are held at one instant; they are released on the way.

    Raises OSError (our own side: scratch is full).
    """
    _Collector(sources, capture, scratch, options).run()


class _Collector:
    def __init__(
        self,
        sources: OpenSources,
        capture: Capture,
        scratch: Path,
        options: CollectOptions,
    ) -> None:
        self._sources = sources
        self._spec = sources.spec
        self._scan = sources.scan
        self._capture = capture
        self._scratch = scratch
        self._options = options
        self._memdir = self._spec.relative(self._spec.memdir) if self._spec.memdir else None

    def run(self) -> None:
        for source in self._spec.states:
            self._collect_state(source)
        self._collect_databases()
        self._sources.release()
        self._collect_git()
        self._collect_files()
        self._collect_failures()
        self._capture.memdir = self._memdir
        self._capture.root_mode = _mode_of(self._spec.root)
        self._capture.memdir_mode = _mode_of(self._spec.memdir)
        self._capture.excluded = self._scan.exclusions()

    def _room(self, name: str) -> Path:
        room = self._scratch / name
        room.mkdir(exist_ok=True)
        return room

    def _add(self, name: str, kind: ArtifactKind, copy: Path, *, staged: StagedFile | None = None) -> str:
        """Record a finished private copy as an artifact, with the attributes of what it was staged from."""
        size_bytes = copy.stat().st_size
        if staged is not None and kind in (ArtifactKind.FILE, ArtifactKind.MEMORY_FILE):
            size_bytes = whole_lines_bytes(name, staged)
        mode = staged.signature.mode if staged else 0o600
        mtime_ns = staged.signature.mtime_ns if staged else None
        self._capture.artifacts.append(CapturedArtifact(name, kind, size_bytes, mode, mtime_ns, copy))
        return name

    # --- databases --------------------------------------------------------------------------------

    def _collect_databases(self) -> None:
        """Copy all databases. One with a rollback journal goes first: its pin is dearest."""
        order = sorted(
            ((p, db) for p, db in self._sources.databases.items() if p in self._scan.databases),
            key=lambda item: (item[1].is_wal, item[0]),
        )
        room = self._room("sqlite")
        held_since = monotonic()
        with ThreadPoolExecutor(self._options.threads) as pool:
            copies = [
                (path, database, target, pool.submit(self._copy_database, database, target, held_since))
                for number, (path, database) in enumerate(order)
                for target in [room / f"{number:06d}"]
            ]
            for path, database, target, copying in copies:
                try:
                    if not copying.result():
                        self._note_moved(path)
                except DatabaseUnreadable as exc:
                    self._sources.fail_database(path, exc)
                    continue
                name = f"sqlite/{to_member_name(path)}"
                signature = self._scan.databases[path]
                self._capture.schema_versions[name] = database.user_version
                self._add(name, ArtifactKind.SQLITE, target, staged=StagedFile(target, signature, 0))

    def _copy_database(self, database: LiveDatabase, target: Path, held_since: float) -> bool:
        """Copy and prove one database; whether the copy is the pinned state. Raises DatabaseUnreadable."""
        options = self._options
        allowed_seconds = options.wal_pin_seconds if database.is_wal else options.rollback_pin_seconds
        as_pinned = database.is_pinned
        if as_pinned:
            try:
                database.copy_to(target, deadline=held_since + allowed_seconds)
            except PinExpired:
                target.unlink()
                as_pinned = False
        database.release()
        if not as_pinned:
            database.copy_unpinned(target)
        check_copy(target)
        return as_pinned

    def _note_moved(self, path: str) -> None:
        """One source is of another moment than the rest."""
        held = self._capture.consistency
        self._capture.consistency = Consistency(
            level="per_source",
            window_ms=held.window_ms,
            attempts=held.attempts,
            moved=tuple(sorted({*held.moved, path})),
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
        self._capture.git = facts
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
        """A state value, from its staged copy or through the pinned connection."""
        home = source.file or source.sqlite
        assert home is not None
        path = to_member_name(self._sources.path_of(home))
        self._capture.states[source.name] = StateHome(kind="file" if source.file else "rows", path=path)
        try:
            data = self._state_bytes(source)
        except state.StateUnreadable as exc:
            failure = Failure(
                source=f"state {source.name} ({home})",
                reason=str(exc),
                hint="mend the value, or its entry under `state` in the configuration",
            )
            self._fail(failure, [self._sources.path_of(source.file)] if source.file else [])
            return
        copy = self._room("state") / f"{source.name}.json"
        copy.write_bytes(data)
        staged = self._sources.staging.files.get(self._sources.path_of(source.file)) if source.file else None
        self._add(f"state/{source.name}.json", ArtifactKind.STATE, copy, staged=staged)

    def _state_bytes(self, source: StateSource) -> bytes:
        if source.file is not None:
            staged = self._sources.staging.files.get(self._sources.path_of(source.file))
            if staged is None:
                raise state.StateUnreadable("is not there, or cannot be read")
            with staged.copy.open("rb") as stream:
                return state.check_json(stream.read(state.MAX_STATE_BYTES + 1))
        assert source.sqlite is not None
        assert source.query is not None
        database = self._sources.databases.get(self._sources.path_of(source.sqlite))
        if database is None:
            raise state.StateUnreadable("its database cannot be opened")
        return state.query_rows(database.connection(), source.query, agent_id=self._spec.agent_id)

    # --- what could not be captured ---------------------------------------------------------------

    def _collect_failures(self) -> None:
        """Name every failure, and keep the raw bytes of what it is about where they can be read."""
        for path, failure in sorted(self._all_failures().items()):
            if path in self._scan.databases:
                self._sources.forget(path)  # nothing of ours has it open while its bytes are read
                self._fail(failure, [path, f"{path}-wal", f"{path}-journal"])
            elif path == GIT:
                self._fail(failure, list(self._git_files()))
            elif path in self._scan.suspects:
                self._fail(failure, [path])
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
        for path in sorted((self._spec.memdir / ".git").rglob("*")):
            if path.is_file() and not path.is_symlink():
                yield self._spec.relative(path)

    def _fail(self, failure: Failure, raw: list[str]) -> None:
        """Record a failure; what of `raw` can be read goes into the bundle's `opaque/` as it is."""
        keeping = Staging(self._spec.root, self._room(f"opaque-{len(self._capture.failures)}"))
        there = {artifact.path_in_bundle for artifact in self._capture.artifacts}
        kept_already = tuple(_opaque(path) for path in raw if _opaque(path) in there)
        wanted = [path for path in raw if _opaque(path) not in there]
        keeping.refresh(signatures(self._spec.root, wanted))
        kept = tuple(
            self._add(_opaque(path), ArtifactKind.OPAQUE, staged.copy, staged=staged)
            for path, staged in sorted(keeping.files.items())
        )
        self._capture.failures.append(failure.model_copy(update={"kept_as": (*kept_already, *kept)}))


def _mode_of(directory: Path | None) -> int | None:
    return stat.S_IMODE(directory.stat().st_mode) if directory is not None and directory.is_dir() else None


def _opaque(path: str) -> str:
    return "opaque/" + to_member_name(path.lstrip("/"))
