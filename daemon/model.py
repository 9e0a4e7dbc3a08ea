"""The nouns: ids, what an agent consists of, header, manifest. Frozen data, no I/O.

Everything here that is read back from a bundle is hostile until validated: pydantic checks types and
bounds, the bundle's reader checks digests and the seal.
"""

from __future__ import annotations

import base64
import os
import re
import secrets
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

BUNDLE_FORMAT = "agentkeep-bundle"
FORMAT_VERSION = 1
HEADER_NAME = "agentkeep.json"
MANIFEST_NAME = "manifest.json"
PLAIN_SUFFIX = ".tar.zst"
ENCRYPTED_SUFFIX = ".tar.zst.age"
SIBLING_SUFFIX = ".sha256"

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,62}[a-z0-9])?\Z")
_UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\Z")
_LAST_TIME = "e677d21f-dbff"  # the last millisecond of the year 9999, the last that datetime knows
_KEY = re.compile(
    r"tenants/(?P<tenant>[^/]+)/snapshots/(?P<agent>[^/]+)/(?P<id>[^/]+?)(?P<suffix>\.tar\.zst(?:\.age)?)\Z"
)


# --- ids and keys ---------------------------------------------------------------------------------


def is_valid_name(name: str) -> bool:
    """Whether `name` may be an agent id or a tenant: `[a-z0-9_-]`, 1..64, no punctuation at its ends."""
    return bool(_NAME.match(name))


def is_snapshot_id(text: str) -> bool:
    """Whether `text` is a UUIDv7 in its canonical spelling, of a time that has a date."""
    return bool(_UUID7.match(text)) and text[:13] <= _LAST_TIME


def new_snapshot_id(*, at_ms: int | None = None) -> str:
    """A UUIDv7 (RFC 9562, section 5.7): its text sorts by the millisecond it was made in."""
    ms = time.time_ns() // 1_000_000 if at_ms is None else at_ms
    value = (ms & (1 << 48) - 1) << 80 | 7 << 76 | secrets.randbits(12) << 64 | 2 << 62 | secrets.randbits(62)
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def snapshot_time(snapshot_id: str) -> datetime:
    """The instant in a snapshot id, aware UTC."""
    return datetime.fromtimestamp(int(snapshot_id.replace("-", "")[:12], 16) / 1000, UTC)


