"""Finding what an agent consists of: one walk of its root, each entry classified, nothing followed.

A scan is also a reading: two scans that are equal, with every signature older than the file system's
time granularity, prove that no plain file changed in between (see cut.py). SQLite databases are told
by their header, never by their suffix; their content is none of a scan's business.

What is left out on purpose is counted, with why and by which pattern. Where all of a root is looked at
(`walk_all`), so is what no pattern takes.

Must not: follow a symlink, open a file that SQLite holds open in this process, or its sidecars (closing
any descriptor of them would drop SQLite's POSIX locks; https://sqlite.org/howtocorrupt.html, 2.2).
"""

from __future__ import annotations

import os
import stat
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from daemon.capture.patterns import Patterns, directories_of
from daemon.model import (
    AgentSpec,
    Excluded,
    Failure,
    fixed_head,
    has_wildcard,
    presentable,
    stays_inside,
)

SQLITE_MAGIC = b"SQLite format 3\x00"
RECENT_NS = 60_000_000_000
SIDECARS = ("-wal", "-shm", "-journal")
_SQLITE_SUFFIXES = (".sqlite", ".sqlite3", ".db3")
_SMALLEST_PAGE_BYTES = 512

SECRET = "looks like a secret"  # noqa: S105  a reason, not a secret
EXCLUDED = "excluded by pattern"
OUTSIDE = "not part of the profile"
LINK_OUT = "what it leads to lies outside of the agent and is not captured", "symbolic link"
_SIDECAR = "SQLite sidecar, read through its database"
_OTHERS = "(other entries)"
_MOST_GROUPS = 20
_MOST_EXAMPLES = 3

LeftOut = tuple[str, str]
"""Why, and by which pattern (for what is not part of the profile: below which entry of the root)."""


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


Listing = frozenset[tuple[str, str]]
"""Names, each with what it is: a file, a directory, or a link by its target."""


@dataclass(slots=True)
class Scan:
    """Paths are relative to the agent's root, as `os.fsdecode` gives them.

    files: plain files to be captured byte for byte; databases: by header; git_files: what lies in the
    memdir's `.git`, only listed (its content is captured through libgit2)
    excluded: how many entries were left out on purpose, a directory that was not entered being one;
    examples: a few of their paths
    marks: of every directory that was looked into; what comes, goes or is renamed in it moves its mtime
    listings: of those that were moved within the last minute, what was wanted in them
    """

    began_ns: int = field(default_factory=time.time_ns)
    files: dict[str, Signature] = field(default_factory=dict)
    databases: dict[str, Signature] = field(default_factory=dict)
    directories: dict[str, int] = field(default_factory=dict)
    marks: dict[str, Signature] = field(default_factory=dict)
    listings: dict[str, Listing] = field(default_factory=dict)
    symlinks: dict[str, str] = field(default_factory=dict)
    excluded: Counter[LeftOut] = field(default_factory=Counter)
    examples: dict[LeftOut, list[str]] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    suspects: dict[str, Failure] = field(default_factory=dict)
    """Files that should be databases and are not: kept as raw bytes, the snapshot incomplete."""

    def leave_out(self, why: LeftOut, path: str) -> None:
        self.excluded[why] += 1
        examples = self.examples.setdefault(why, [])
        if len(examples) < _MOST_EXAMPLES:
            examples.append(path)

    def exclusions(self) -> tuple[Excluded, ...]:
        return tuple(
            Excluded(reason=reason, pattern=presentable(pattern), count=count)
            for (reason, pattern), count in sorted(self.excluded.items())
        )

    def fold_small_groups(self) -> None:
        """Keep the manifest short whatever lies in the root: name the largest groups of what is not part
        of the profile, count the rest together."""
        groups = sorted((why for why in self.excluded if why[0] == OUTSIDE), key=self._by_count)
        rest = (OUTSIDE, _OTHERS)
        for why in groups[_MOST_GROUPS:]:
            self.excluded[rest] += self.excluded.pop(why)
            self.examples[rest] = (self.examples.get(rest, []) + self.examples.pop(why))[:_MOST_EXAMPLES]

    def _by_count(self, why: LeftOut) -> tuple[int, str]:
        return -self.excluded[why], why[1]


