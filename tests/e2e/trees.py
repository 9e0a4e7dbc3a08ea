"""What a directory tree holds, to be compared: names as bytes, types, modes, times, contents."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    kind: str
    mode: int
    mtime_ns: int
    content: bytes


def listing(root: Path, *, skip: tuple[str, ...] = ()) -> dict[bytes, Entry]:
    """Every entry below `root` by its relative path; `skip`: endings of names that are left out.

    A directory's time is left out: it moves when something is made in it. No access time is moved.
    """
    found: dict[bytes, Entry] = {}
    for directory, directories, files in os.walk(os.fsencode(root)):
        for name in directories + files:
            path = os.path.join(directory, name)
            relative = os.path.relpath(path, os.fsencode(root))
            if not relative.endswith(tuple(os.fsencode(ending) for ending in skip)):
                found[relative] = _entry(path)
    return found


def _entry(path: bytes) -> Entry:
    status = os.lstat(path)
    mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISDIR(status.st_mode):
        return Entry("directory", mode, 0, b"")
    if stat.S_ISLNK(status.st_mode):
        return Entry("symlink", 0, 0, os.readlink(path))
    if stat.S_ISREG(status.st_mode):
        return Entry("file", mode, status.st_mtime_ns, read(path))
    return Entry("special", mode, status.st_mtime_ns, b"")


def read(path: bytes | Path) -> bytes:
    with open(os.open(path, os.O_RDONLY | os.O_NOATIME), "rb") as stream:
        return stream.read()


def access_times(root: Path) -> dict[bytes, int]:
    """Of regular files."""
    return {
        name: os.lstat(os.path.join(os.fsencode(root), name)).st_atime_ns
        for name, entry in listing(root).items()
        if entry.kind == "file"
    }
