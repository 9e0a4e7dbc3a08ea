"""The index of a git repository: its file read and written, its entries as trees and back.

A bundle holds objects and refs, and no index. So each kind of entry becomes a tree: what is staged, the
three sides of conflicts, and the paths that carry a flag. Nothing of the cached stat data is kept: git looks
at each file once more, and finds what it found before.

Everything read here may be hostile: what does not parse raises IndexUnreadable, and sizes are bounded.

Source: https://git-scm.com/docs/index-format (versions 2 to 4), /gitformat-pack (trees: /git-mktree).
"""

from __future__ import annotations

import hashlib
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

TREE = 0o040000
GITLINK = 0o160000

_HEADER = struct.Struct(">4sII")
_ENTRY = struct.Struct(">24xI12x20sH")  # between stat data: mode, object id, flags
_OID_BYTES = 20
_ASSUME_UNCHANGED, _EXTENDED, _STAGE_SHIFT, _NAME_MASK = 0x8000, 0x4000, 12, 0x0FFF
_SKIP_WORKTREE, _INTENT_TO_ADD = 0x4000, 0x2000
_UNDERSTOOD_EXTENSIONS = (b"sdir",)  # beside the optional ones, which start with a capital

MAX_INDEX_BYTES = 256 << 20
_MAX_ENTRIES = 500_000
_MAX_PATH_BYTES = 4096
_MAX_PATHS_BYTES = 128 << 20


class IndexUnreadable(ValueError):
    """Not an index (or a tree that could be part of one) as git writes it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One path. `oid` is raw. `stage`: 0, or 1 to 3 for base, ours and theirs of a conflict.

    mode: as in a tree; TREE stands for a whole directory outside of a sparse checkout, and its path ends in /
    """

    path: bytes
    mode: int
    oid: bytes
    stage: int = 0
    intent_to_add: bool = False
    skip_worktree: bool = False
    assume_unchanged: bool = False


PARTS: dict[str, Callable[[Entry], bool]] = {
    "staged": lambda entry: entry.stage == 0 and not entry.intent_to_add,
    "base": lambda entry: entry.stage == 1,
    "ours": lambda entry: entry.stage == 2,
    "theirs": lambda entry: entry.stage == 3,
    "intent-to-add": lambda entry: entry.intent_to_add,
    "skip-worktree": lambda entry: entry.skip_worktree,
    "assume-unchanged": lambda entry: entry.assume_unchanged,
}
"""The trees that an index is kept as. The first five hold entries, the others mark some of these."""


# --- the file -------------------------------------------------------------------------------------


def parse_index(data: bytes) -> list[Entry]:
    """Raises IndexUnreadable, also for an index that is split over two files."""
    try:
        return _parse_index(data)
    except (struct.error, IndexError) as exc:
        raise IndexUnreadable("the index ends too early") from exc


def _parse_index(data: bytes) -> list[Entry]:
    signature, version, count = _HEADER.unpack_from(data)
    if (
        signature != b"DIRC"
        or version not in (2, 3, 4)
        or count > _MAX_ENTRIES
        or len(data) > MAX_INDEX_BYTES
    ):
        raise IndexUnreadable("the index is of an unknown format, or too large")
    end = len(data) - _OID_BYTES
    digest = data[end:]
    if any(digest) and digest != hashlib.sha1(memoryview(data)[:end], usedforsecurity=False).digest():
        raise IndexUnreadable("the index does not have its checksum")  # all zero: index.skipHash
    entries: list[Entry] = []
    position, paths_bytes, path = _HEADER.size, 0, b""
    for _ in range(count):
        entry, position = _parse_entry(data, position, version=version, previous=path)
        path = entry.path
        paths_bytes += len(path)
        if len(path) > _MAX_PATH_BYTES or paths_bytes > _MAX_PATHS_BYTES:
            raise IndexUnreadable("the index has paths that are too long")
        entries.append(entry)
    _check_extensions(data[position:end])
    return entries


def _parse_entry(data: bytes, start: int, *, version: int, previous: bytes) -> tuple[Entry, int]:
    """The entry at `start`, and where the next one begins."""
    mode, oid, flags = _ENTRY.unpack_from(data, start)
    position = start + _ENTRY.size
    extended = 0
    if flags & _EXTENDED:
        (extended,) = struct.unpack_from(">H", data, position)
        position += 2
    kept = b""
    if version == 4:  # a path is told by how much of the one before it falls away
        dropped, position = _parse_offset(data, position)
        kept = previous[: max(0, len(previous) - dropped)]
    name_end = data.find(b"\0", position)
    if name_end < 0:
        raise IndexUnreadable("the index ends within a path")
    path = kept + data[position:name_end]
    following = name_end + 1 if version == 4 else start + (name_end - start + 8) // 8 * 8
    entry = Entry(
        path=path,
        mode=mode,
        oid=oid,
        stage=flags >> _STAGE_SHIFT & 3,
        intent_to_add=bool(extended & _INTENT_TO_ADD),
        skip_worktree=bool(extended & _SKIP_WORKTREE),
        assume_unchanged=bool(flags & _ASSUME_UNCHANGED),
    )
    return entry, following


def _parse_offset(data: bytes, position: int) -> tuple[int, int]:
    """A number as packs write the offset of a delta's base, and where it ends."""
    byte = data[position]
    value = byte & 0x7F
    while byte & 0x80:
        position += 1
        byte = data[position]
        value = (value + 1 << 7) | (byte & 0x7F)
        if value > _MAX_PATH_BYTES:
            raise IndexUnreadable("the index has a path that is told by no other")
    return value, position + 1


