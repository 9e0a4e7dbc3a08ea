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
    return {
        os.fsencode(path.relative_to(root)): _entry(path)
        for directory, directories, files in os.walk(root)
        for path in (Path(directory, name) for name in directories + files)
        if not path.name.endswith(skip)
    }


def access_times(root: Path) -> dict[bytes, int]:
    """Of regular files."""
    return {
        name: (root / os.fsdecode(name)).lstat().st_atime_ns
        for name, entry in listing(root).items()
        if entry.kind == "file"
    }


def _entry(path: Path) -> Entry:
    status = path.lstat()
    mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISDIR(status.st_mode):
        return Entry("directory", mode, 0, b"")
    if stat.S_ISLNK(status.st_mode):
        return Entry("symlink", 0, 0, os.fsencode(path.readlink()))
    if stat.S_ISREG(status.st_mode):
        return Entry("file", mode, status.st_mtime_ns, _read(path))
    return Entry("special", mode, status.st_mtime_ns, b"")


def _read(path: Path) -> bytes:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOATIME), "rb") as stream:
        return stream.read()