class Scanner:
    """Scans one agent, again and again, remembering which files were seen to be databases."""

    def __init__(self, spec: AgentSpec) -> None:
        self._spec = spec
        self._root = str(spec.root)
        self._include = Patterns((*spec.include, *spec.sqlite), anywhere=False)
        self._sqlite = Patterns(spec.sqlite, anywhere=False)
        self._exclude = Patterns(spec.exclude, anywhere=True)
        # Whoever writes `Credentials.json` means the same.
        self._secrets = Patterns(spec.secrets, anywhere=True, ignore_case=True)
        # Both at once, to be done with most files: what it takes for left out may not be.
        self._perhaps_left_out = Patterns((*spec.exclude, *spec.secrets), anywhere=True, ignore_case=True)
        directories = directories_of((*spec.include, *spec.sqlite))
        self._reach = Patterns(directories, anywhere=False)
        self._expected = frozenset(path for path in directories if not has_wildcard(path))
        self._starts = ["."] if spec.walk_all else _walk_starts(spec)
        self._git_directory = spec.relative(spec.memdir / ".git") if spec.memdir else None
        self._memdir = spec.relative(spec.memdir) if spec.memdir else None
        self._named = frozenset(spec.named)
        # All that is in these is taken, and what leads to them is entered.
        self._trees = tuple(f"{tree}/" for tree in (*spec.named, self._memdir) if tree not in (None, "."))
        self._state_files = {spec_path(spec, state.file) for state in spec.states if state.file}
        # Matching patterns is the dear part of a scan, and its outcome for a path never changes.
        self._file_verdicts: dict[str, bool | LeftOut] = {}
        self._directory_verdicts: dict[str, LeftOut | None] = {}
        # Directories that are left out but for what is named in them.
        self._passages: dict[str, LeftOut] = {}
        self._known: dict[tuple[int, int, int], bool] = {}
        # Whatever was seen to be a database, or is named as one: its sidecars are never opened.
        self._database_names = {spec_path(spec, s.sqlite) for s in spec.states if s.sqlite is not None}
        self.held_open: set[tuple[int, int]] = set()
        """Identities of files that SQLite has open for us: never opened here."""

    def scan(self) -> Scan:
        """Walk the root. Raises nothing for what it meets: that is in `failures`."""
        found = Scan()
        for start in self._starts:
            if all(self._enters(directory, found) for directory in _way_to(start)):
                self._walk(start, found)
                self._note_modes(_way_to(start), found)
        self._drop_sidecars(found)
        self._refuse_large(found)
        self._judge_suspects(found)
        self._check_required(found)
        found.fold_small_groups()
        return found

    def _note_modes(self, directories: list[str], found: Scan) -> None:
        """Of the directories that lead to where a walk starts, and of that one."""
        for directory in directories:
            with suppress(OSError):
                status = os.lstat(self._at(directory))
                if stat.S_ISDIR(status.st_mode):
                    found.directories[directory] = stat.S_IMODE(status.st_mode)

    def _walk(self, start: str, found: Scan) -> None:
        pending = [start]
        while pending:
            directory = pending.pop()
            self._mark(directory, found)
            listing: set[tuple[str, str]] = set()
            for entry, path in self._entries(directory, found):
                try:
                    if entry.is_dir(follow_symlinks=False):
                        if self._enters(path, found):
                            mode = entry.stat(follow_symlinks=False).st_mode
                            found.directories[path] = stat.S_IMODE(mode)
                            pending.append(path)
                            listing.add((entry.name, "directory"))
                    elif self._wanted(path, found):
                        self._classify(path, entry.stat(follow_symlinks=False), found)
                        if directory in found.listings:
                            listing.update(self._listed(entry, path))
                except FileNotFoundError:
                    continue  # gone between listing and looking: the next reading decides
                except OSError as exc:  # a directory may be open to be listed and not to be entered
                    found.failures[directory] = self._closed(directory, exc)
                    break
            if directory in found.listings:
                found.listings[directory] = frozenset(listing)

    def _mark(self, directory: str, found: Scan) -> None:
        """Note how a directory is before it is looked into, and whether it was moved lately."""
        with suppress(OSError):  # gone, or closed: looking into it says so
            found.marks[directory] = mark = Signature.of(os.stat(self._at(directory)))  # noqa: PTH116
            if max(mark.mtime_ns, mark.ctime_ns) > found.began_ns - RECENT_NS:
                found.listings[directory] = frozenset()

    def _listed(self, entry: os.DirEntry[str], path: str) -> Iterator[tuple[str, str]]:
        """Sidecars come and go with connections, ours among them, and are read through their database."""
        if entry.is_symlink():
            yield entry.name, f"link to {os.readlink(self._at(path))}"  # noqa: PTH115  exact bytes
        elif not self._is_sidecar(path):
            yield entry.name, "file"

    def listing(self, directory: str) -> Listing | None:
        """What is wanted in a directory now, as a scan lists it; None if it cannot be looked into."""
        found = Scan()
        listing: set[tuple[str, str]] = set()
        for entry, path in self._entries(directory, found):
            try:
                if entry.is_dir(follow_symlinks=False):
                    if self._enters(path, found):
                        listing.add((entry.name, "directory"))
                elif self._wanted(path, found):
                    listing.update(self._listed(entry, path))
            except OSError:
                return None
        return None if found.failures else frozenset(listing)

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
            self._directory_verdicts[path] = self._judge_directory(path)
        left_out = self._directory_verdicts[path]
        if left_out is None or path in self._passages:
            return True
        if left_out[0] != OUTSIDE or self._spec.walk_all:
            found.leave_out(left_out, path)
        return False

    def _judge_directory(self, path: str) -> LeftOut | None:
        """Why and by which pattern a directory is left out, if it is."""
        if path in self._named:
            return None
        left_out = self._passages.get(_parent(path)) or self._left_out_directory(path)
        if left_out is not None and any(tree.startswith(f"{path}/") for tree in self._named):
            self._passages[path] = left_out
        return left_out

    def _left_out_directory(self, path: str) -> LeftOut | None:
        outside = None if self._is_reached(path) else (OUTSIDE, f"{path.partition('/')[0]}/")
        if outside is not None and not self._spec.walk_all:
            return outside
        if (pattern := self._secrets.matching_directory(path)) is not None:
            return SECRET, pattern
        if (pattern := self._exclude.matching_directory(path)) is not None:
            return EXCLUDED, pattern
        return outside

    def _is_reached(self, path: str) -> bool:
        """Whether anything in a directory could be wanted."""
        leads_on = any(tree.startswith(f"{path}/") for tree in self._trees)
        return leads_on or self._in_trees(path) or self._reach.matching(path) is not None

    def _wanted(self, path: str, found: Scan) -> bool:
        if path not in self._file_verdicts:
            self._file_verdicts[path] = self._judge(path)
        verdict = self._file_verdicts[path]
        if isinstance(verdict, tuple):
            found.leave_out(verdict, path)
        return verdict is True

    def _judge(self, path: str) -> bool | LeftOut:
        """Whether a file is wanted; if it is left out on purpose, why and by which pattern."""
        if path == self._git_directory or path in self._state_files:
            return False  # captured as a repository, and as a state value
        if path in self._named:
            return True
        if (passage := self._passages.get(_parent(path))) is not None:
            return passage
        own = self._judge_by_patterns(path)
        # A sidecar holds what its database holds, so it goes where that goes.
        base = _sidecar_base(path)
        if base is None or (isinstance(own, tuple) and own[0] != OUTSIDE):
            return own
        its = True if base in self._named else self._judge_by_patterns(base)
        if isinstance(its, tuple) and its[0] != OUTSIDE:
            return its
        return True if its is True else own

    def _judge_by_patterns(self, path: str) -> bool | LeftOut:
        is_taken = self._is_included(path) or self._is_in_the_way(path)
        if not is_taken and not self._spec.walk_all:
            return False
        if self._perhaps_left_out.matching(path) is not None:
            if (pattern := self._secrets.matching(path)) is not None:
                return SECRET, pattern
            if (pattern := self._exclude.matching(path)) is not None:
                return EXCLUDED, pattern
        top, slash, _ = path.partition("/")
        return True if is_taken else (OUTSIDE, top + slash)

    def _is_included(self, path: str) -> bool:
        return self._in_trees(path) or self._include.matching(path) is not None

    def _is_in_the_way(self, path: str) -> bool:
        """Whether a file, or a link, has the name of a directory of the profile."""
        return self._spec.walk_all and path in self._expected

    def _in_trees(self, path: str) -> bool:
        return self._memdir == "." or f"{path}/".startswith(self._trees)

    def _classify(self, path: str, status: os.stat_result, found: Scan) -> None:
        if stat.S_ISLNK(status.st_mode):
            try:
                found.symlinks[path] = target = os.readlink(self._at(path))  # noqa: PTH115  exact bytes
            except FileNotFoundError:
                return
            if not self._is_included(path) and os.path.isdir(self._at(path)):  # noqa: PTH112
                found.failures[path] = _not_followed(self._at(path))
            elif not stays_inside(path, target):
                found.leave_out(LINK_OUT, path)
        elif not stat.S_ISREG(status.st_mode):
            found.leave_out(("neither file nor directory", _type_name(status.st_mode)), path)
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
        # One that was cut within its first page is still a database, and has to be named as damaged.
        if signature.size_bytes < len(SQLITE_MAGIC) or self._is_sidecar(path):
            return False
        # Looked at again when it changes: its inode may be another file's by then.
        key = (*signature.identity, signature.ctime_ns)
        if key not in self._known:
            self._known[key] = _has_sqlite_header(self._at(path))
        return self._known[key]

    def _is_sidecar(self, path: str) -> bool:
        """By name and neighbour, never by content: SQLite holds locks on a `-shm`, which closing any
        descriptor of it in this process would drop, and with them the pin."""
        base = _sidecar_base(path)
        return base is not None and (base in self._database_names or os.path.lexists(self._at(base)))

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"  # a Path would cost as much as opening the file

    def _drop_sidecars(self, found: Scan) -> None:
        self._database_names |= found.databases.keys()
        for path in self._database_names:
            for suffix in SIDECARS:
                if found.files.pop(path + suffix, None) is not None:
                    found.leave_out((_SIDECAR, f"*{suffix}"), path + suffix)

    def _refuse_large(self, found: Scan) -> None:
        """What is larger than the configuration allows is named, never quietly left out."""
        limit_bytes = self._spec.max_file_bytes
        if limit_bytes is None:
            return
        for kind in (found.files, found.databases):
            for path in [path for path, signature in kind.items() if signature.size_bytes > limit_bytes]:
                found.failures[path] = Failure(
                    source=str(self._spec.root / path),
                    reason=f"has {kind.pop(path).size_bytes:,} bytes; max_file_bytes allows {limit_bytes:,}",
                    hint="raise max_file_bytes for this agent, or exclude the file",
                )

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
            if (reason := self._reason_against(required)) is not None:
                found.failures[required] = reason
        for pattern in self._spec.sqlite:
            if pattern in self._spec.required:
                continue
            matcher = Patterns((pattern,), anywhere=False)
            if not any(map(matcher.matching, [*found.databases, *found.suspects, *found.failures])):
                found.failures[pattern] = _missing(str(self._spec.root / pattern))

    def _reason_against(self, required: str) -> Failure | None:
        path = self._spec.root / required
        if not os.path.lexists(path):
            return _missing(str(path))
        if path.is_symlink():
            return _not_followed(str(path))
        for directory in _way_to(required) if required not in self._named else ():
            if (left_out := self._directory_verdicts.get(directory)) is not None:
                return Failure(
                    source=str(path),
                    reason=f"left out: {left_out[0]} ({left_out[1]})",
                    hint="name its files without wildcards, mend `exclude`, or set include_secrets = true",
                )
        return None


