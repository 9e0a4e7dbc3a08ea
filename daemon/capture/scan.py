"""Finding what an agent consists of: one walk of its root, each entry classified, nothing followed.

A scan is also a reading: two scans that are equal, with every signature older than the file system's
time granularity, prove that no plain file changed in between (see cut.py). SQLite databases are told
by their header, never by their suffix; their content is none of a scan's business.

Must not: follow a symlink, open a file that SQLite holds open in this process, or its sidecars (closing
any descriptor of them would drop SQLite's POSIX locks; https://sqlite.org/howtocorrupt.html, 2.2).
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from wcmatch import glob

from daemon.model import AgentSpec, Excluded, Failure, fixed_head

SQLITE_MAGIC = b"SQLite format 3\x00"
SIDECARS = ("-wal", "-shm", "-journal")
_SQLITE_SUFFIXES = (".sqlite", ".sqlite3", ".db3")
_SMALLEST_PAGE_BYTES = 512
_GLOB_FLAGS = glob.GLOBSTAR | glob.DOTGLOB


@dataclass(frozen=True, slots=True)
class Signature:
    """What stat says of a file; equal signatures, old enough, mean equal bytes."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    mode: int
    owner: int

    @classmethod
    def of(cls, status: os.stat_result) -> Signature:
        return cls(
            status.st_dev,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
            stat.S_IMODE(status.st_mode),
            status.st_uid,
        )

    @property
    def identity(self) -> tuple[int, int]:
        return self.device, self.inode


@dataclass(slots=True)
class Scan:
    """Paths are relative to the agent's root, as `os.fsdecode` gives them.

    files: plain files to be captured byte for byte; databases: by header; git_files: what lies in the
    memdir's `.git`, only listed (its content is captured through libgit2)
    """

    files: dict[str, Signature] = field(default_factory=dict)
    databases: dict[str, Signature] = field(default_factory=dict)
    directories: dict[str, int] = field(default_factory=dict)
    symlinks: dict[str, str] = field(default_factory=dict)
    excluded: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: dict[str, Failure] = field(default_factory=dict)
    suspects: dict[str, Failure] = field(default_factory=dict)
    """Files that should be databases and are not: kept as raw bytes, the snapshot incomplete."""

    def exclusions(self) -> tuple[Excluded, ...]:
        return tuple(
            Excluded(reason=reason, pattern=pattern, count=count)
            for (reason, pattern), count in sorted(self.excluded.items())
        )


class Patterns:
    """Globs over paths relative to the root. With `anywhere`, one without a slash matches at any depth."""

    def __init__(self, patterns: tuple[str, ...], *, anywhere: bool) -> None:
        spread = [f"**/{p}" if anywhere and "/" not in p else p for p in patterns]
        self._named = [
            (pattern, re.compile(regex))
            for pattern, written in zip(patterns, spread, strict=True)
            for regex in glob.translate([written], flags=_GLOB_FLAGS)[0]
        ]
        # `cache/**` leaves out all that is in cache, so there is no need to look into it.
        self._whole = [
            (pattern, re.compile(regex))
            for pattern, written in zip(patterns, spread, strict=True)
            if written.endswith("/**")
            for regex in glob.translate([written[:-3]], flags=_GLOB_FLAGS)[0]
        ]

    def matching(self, path: str) -> str | None:
        """The first pattern that matches, or None."""
        return next((pattern for pattern, regex in self._named if regex.fullmatch(path)), None)

    def matching_directory(self, path: str) -> str | None:
        """The first pattern that matches a directory itself or all that is in it, or None."""
        return next((pattern for pattern, regex in self._whole if regex.fullmatch(path)), self.matching(path))


