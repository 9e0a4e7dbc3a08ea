"""Which of an agent's files a process has mapped to write to: such writing moves no mtime in time, so
that no signature proves anything about them.

Source: proc_pid_maps(5).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from daemon.capture.scan import Signature


def mapped_for_writing(files: Mapping[str, Signature]) -> set[str]:
    """The paths among `files` that some process of this user has mapped shared and writable."""
    by_inode: dict[str, list[str]] = {}
    for path, signature in files.items():
        by_inode.setdefault(str(signature.inode), []).append(path)
    found: set[str] = set()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            maps = (process / "maps").read_bytes()
        except OSError:  # gone by now, or another user's
            continue
        for line in maps.splitlines():
            if b" rw-s " in line:
                found.update(_paths_of(line, by_inode, files))
    return found


def _paths_of(line: bytes, by_inode: Mapping[str, list[str]], files: Mapping[str, Signature]) -> set[str]:
    _, _, _, device, inode, *_ = line.split(maxsplit=5)
    major, minor = (int(part, 16) for part in device.split(b":"))
    return {
        path for path in by_inode.get(inode.decode(), ()) if files[path].device == os.makedev(major, minor)
    }