def spec_path(spec: AgentSpec, path: Path) -> str:
    """As in a scan: relative to the root, or absolute outside of it."""
    return spec.relative(path) if path.is_relative_to(spec.root) else str(path)


def _not_followed(path: str) -> Failure:
    return Failure(
        source=path,
        reason="is a symbolic link, which is recorded but not followed",
        hint="name what it points to, in an agent of its own if it lies elsewhere; or exclude the link",
    )


def _missing(path: str) -> Failure:
    return Failure(
        source=path,
        reason="nothing is there",
        hint="mend the path in the configuration, or bring the file back from an earlier snapshot",
    )


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _way_to(path: str) -> list[str]:
    """The directories from below the root to `path`, it included."""
    parts = [] if path == "." else path.split("/")
    return ["/".join(parts[: depth + 1]) for depth in range(len(parts))]


def _sidecar_base(path: str) -> str | None:
    return path.rpartition("-")[0] if path.endswith(SIDECARS) else None


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


def _has_sqlite_header(path: str) -> bool:
    with open_quietly(path) as stream:
        return os.read(stream, 16) == SQLITE_MAGIC


class open_quietly:  # noqa: N801  reads as a function where it is used
    """A descriptor for reading a regular file: no link followed, no FIFO waited for, no access time moved."""

    def __init__(self, path: Path | str) -> None:
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
