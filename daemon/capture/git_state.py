"""What a live repository holds beside objects and refs, read from its files as git writes them.

The repository's directory is two: `own`, this work tree's, and `common`, shared by all its work trees; they
are the same where there is but one. What git would not take for what it should be is not there for us either.
All of it is small and quick to read: it is read on both sides of the pins.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from daemon.model import (
    GIT_HEAD_FILES,
    GIT_STATE_FILES,
    GitOperation,
    GitStashEntry,
    GitWorktree,
)

_MAX_FILE_BYTES = 64 << 20
_MAX_TEXT_BYTES = 1 << 20
_MAX_LINE_CHARS = 4096

TEXT_FILES = ("MERGE_MSG", "SQUASH_MSG", "MERGE_MODE")
"""What goes with a merge under way: the message of the commit to come, and how it is made."""

_OID = re.compile(rb"[0-9a-f]{40}\Z")
_REFLOG_LINE = re.compile(
    rb"[0-9a-f]{40} (?P<oid>[0-9a-f]{40}) (?P<name>[^<>]*?) ?<(?P<email>[^<>]*)> (?P<time>[0-9]{1,15})"
    rb" (?P<offset>[+-][0-9]{4})(?:\t(?P<message>.*))?"
)
_HELPER = re.compile(r"([A-Za-z0-9+.-]+)::(.*)", re.DOTALL)
_RUNS_COMMANDS = ("ext", "fd")
_WITH_AUTHORITY = re.compile(r"((?:[A-Za-z][A-Za-z0-9+.-]*:)?//)([^/?#]*)(.*)", re.DOTALL)
_SSH_USER = re.compile(r"[\w.-]+@[^@\s]*")
_HOST = re.compile(r"(?:[\w.-]*|\[[0-9A-Fa-f:.%]+\])(?::[0-9]*)?")
_SCP_CREDENTIALS = re.compile(r"[^/]*:[^/]*@(?=[^/@]*:)")
_PARAMETERS = re.compile(r"[?#;].*", re.DOTALL)
_INCLUDED = re.compile(rb"""path\s*=\s*"?([^"]+?)"?""", re.IGNORECASE)


def open_regular(path: Path) -> int | None:
    """A descriptor of a plain file; None where there is none. Never waits, as a FIFO would make it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return None
    return descriptor


def what_waits(dot_git: Path) -> Iterator[Path]:
    """FIFOs and devices among all that reading a repository may touch: itself, the directory that it shares
    with others, its alternates, and files that its configuration includes."""
    if _is_odd(dot_git):
        yield dot_git
        return
    own = dot_git
    if dot_git.is_file():  # it says where the repository is
        text = _read(dot_git, _MAX_LINE_CHARS) or b""
        own = dot_git.parent / os.fsdecode(text.strip().removeprefix(b"gitdir:").strip())
    common = common_directory(own)
    listed = _lines(common / "objects/info/alternates")
    alternates = [common / "objects" / os.fsdecode(line) for line in listed if line and line[:1] != b"#"]
    for tree in dict.fromkeys([own, common, *alternates]):
        yield from _odd_below(tree)
    for line in _lines(common / "config"):
        if match := _INCLUDED.fullmatch(line.strip()):
            path = common / Path(os.fsdecode(match[1])).expanduser()
            if _is_odd(path):
                yield path


def _odd_below(tree: Path) -> Iterator[Path]:
    pending = [tree]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(Path(entry.path))
                    elif not entry.is_file(follow_symlinks=False) and _is_odd(Path(entry.path)):
                        yield Path(entry.path)
        except OSError:  # not there, or not for us to look into: libgit2 will say so
            continue


def _is_odd(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def read_stash(common: Path) -> tuple[GitStashEntry, ...]:
    """As `git stash list` has them. Lines that git skips are skipped."""
    found = (_REFLOG_LINE.fullmatch(line) for line in _lines(common / "logs/refs/stash"))
    entries = [
        GitStashEntry(
            oid=match["oid"].decode(),
            message=one_line(match["message"] or b""),
            committer_name=one_line(match["name"]),
            committer_email=one_line(match["email"]),
            committed_at=int(match["time"]),
            utc_offset=match["offset"].decode(),
        )
        for match in found
        if match is not None
    ]
    return tuple(reversed(entries))


def read_heads(own: Path) -> dict[str, tuple[str, ...]]:
    heads = {name: _oids(own / name) for name in (*GIT_HEAD_FILES, *GIT_STATE_FILES)}
    return {name: oids for name, oids in heads.items() if oids}


def read_texts(own: Path) -> dict[str, bytes]:
    found = {name: _read(own / name, _MAX_TEXT_BYTES) for name in TEXT_FILES}
    return {name: data for name, data in found.items() if data is not None}


def read_operations(own: Path) -> tuple[GitOperation, ...]:
    """What is under way, as `git status` would say."""
    found = []
    if (own / "rebase-merge").is_dir() or (own / "rebase-apply/rebasing").exists():
        names = [
            _read(own / f"{state}/head-name", _MAX_LINE_CHARS) for state in ("rebase-merge", "rebase-apply")
        ]
        found.append(GitOperation(kind="rebase", branch=_ref_name((names[0] or names[1] or b"").strip())))
    elif (own / "rebase-apply").is_dir():
        found.append(GitOperation(kind="am"))
    if (own / "MERGE_HEAD").exists():
        found.append(GitOperation(kind="merge"))
    if (own / "CHERRY_PICK_HEAD").exists():
        found.append(GitOperation(kind="cherry-pick"))
    if (own / "REVERT_HEAD").exists():
        found.append(GitOperation(kind="revert"))
    if (own / "sequencer").is_dir():
        found.append(GitOperation(kind="sequence"))
    if (own / "BISECT_START").exists():
        found.append(GitOperation(kind="bisect"))
    return tuple(found)


def read_worktrees(own: Path, common: Path) -> tuple[GitWorktree, ...]:
    """The others of the same repository; the main one, if it is another, by its repository's path."""
    found = [] if own == common else [_worktree(common, os.fsencode(common))]
    linked = common / "worktrees"
    for directory in sorted(linked.iterdir()) if linked.is_dir() else ():
        if directory != own and directory.is_dir():
            place = _read(directory / "gitdir", _MAX_LINE_CHARS) or os.fsencode(directory)
            found.append(_worktree(directory, place.strip().removesuffix(b"/.git")))
    return tuple(found)