class Scanner:
    """Scans one agent, again and again, remembering which files were seen to be databases."""

    def __init__(self, spec: AgentSpec) -> None:
        self._spec = spec
        self._include = Patterns(spec.include, anywhere=False)
        self._sqlite = Patterns(spec.sqlite, anywhere=False)
        self._exclude = Patterns(spec.exclude, anywhere=True)
        self._secrets = Patterns(spec.secrets, anywhere=True)
        self._starts = _walk_starts(spec)
        self._git_directory = spec.relative(spec.memdir / ".git") if spec.memdir else None
        self._memdir = spec.relative(spec.memdir) if spec.memdir else None
        self._state_files = {str(state.file) for state in spec.states if state.file}
        # Matching patterns is the dear part of a scan, and its outcome for a path never changes.
        self._file_verdicts: dict[str, bool | tuple[str, str]] = {}
        self._directory_verdicts: dict[str, tuple[str, str] | None] = {}
        self._known: dict[tuple[int, int, int], bool] = {}
        # Whatever was seen to be a database, or is named as one: its sidecars are never opened.
        self._database_names = {spec_path(spec, s.sqlite) for s in spec.states if s.sqlite is not None}
        self.held_open: set[tuple[int, int]] = set()
        """Identities of files that SQLite has open for us: never opened here."""

    def scan(self) -> Scan:
        """Walk the root. Raises nothing for what it meets: that is in `failures`."""
        found = Scan()
        for start in self._starts:
            self._walk(start, found)
        self._drop_sidecars(found)
        self._judge_suspects(found)
        self._check_required(found)
        return found

    def _walk(self, start: str, found: Scan) -> None:
        pending = [start]
        while pending:
            directory = pending.pop()
            for entry, path in self._entries(directory, found):
                if path in found.files or path in found.databases:
                    continue  # two starts may overlap
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # gone between listing and looking: the next reading decides
                except OSError as exc:  # a directory may be open to be listed and not to be entered
                    found.failures[directory] = self._closed(directory, exc)
                    break
                if stat.S_ISDIR(status.st_mode):
                    if self._enters(path, found):
                        found.directories[path] = stat.S_IMODE(status.st_mode)
                        pending.append(path)
                elif self._wanted(path, found):
                    self._classify(path, status, found)

    def _entries(self, directory: str, found: Scan) -> Iterator[tuple[os.DirEntry[str], str]]:
        try:
            with os.scandir(self._spec.root / directory) as entries:
                for entry in entries:
                    yield entry, entry.name if directory == "." else f"{directory}/{entry.name}"
        except FileNotFoundError:
            return
        except OSError as exc:
            found.failures[directory] = self._closed(directory, exc)

    def _closed(self, directory: str, exc: OSError) -> Failure:
        return Failure(
            source=str(self._spec.root / directory),
            reason=f"cannot look into the directory: {exc.strerror}",
            hint="run agentkeep as the user who owns the agent's files",
        )

    def _enters(self, path: str, found: Scan) -> bool:
        if path == self._git_directory:
            return False
        if path not in self._directory_verdicts:
            pattern = self._exclude.matching_directory(path)
            self._directory_verdicts[path] = None if pattern is None else ("excluded by pattern", pattern)
        verdict = self._directory_verdicts[path]
        if verdict is not None:
            found.excluded[verdict] += 1
        return verdict is None

    def _wanted(self, path: str, found: Scan) -> bool:
        if path not in self._file_verdicts:
            self._file_verdicts[path] = self._judge(path)
        verdict = self._file_verdicts[path]
        if isinstance(verdict, tuple):
            found.excluded[verdict] += 1
        return verdict is True

    def _judge(self, path: str) -> bool | tuple[str, str]:
        """Whether a file is wanted; if it is left out on purpose, why and by which pattern."""
        if path == self._git_directory or str(self._spec.root / path) in self._state_files:
            return False  # captured as a repository, and as a state value
        if self._include.matching(path) is None and not self._in_memdir(path):
            return False
        if (pattern := self._secrets.matching(path)) is not None:
            return "looks like a secret", pattern
        if (pattern := self._exclude.matching(path)) is not None:
            return "excluded by pattern", pattern
        return True

    def _in_memdir(self, path: str) -> bool:
        return self._memdir is not None and (self._memdir == "." or path.startswith(f"{self._memdir}/"))

    def _classify(self, path: str, status: os.stat_result, found: Scan) -> None:
        if stat.S_ISLNK(status.st_mode):
            try:
                found.symlinks[path] = os.readlink(self._spec.root / path)  # noqa: PTH115  exact bytes
            except FileNotFoundError:
                return
        elif not stat.S_ISREG(status.st_mode):
            found.excluded["neither file nor directory", _type_name(status.st_mode)] += 1
        else:
            self._classify_file(path, Signature.of(status), found)

    def _classify_file(self, path: str, signature: Signature, found: Scan) -> None:
        try:
            is_database = self._is_database(path, signature)
        except FileNotFoundError:
            return
        except OSError as exc:
            found.failures[path] = Failure(
                source=str(self._spec.root / path),
                reason=f"cannot be read: {exc.strerror}",
                hint="run agentkeep as the user who owns the agent's files, or exclude this one",
            )
            return
        (found.databases if is_database else found.files)[path] = signature

    def _is_database(self, path: str, signature: Signature) -> bool:
        if signature.identity in self.held_open:
            return True
        if self._is_sidecar(path):
            return False
        # Looked at again when it changes: its inode may be another file's by then.
        key = (*signature.identity, signature.ctime_ns)
        if key not in self._known:
            self._known[key] = _has_sqlite_header(self._spec.root / path)
        return self._known[key]

    def _is_sidecar(self, path: str) -> bool:
        """By name and neighbour, never by content: SQLite holds locks on a `-shm`, which closing any
        descriptor of it in this process would drop, and with them the pin."""
        bases = [path.removesuffix(suffix) for suffix in SIDECARS if path.endswith(suffix)]
        return any(base in self._database_names or os.path.lexists(self._spec.root / base) for base in bases)

    def _drop_sidecars(self, found: Scan) -> None:
        self._database_names |= found.databases.keys()
        for path in self._database_names:
            for suffix in SIDECARS:
                if found.files.pop(path + suffix, None) is not None:
                    found.excluded["SQLite sidecar, read through its database", f"*{suffix}"] += 1

    def _judge_suspects(self, found: Scan) -> None:
        """A named database, or a file with a database's name or sidecars, has to have a database's header."""
        for path, signature in list(found.files.items()):
            named = self._sqlite.matching(path) is not None
            # Others call their files .db too, but seldom of a size in whole pages.
            is_paged_db = path.endswith(".db") and signature.size_bytes % _SMALLEST_PAGE_BYTES == 0
            looks = is_paged_db or path.endswith(_SQLITE_SUFFIXES) or f"{path}-wal" in found.files
            if not named and (not looks or signature.size_bytes == 0):
                continue
            found.suspects[path] = Failure(
                source=str(self._spec.root / path),
                reason="not a SQLite database: its header is missing (corrupt, encrypted or empty)",
                hint="repair it or restore it from an earlier snapshot; if it is no database, exclude it",
            )
            for suffix in SIDECARS:
                if f"{path}{suffix}" in found.files:
                    found.suspects.setdefault(f"{path}{suffix}", found.suspects[path])
        for path in found.suspects:
            del found.files[path]

    def _check_required(self, found: Scan) -> None:
        for required in self._spec.required:
            if not os.path.lexists(self._spec.root / required):
                found.failures[required] = _missing(str(self._spec.root / required))
            elif (self._spec.root / required).is_symlink():
                found.failures[required] = Failure(
                    source=str(self._spec.root / required),
                    reason="is a symbolic link, which is recorded but not followed",
                    hint="name the file that it points to",
                )
        for pattern in self._spec.sqlite:
            if pattern in self._spec.required:
                continue
            matcher = Patterns((pattern,), anywhere=False)
            if not any(matcher.matching(path) for path in [*found.databases, *found.suspects]):
                found.failures[pattern] = _missing(str(self._spec.root / pattern))


