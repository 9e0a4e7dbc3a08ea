"""Which of an agent's files a process has mapped to write to: such writing moves no mtime in time, so
that no signature proves anything about them.

Source: proc_pid_maps(5).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from daemon.capture.scan import Signature

_SHARED_AND_WRITABLE = re.compile(rb"^\S+ .w.s \S+ (\S+):(\S+) (\d+) *(.*)$", re.MULTILINE)


def mapped_for_writing(files: Mapping[str, Signature]) -> set[str]:
    """The paths among `files` that some process of this user has mapped shared and writable."""
    by_inode: dict[int, list[str]] = {}
    for path, signature in files.items():
        by_inode.setdefault(signature.inode, []).append(path)
    found: set[str] = set()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            maps = (process / "maps").read_bytes()
        except OSError:  # gone by now, or another user's
            continue
        for major, minor, inode, name in _SHARED_AND_WRITABLE.findall(maps):
            device = os.makedev(int(major, 16), int(minor, 16))
            found.update(
                path
                for path in by_inode.get(int(inode), ())
                # Of btrfs stat gives a device of the subvolume, and the map that of the file system.
                if files[path].device == device or _is_called(path, name)
            )
    return found


def _is_called(path: str, name: bytes) -> bool:
    return (b"/" + name).endswith(b"/" + os.fsencode(path).replace(b"\n", b"\\012"))