@dataclass(frozen=True, slots=True)
class BundleKey:
    """A bundle's place, the same under `state_dir` and under a destination's prefix."""

    tenant: str
    agent_id: str
    snapshot_id: str
    encrypted: bool

    def __str__(self) -> str:
        return agent_prefix(self.tenant, self.agent_id) + self.file_name

    @property
    def file_name(self) -> str:
        return self.snapshot_id + (ENCRYPTED_SUFFIX if self.encrypted else PLAIN_SUFFIX)

    @property
    def sibling(self) -> str:
        return str(self) + SIBLING_SUFFIX

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The key in `text`, or None if it is not exactly one."""
        match = _KEY.match(text)
        if match is None:
            return None
        tenant, agent, snapshot_id = match["tenant"], match["agent"], match["id"]
        if not (is_valid_name(tenant) and is_valid_name(agent) and is_snapshot_id(snapshot_id)):
            return None
        return cls(tenant, agent, snapshot_id, match["suffix"] == ENCRYPTED_SUFFIX)


def agent_prefix(tenant: str, agent_id: str) -> str:
    return f"tenants/{tenant}/snapshots/{agent_id}/"


# --- what is captured -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StateSource:
    """A small value captured as JSON: a file that holds it, the rows of a query (`:agent` is bound), or what
    a command of the local configuration prints.

    restore_command: takes the value on its stdin when the agent is brought back
    optional: that there is none is no failure (a profile's own values)
    """

    name: str
    file: Path | None = None
    sqlite: Path | None = None
    query: str | None = None
    command: tuple[str, ...] = ()
    restore_command: tuple[str, ...] = ()
    optional: bool = False


@dataclass(frozen=True, slots=True)
class AgentSpec:
    """What one agent consists of. Patterns are globs relative to `root`, `**` crossing directories.

    include: what is looked at; a SQLite database among it is recognised by its header
    sqlite: patterns that must match, and match databases only: their absence is a failure, not silence
    required: plain paths relative to `root` that must be there
    exclude, secrets: what is left out, and why it is (secrets are counted apart)
    named: plain paths relative to `root` that the user spelled out: neither `exclude` nor `secrets` leave
        them out
    secret_tables: globs of SQLite tables whose rows are left out of the copies
    memdir: the git work tree (or plain directory) that goes to `memory_files/`; None: the first of
        `memdir_candidates` (relative) that is a repository when the snapshot is taken, if any
    walk_all: look at everything below `root`, so that what no pattern takes is counted too
    before, after: commands run around each capture (freeze and thaw), `after` whatever happened
    command_timeout_seconds: for each of them and for the commands of state values
    require_point_in_time: rather no snapshot than one that is `per_source`
    max_file_bytes, max_agent_bytes: what is larger fails, loudly; None: no limit
    """

    tenant: str
    agent_id: str
    root: Path
    include: tuple[str, ...]
    memdir: Path | None = None
    sqlite: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    states: tuple[StateSource, ...] = ()
    memdir_candidates: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    secret_tables: tuple[str, ...] = ()
    walk_all: bool = False
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    command_timeout_seconds: float = 60.0
    require_point_in_time: bool = False
    max_file_bytes: int | None = None
    max_agent_bytes: int | None = None

    def relative(self, path: Path) -> str:
        """`path` relative to the root, as text with `/`. Raises ValueError outside the root."""
        return str(PurePosixPath(path.relative_to(self.root)))


def mtime_text(mtime_ns: int) -> str:
    """`1732370400.000000001`, the inverse of `mtime_ns_of`."""
    seconds, nanoseconds = divmod(mtime_ns, 1_000_000_000)
    return f"{seconds}.{nanoseconds:09d}"


def mtime_ns_of(text: str) -> int:
    seconds, _, nanoseconds = text.partition(".")
    return int(seconds) * 1_000_000_000 + int(nanoseconds)


def has_wildcard(pattern: str) -> bool:
    return any(char in pattern for char in "*?[")


def fixed_head(pattern: str) -> str:
    """The directory that a glob's first wildcard (or its last part) lies in; "." is where it starts."""
    parts = pattern.split("/")
    fixed = 0
    while fixed < len(parts) - 1 and not has_wildcard(parts[fixed]):
        fixed += 1
    return "/".join(parts[:fixed]) or ("/" if pattern.startswith("/") else ".")


# --- names inside a bundle ------------------------------------------------------------------------


def needs_escape(raw: bytes) -> bool:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return True
    return any(ord(char) < 0x20 or char in "\x7f\\" for char in text)


def to_member_name(path: str) -> str:
    r"""A file's relative path (as `os.fsdecode` gives it) as a name that every tool can hold.

    Clean UTF-8 stays as it is. A path with control characters, a backslash or bytes that are not UTF-8
    has each such byte written as `\xHH`. Injective, since a backslash itself is always written so.
    """
    raw = os.fsencode(path)
    if not needs_escape(raw):
        return path
    parts: list[str] = []
    for char in path:
        code = ord(char)
        if 0xDC80 <= code <= 0xDCFF:  # how fsdecode carries a byte that is not UTF-8
            parts.append(f"\\x{code - 0xDC00:02x}")
        elif code < 0x20 or char in "\x7f\\":
            parts.append(f"\\x{code:02x}")
        else:
            parts.append(char)
    return "".join(parts)


MAX_MEMBER_NAME_CHARS = 5 * 4096
"""The longest path that Linux knows, each of its bytes escaped, has room."""
_ESCAPE = re.compile(r"\\x([0-9a-f]{2})")


def from_member_name(name: str) -> str:
    """The inverse of `to_member_name`. Raises ValueError if `name` is not one that it would write."""
    path = _ESCAPE.sub(
        lambda match: chr(code + 0xDC00 if (code := int(match[1], 16)) >= 0x80 else code), name
    )
    path = os.fsdecode(os.fsencode(path))  # escaped bytes that make up a character are not canonical
    if to_member_name(path) != name:
        raise ValueError(f"not a canonical member name: {name!r}")
    return path


def is_safe_member_name(name: str) -> bool:
    """Whether a name from outside may become a path: relative, canonical, no `.`, `..` or empty parts."""
    try:
        path = from_member_name(name)
    except ValueError:
        return False
    if "\0" in path or len(name) > MAX_MEMBER_NAME_CHARS:
        return False
    return not any(part in ("", ".", "..") for part in path.split("/"))


def stays_inside(place: str, target: str) -> bool:
    """Whether a symlink at `place` (relative to a tree) with this target stays within the tree."""
    if target.startswith("/") or not target:
        return False
    resolved = os.path.normpath(os.path.join(os.path.dirname(place), target))  # noqa: PTH118, PTH120
    return resolved != ".." and not resolved.startswith("../")


def encode_bytes(path: str) -> str:
    """A symlink's target (any bytes) as text for JSON."""
    return base64.b64encode(os.fsencode(path)).decode()


# --- header and manifest --------------------------------------------------------------------------


def _check_member_name(name: str) -> str:
    if not is_safe_member_name(name):
        raise ValueError("not a safe member name")
    return name


def _check_name(name: str) -> str:
    if not is_valid_name(name):
        raise ValueError("not a valid agent id or tenant")
    return name


def _check_snapshot_id(text: str) -> str:
    if not is_snapshot_id(text):
        raise ValueError("not a UUIDv7")
    return text


def presentable(text: str) -> str:
    """A path may hold bytes that are not UTF-8; what is said of it may not. Idempotent."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _one_line(text: str) -> str:
    """SQLite explains itself in several. Idempotent."""
    return " ".join(presentable(text).split())


Presentable = Annotated[str, AfterValidator(presentable)]
OneLine = Annotated[str, AfterValidator(_one_line)]


def _check_link_target(text: str) -> str:
    target = base64.b64decode(text, validate=True)
    if not 0 < len(target) < 4096 or b"\0" in target or base64.b64encode(target).decode() != text:
        raise ValueError("not the target of a symbolic link")
    return text


LinkTarget = Annotated[str, AfterValidator(_check_link_target)]
MemberName = Annotated[str, AfterValidator(_check_member_name)]
Name = Annotated[str, AfterValidator(_check_name)]
SnapshotId = Annotated[str, AfterValidator(_check_snapshot_id)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=(1 << 53) - 1)]  # what any JSON reader holds exactly
Mode = Annotated[int, Field(ge=0, le=0o7777)]


class ArtifactKind(StrEnum):
    GIT_BUNDLE = "git_bundle"
    GIT_INDEX = "git_pack_index"
    MEMORY_FILE = "memory_file"
    SQLITE = "sqlite"
    FILE = "file"
    STATE = "state"
    OPAQUE = "opaque"
    """Raw bytes of something that could not be captured properly: kept, never trusted."""


class _Record(BaseModel):
    # Unknown fields of a later minor revision are kept out of our way; the seal still covers them.
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Ceilings(_Record):
    """What a reader may have to hold: known before the first byte is unpacked, never exceeded."""

    members: Annotated[int, Field(ge=0, le=500_000)]
    total_bytes: Count


class Header(_Record):
    """`agentkeep.json`, the first member."""

    format: Literal["agentkeep-bundle"] = "agentkeep-bundle"
    version: Count = FORMAT_VERSION
    snapshot_id: SnapshotId
    tenant: Name
    agent_id: Name
    ceilings: Ceilings


class Artifact(_Record):
    path_in_bundle: MemberName
    kind: ArtifactKind = Field(strict=False)
    size_bytes: Count
    sha256: Sha256
    mode: Mode = 0o600
    mtime: Annotated[str, Field(pattern=r"^-?[0-9]{1,12}\.[0-9]{9}$")] | None = None
    """Seconds since 1970, as text: nine decimals do not fit a JSON number."""


class Symlink(_Record):
    path: MemberName
    target_b64: LinkTarget


class Directory(_Record):
    path: MemberName
    mode: Mode


class Excluded(_Record):
    """Files left out on purpose: why, by which pattern, how many."""

    reason: str
    pattern: str
    count: Count


class Failure(_Record):
    """A source that could not be captured as it should have been. Any of these: `complete` is false."""

    source: Presentable
    reason: OneLine
    hint: OneLine = ""
    kept_as: tuple[MemberName, ...] = Field(default=(), strict=False)


class Consistency(_Record):
    """How far "one instant" holds.

    level: `point_in_time`: there was an instant at which every source was as captured; `per_source`: each
        source is consistent in itself, `moved` names those that changed while others were read
    window_ms: from the first reading to the last of the attempt that was kept
    """

    level: Literal["point_in_time", "per_source"]
    window_ms: Count
    attempts: Count
    moved: tuple[Presentable, ...] = Field(default=(), strict=False)


_MAX_GIT_ITEMS = 100_000
_KEPT_UNDER = r"^refs/agentkeep(-[1-9][0-9]{0,3})?$"

GIT_HEAD_FILES = (
    "MERGE_HEAD",
    "CHERRY_PICK_HEAD",
    "REVERT_HEAD",
    "REBASE_HEAD",
    "ORIG_HEAD",
    "AUTO_MERGE",
    "MERGE_AUTOSTASH",
)
"""Files of a repository that hold nothing but object ids, and can be put back as they were."""
GIT_STATE_FILES = (
    "BISECT_HEAD",
    "rebase-apply/autostash",
    "rebase-apply/onto",
    "rebase-apply/orig-head",
    "rebase-merge/autostash",
    "rebase-merge/onto",
    "rebase-merge/orig-head",
    "sequencer/head",
)
"""Such files within the state of an operation that does not come back: what they name stays as refs."""


def _check_line(text: str) -> str:
    if any(char < " " or char == "\x7f" or "\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("not one line of text")
    return text


def _check_identity(text: str) -> str:
    if "<" in text or ">" in text:
        raise ValueError("not a name or address as git writes it")
    return text


def _check_ref_name(name: str) -> str:
    if not name.startswith("refs/"):
        raise ValueError("not the name of a git ref")
    return name


def _check_head_file(name: str) -> str:
    if name not in GIT_HEAD_FILES and name not in GIT_STATE_FILES:
        raise ValueError("not a file of a repository that holds object ids")
    return name


Line = Annotated[str, Field(max_length=4096), AfterValidator(_check_line)]
Identity = Annotated[Line, AfterValidator(_check_identity)]
RefName = Annotated[Line, AfterValidator(_check_ref_name)]
HeadFile = Annotated[str, AfterValidator(_check_head_file)]
Oid = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
Oids = Annotated[tuple[Oid, ...], Field(strict=False, max_length=_MAX_GIT_ITEMS)]


class GitStashEntry(_Record):
    """A line of `git stash list`. `committed_at`: seconds since 1970. Text that is not UTF-8 is escaped."""

    oid: Oid
    message: Line
    committer_name: Identity
    committer_email: Identity
    committed_at: Count
    utc_offset: Annotated[str, Field(pattern=r"^[+-][0-9]{4}$")]


class GitOperation(_Record):
    """Something that was under way. `branch`: the one that is being rebased."""

    kind: Literal["merge", "cherry-pick", "revert", "sequence", "rebase", "am", "bisect"]
    branch: RefName | None = None


class GitWorktree(_Record):
    """Another work tree of the same repository: a place, and its HEAD as in GitFacts."""

    path: Line
    head: RefName | None = None
    head_oid: Oid | None = None


class GitSubmodule(_Record):
    """`url` is without credentials; None where `.gitmodules` names none."""

    path: MemberName
    url: Line | None = None
    commit: Oid


class GitFacts(_Record):
    """A repository at the cut. `head` is a ref's name, or None when HEAD is detached.

    symbolic_refs: those other than HEAD, and what they point to
    stash: newest first
    heads: what MERGE_HEAD and its like hold; where those objects were gone already, they are named only
    worktrees: the others that share this repository
    remotes: name to URL, without credentials
    shallow: the commits at which history was cut off when it was fetched
    partial: objects may be missing, to be fetched when they are needed; `missing_objects`: how many are
    kept_under: the prefix of the refs in the bundle that hold what no ref of the repository's own does
    """

    head: str | None
    head_oid: str | None
    refs: dict[str, str]
    symbolic_refs: dict[RefName, RefName] = Field(default_factory=dict, max_length=_MAX_GIT_ITEMS)
    stash: tuple[GitStashEntry, ...] = Field(default=(), strict=False, max_length=_MAX_GIT_ITEMS)
    heads: dict[HeadFile, Oids] = Field(default_factory=dict)
    operations: tuple[GitOperation, ...] = Field(default=(), strict=False, max_length=16)
    worktrees: tuple[GitWorktree, ...] = Field(default=(), strict=False, max_length=_MAX_GIT_ITEMS)
    submodules: tuple[GitSubmodule, ...] = Field(default=(), strict=False, max_length=_MAX_GIT_ITEMS)
    remotes: dict[Line, Line] = Field(default_factory=dict, max_length=_MAX_GIT_ITEMS)
    shallow: Oids = ()
    partial: bool = False
    missing_objects: Count = 0
    kept_under: Annotated[str, Field(pattern=_KEPT_UNDER)] = "refs/agentkeep"

    def kept_refs(self) -> dict[str, str]:
        """The refs under `kept_under` that these facts call for. The index and messages have theirs too."""
        kept = {f"stash/{number}": entry.oid for number, entry in enumerate(self.stash)}
        for name, oids in self.heads.items():
            kept |= {f"{name}/{number}": oid for number, oid in enumerate(oids)}
        kept |= {
            f"worktree/{number}": worktree.head_oid
            for number, worktree in enumerate(self.worktrees)
            if worktree.head_oid is not None
        }
        return {f"{self.kept_under}/{name}": oid for name, oid in kept.items()}


class StateHome(_Record):
    """Where a state value lives: in a file, as rows of a database, or behind a command (`path` is then its
    program, for people to read). Relative to the agent's root where it lies below it, else absolute; the
    latter is for people to read and never written to."""

    kind: Literal["file", "rows", "command"]
    path: str


class Encryption(_Record):
    scheme: Literal["age"] = "age"
    recipients: Count


class Manifest(_Record):
    """`manifest.json`, the last member. `seal` is checked over the JSON as it was written."""

    manifest_version: Count = FORMAT_VERSION
    snapshot_id: SnapshotId
    agent_id: Name
    tenant: Name
    label: Presentable | None = None
    created_at_ms: Count
    created_by: str
    complete: bool
    consistency: Consistency
    schema_versions: dict[str, int] = Field(default_factory=dict)
    memdir: str | None = None
    """Where the memdir lay relative to the agent's root; "." is the root itself."""
    root_mode: Mode | None = None
    memdir_mode: Mode | None = None
    git: GitFacts | None = None
    artifacts: tuple[Artifact, ...] = Field(strict=False)
    directories: tuple[Directory, ...] = Field(default=(), strict=False)
    symlinks: tuple[Symlink, ...] = Field(default=(), strict=False)
    cut_logs: dict[MemberName, Count] = Field(default_factory=dict)
    """How many bytes those logs had that ended in half a line, which is left out."""
    states: dict[str, StateHome] = Field(default_factory=dict)
    excluded: tuple[Excluded, ...] = Field(default=(), strict=False)
    failures: tuple[Failure, ...] = Field(default=(), strict=False)
    redactions: None = None
    encryption: Encryption | None = None
    tool_versions: dict[str, str] = Field(default_factory=dict)
    seal: str

    @model_validator(mode="after")
    def _failures_are_incomplete(self) -> Self:
        if self.complete and self.failures:
            raise ValueError("a manifest that names failures cannot be complete")
        if self.memdir not in (None, ".") and not is_safe_member_name(self.memdir or ""):
            raise ValueError("memdir is not a safe relative path")
        return self


# --- the catalog's view ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """One snapshot as the catalog knows it. `uploads` maps a destination to its `UploadState`.

    fingerprint: what the agent looked like from outside (capture/fingerprint.py); None: that cannot be told
    unchanged_at_ms: when the agent was last seen to be still as in this snapshot, if it was looked at again
    """

    key: BundleKey
    created_at_ms: int
    label: str | None
    complete: bool
    consistency: Consistency
    size_bytes: int
    sha256: str
    content_bytes: int
    failures: tuple[Failure, ...] = ()
    uploads: dict[str, Upload] = field(default_factory=dict)
    fingerprint: str | None = None
    unchanged_at_ms: int | None = None

    @property
    def snapshot_id(self) -> str:
        return self.key.snapshot_id

    @property
    def created_at(self) -> datetime:
        return datetime.fromtimestamp(self.created_at_ms / 1000, UTC)

    @property
    def current_at(self) -> datetime:
        """The last time of which it is known that the agent was as in this snapshot."""
        return datetime.fromtimestamp(max(self.created_at_ms, self.unchanged_at_ms or 0) / 1000, UTC)


class UploadState(StrEnum):
    PENDING = "pending"
    CONFIRMED = "confirmed"
    FAILED = "failed"
    """The last try failed in a way that trying again will not mend by itself; it is still retried, rarely."""


@dataclass(frozen=True, slots=True)
class Upload:
    state: UploadState
    attempts: int = 0
    last_error: str | None = None
    updated_at_ms: int = 0
    resume_token: str | None = None