def _check_extensions(data: bytes) -> None:
    position = 0
    while position < len(data):
        name, size_bytes = struct.unpack_from(">4sI", data, position)
        if name == b"link":
            raise IndexUnreadable("the index is split over two files")
        if not name[:1].isupper() and name not in _UNDERSTOOD_EXTENSIONS:
            raise IndexUnreadable(f"the index has an extension that is not known: {name!r}")
        position += 8 + size_bytes


def index_bytes(entries: Iterable[Entry]) -> bytes:
    """A file of version 2, or 3 where flags need it. Without stat data: git reads each file once more."""
    ordered = sorted(entries, key=lambda entry: (entry.path, entry.stage))
    version = 3 if any(entry.intent_to_add or entry.skip_worktree for entry in ordered) else 2
    parts = [_HEADER.pack(b"DIRC", version, len(ordered))]
    for entry in ordered:
        extended = entry.intent_to_add * _INTENT_TO_ADD | entry.skip_worktree * _SKIP_WORKTREE
        flags = entry.stage << _STAGE_SHIFT | min(len(entry.path), _NAME_MASK)
        flags |= entry.assume_unchanged * _ASSUME_UNCHANGED | (extended and _EXTENDED)
        head = _ENTRY.pack(entry.mode, entry.oid, flags)
        if extended:
            head += struct.pack(">H", extended)
        named = head + entry.path
        parts.append(named + bytes(8 - len(named) % 8))
    data = b"".join(parts)
    return data + hashlib.sha1(data, usedforsecurity=False).digest()


# --- trees ----------------------------------------------------------------------------------------


def write_tree(entries: Iterable[Entry], write: Callable[[bytes], bytes]) -> bytes:
    """The id of a tree of these paths; `write` stores a tree object and returns its id.

    Raises IndexUnreadable.
    """
    directories: dict[bytes, dict[bytes, tuple[int, bytes]]] = {b"": {}}
    directories_bytes = 0
    for entry in entries:
        path = entry.path.removesuffix(b"/") if entry.mode == TREE else entry.path
        _check_path(path)
        parent, _, name = path.rpartition(b"/")
        directory = parent
        while directory not in directories:
            directories[directory] = {}
            directories_bytes += len(directory)
            if len(directories) > _MAX_ENTRIES or directories_bytes > _MAX_PATHS_BYTES:
                raise IndexUnreadable("the index has too many directories")
            directory = directory.rpartition(b"/")[0]
        directories[parent][name] = (entry.mode, entry.oid)
    for directory in sorted(directories.keys() - {b""}, key=lambda path: path.count(b"/"), reverse=True):
        oid = write(_tree_bytes(directories.pop(directory)))
        parent, _, name = directory.rpartition(b"/")
        if name in directories[parent]:
            raise IndexUnreadable("the index has a path that is both a file and a directory")
        directories[parent][name] = (TREE, oid)
    return write(_tree_bytes(directories[b""]))


def _tree_bytes(children: dict[bytes, tuple[int, bytes]]) -> bytes:
    ordered = sorted(children.items(), key=lambda item: item[0] + b"/" * (item[1][0] == TREE))
    return b"".join(b"%o %s\0%s" % (mode, name, oid) for name, (mode, oid) in ordered)


def parse_tree(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Mode, name and raw id of each entry of a tree object. Raises ValueError."""
    position = 0
    while position < len(data):
        end = data.index(b"\0", position)
        mode, _, name = data[position:end].partition(b" ")
        position = end + 1 + _OID_BYTES
        if position > len(data):
            raise ValueError("a tree object ends too early")
        yield int(mode, 8), name, data[end + 1 : position]


def tree_entries(root: bytes, read: Callable[[bytes], bytes | None]) -> Iterator[Entry]:
    """Every file below a tree, as `read` finds tree objects by id; None where one is not to be had.

    Raises IndexUnreadable, ValueError. Bounded: trees that share subtrees can stand for more paths than
    there are atoms.
    """
    pending = [(b"", root)]
    count, paths_bytes = 0, 0
    while pending:
        prefix, oid = pending.pop()
        for mode, name, child in parse_tree(read(oid) or b""):
            path = prefix + name
            _check_path(path)
            count += 1
            paths_bytes += len(path)
            if count > _MAX_ENTRIES or len(path) > _MAX_PATH_BYTES or paths_bytes > _MAX_PATHS_BYTES:
                raise IndexUnreadable("a tree is too large for an index")
            if mode == TREE:
                pending.append((path + b"/", child))
            else:
                yield Entry(path=path, mode=_index_mode(mode), oid=child)


def _check_path(path: bytes) -> None:
    """What git takes into no index: a path that leads out of the work tree, or into a repository."""
    for name in path.split(b"/"):
        if name in (b"", b".", b"..") or name.lower() == b".git" or b"\0" in name:
            raise IndexUnreadable(f"a path that git refuses: {path[:200]!r}")


def _index_mode(mode: int) -> int:
    if stat.S_ISREG(mode):
        return 0o100755 if mode & 0o100 else 0o100644  # old trees have others
    if mode in (stat.S_IFLNK, GITLINK):
        return mode
    raise IndexUnreadable(f"a tree has an entry of an unknown mode: {mode:o}")