def spec_path(spec: AgentSpec, path: Path) -> str:
    """As in a scan: relative to the root, or absolute outside of it."""
    return spec.relative(path) if path.is_relative_to(spec.root) else str(path)


def _missing(path: str) -> Failure:
    return Failure(
        source=path,
        reason="nothing is there",
        hint="mend the path in the configuration, or bring the file back from an earlier snapshot",
    )


def _walk_starts(spec: AgentSpec) -> list[str]:
    """The directories below the root in which something can match: the fixed heads of the patterns."""
    starts = {fixed_head(pattern) for pattern in (*spec.include, *spec.sqlite)}
    if spec.memdir is not None:
        starts.add(spec.relative(spec.memdir))
    kept: list[str] = []
    for start in sorted(starts, key=lambda start: (start != ".", len(start))):
        if not any(above == "." or start == above or start.startswith(f"{above}/") for above in kept):
            kept.append(start)
    return kept


def _has_sqlite_header(path: Path) -> bool:
    with open_quietly(path) as stream:
        return os.read(stream, 16) == SQLITE_MAGIC


class open_quietly:  # noqa: N801  reads as a function where it is used
    """A descriptor for reading a regular file: no link followed, no FIFO waited for, no access time moved."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self._descriptor = os.open(path, flags | os.O_NOATIME)
        except PermissionError:  # O_NOATIME is the owner's privilege
            self._descriptor = os.open(path, flags)

    def __enter__(self) -> int:
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def _type_name(mode: int) -> str:
    if stat.S_ISSOCK(mode):
        return "socket"
    if stat.S_ISFIFO(mode):
        return "fifo"
    return "device"