def _worktree(directory: Path, place: bytes) -> GitWorktree:
    head = (_read(directory / "HEAD", _MAX_LINE_CHARS) or b"").strip()
    return GitWorktree(
        path=one_line(place),
        head=_ref_name(head.removeprefix(b"ref:").strip()) if head.startswith(b"ref:") else None,
        head_oid=head.decode() if _OID.match(head) else None,
    )


def read_shallow(common: Path) -> tuple[str, ...]:
    return tuple(sorted(_oids(common / "shallow")))


def common_directory(own: Path) -> Path:
    text = _read(own / "commondir", _MAX_LINE_CHARS)
    return own if text is None else (own / os.fsdecode(text.strip())).resolve()


def remotes_of(settings: Iterable[tuple[bytes, bytes | None]]) -> dict[str, str]:
    """The first URL of each remote in a repository's configuration."""
    found: dict[str, str] = {}
    for name, value in settings:
        remote = name.removeprefix(b"remote.").removesuffix(b".url")
        if len(name) == len(remote) + len(b"remote..url"):
            found.setdefault(one_line(remote), without_credentials(one_line(value or b"")))
    return dict(sorted(found.items()))


def is_partial(settings: Iterable[tuple[bytes, bytes | None]]) -> bool:
    """Whether some remote has promised to have what is missing."""
    return any(
        name == b"extensions.partialclone"
        or (name.startswith(b"remote.") and name.endswith(b".promisor") and value not in (b"false", b"0"))
        for name, value in settings
    )


def submodule_urls(gitmodules: bytes) -> dict[bytes, str]:
    """URL by path, out of a `.gitmodules`. Not read as configuration: that could include other files."""
    found: dict[bytes, str] = {}
    section: dict[bytes, bytes] = {}
    for line in [*gitmodules.split(b"\n"), b"["]:
        if line.lstrip().startswith(b"["):
            if b"path" in section and b"url" in section:
                found[section[b"path"]] = without_credentials(one_line(section[b"url"]))
            section = {}
        else:
            key, _, value = line.partition(b"=")
            section[key.strip().lower()] = value.strip().strip(b'"')
    return found


def without_credentials(url: str) -> str:
    """`url` without user, password and parameters: any of them may be a token, and so may any word of a
    command that a remote helper runs. The user of an SSH server is none, and stays."""
    if helper := _HELPER.fullmatch(url):
        name, inner = helper.groups()
        return f"{name}::" if name in _RUNS_COMMANDS else f"{name}::{without_credentials(inner)}"
    if parts := _WITH_AUTHORITY.fullmatch(url):
        scheme, authority, path = parts.groups()
        if not (scheme == "ssh://" and _SSH_USER.fullmatch(authority)):
            authority = authority.rpartition("@")[2]
            if not _HOST.fullmatch(authority):  # a password with a slash in it, most likely
                authority, path = path.rpartition("@")[2].partition("/")[0], ""
        return scheme + authority + _PARAMETERS.sub("", path)
    return _SCP_CREDENTIALS.sub("", url)


def one_line(raw: bytes) -> str:
    """As a manifest may hold it: escaped where it is not UTF-8, no control characters, of bounded length."""
    text = raw.decode("utf-8", "backslashreplace")
    return "".join(" " if char < " " or char == "\x7f" else char for char in text)[:_MAX_LINE_CHARS]


def _ref_name(raw: bytes) -> str | None:
    text = one_line(raw)
    return text if text.startswith("refs/") else None


def _oids(path: Path) -> tuple[str, ...]:
    return tuple(line.decode() for line in _lines(path) if _OID.match(line))


def _lines(path: Path) -> list[bytes]:
    return (_read(path, _MAX_FILE_BYTES) or b"").split(b"\n")


def _read(path: Path, limit_bytes: int) -> bytes | None:
    """A plain file's bytes; None where there is none, or one that is larger than it can be."""
    descriptor = open_regular(path)
    if descriptor is None:
        return None
    with open(descriptor, "rb") as stream:  # noqa: PTH123
        data = stream.read(limit_bytes + 1)
    return data if len(data) <= limit_bytes else None
