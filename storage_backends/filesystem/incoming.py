"""Unfinished files of the `file` backend: made, locked, named, and cleaned up after the dead.

Owns `.incoming` below the base directory. A file there is locked with flock(2) as long as its writer
lives. Names begin with a digest of the kernel's boot id: where that is this kernel's own, a free lock
proves that the writer is dead. Where it is not (another host on the same share, or this one before a
reboot), locks may not be seen, so the file must also be a day old.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

from storage_backends.base import ObjectExists, StorageError, Unavailable
from storage_backends.filesystem.io import make_child_directory, translated

DIRECTORY_NAME = ".incoming"
FOREIGN_STALE_SECONDS = 24 * 3600
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_RENAME_NOREPLACE = 1


@dataclass(frozen=True, slots=True)
class NewFile:
    fd: int
    name: str
    directory_fd: int


class Incoming:
    """The directory of unfinished files, open. A context manager."""

    def __init__(self, base_fd: int) -> None:
        with translated(f"opening {DIRECTORY_NAME}"):
            self._fd = make_child_directory(DIRECTORY_NAME, parent_fd=base_fd, key=DIRECTORY_NAME)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        os.close(self._fd)

    @contextlib.contextmanager
    def new_file(self) -> Iterator[NewFile]:
        """An empty, locked file of mode 0600, whose name here goes away at the end."""
        with translated(f"making a file in {DIRECTORY_NAME}"):
            new = self._make_locked()
        try:
            yield new
        finally:
            with contextlib.suppress(OSError):  # what stays is removed as abandoned
                os.unlink(new.name, dir_fd=self._fd)
            os.close(new.fd)

    def refuses_taken_names(self) -> bool:
        """Whether naming a file really fails where the name is taken, found out by doing it."""
        with self.new_file() as first, self.new_file() as second:
            name = f"{_host_mark()}-{secrets.token_hex(8)}"
            try:
                name_without_replacing(first, name, directory_fd=self._fd, key="a probe")
                name_without_replacing(second, name, directory_fd=self._fd, key="a probe")
            except ObjectExists:
                return True
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self._fd)
        return False

    def remove_abandoned(self) -> None:
        """Best effort: what cannot be looked at (another user's, a stranger's link) is left alone."""
        with translated(f"cleaning {DIRECTORY_NAME}"), os.scandir(self._fd) as entries:
            names = [entry.name for entry in entries]
        for name in names:
            with contextlib.suppress(OSError):
                self._remove_if_abandoned(name)

    def _remove_if_abandoned(self, name: str) -> None:
        fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            age_seconds = time.time() - os.fstat(fd).st_mtime
            ours = name.startswith(_host_mark() + "-")
            if (ours or age_seconds > FOREIGN_STALE_SECONDS) and _try_lock(fd) is True:
                os.unlink(name, dir_fd=self._fd)
        finally:
            os.close(fd)

    def _make_locked(self) -> NewFile:
        for _attempt in range(16):
            name = f"{_host_mark()}-{secrets.token_hex(8)}"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, flags, 0o600, dir_fd=self._fd)
            # A cleaner may have come between the two calls, and taken the file for abandoned.
            if _try_lock(fd) is not False and os.fstat(fd).st_nlink > 0:
                return NewFile(fd, name, self._fd)
            os.close(fd)
        raise Unavailable(f"files in {DIRECTORY_NAME} are removed as soon as they are made")


def name_without_replacing(new: NewFile, name: str, *, directory_fd: int, key: str) -> None:
    """Give a finished file its name. Raises ObjectExists where the name is taken, OSError otherwise."""
    try:
        os.link(new.name, name, src_dir_fd=new.directory_fd, dst_dir_fd=directory_fd, follow_symlinks=False)
    except FileExistsError as exc:
        # NFS: an answer was lost, the request was repeated, and met its own success.
        if os.fstat(new.fd).st_nlink < 2:
            raise ObjectExists(f"{key} is already stored") from exc
    except OSError as exc:
        if exc.errno == errno.EXDEV:
            raise StorageError(f"{key} is on another file system than {DIRECTORY_NAME}") from exc
        if exc.errno not in _NO_HARD_LINKS:
            raise
        _rename_without_replacing(new, name, directory_fd=directory_fd, key=key)


def _rename_without_replacing(new: NewFile, name: str, *, directory_fd: int, key: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    renameat2 = getattr(libc, "renameat2", None)
    if renameat2 is None:
        raise StorageError("the file system has no hard links, and this system no renameat2")
    if renameat2(new.directory_fd, new.name.encode(), directory_fd, name.encode(), _RENAME_NOREPLACE) == 0:
        return
    code = ctypes.get_errno()
    if code == errno.EEXIST:
        raise ObjectExists(f"{key} is already stored")
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        raise StorageError("the file system can neither link nor rename without replacing")
    raise OSError(code, os.strerror(code))


def _try_lock(fd: int) -> bool | None:
    """True: the lock is ours. False: another has it. None: the file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as exc:
        if exc.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return None
        raise
    return True


@cache
def _host_mark() -> str:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    return hashlib.sha256(boot_id).hexdigest()[:12]
