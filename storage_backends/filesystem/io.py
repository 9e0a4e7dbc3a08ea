"""The system calls of the `file` backend: directories reached without following links, a reader that
never mistakes a break for an end, and the one place where an OSError becomes a StorageError.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import BinaryIO, cast

from storage_backends.base import (
    Forbidden,
    ObjectExists,
    ObjectNotFound,
    StorageError,
    StorageFull,
    Unavailable,
)

BUFFER_BYTES = 256 * 1024

_BY_ERRNO: dict[int, type[StorageError]] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), StorageFull),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), Forbidden),
    # EIO is also what a soft NFS mount says of a server that does not answer.
    **dict.fromkeys(
        (
            errno.EIO,
            errno.ESTALE,
            errno.ETIMEDOUT,
            errno.EHOSTDOWN,
            errno.EHOSTUNREACH,
            errno.ENOTCONN,
            errno.ECONNRESET,
            errno.ECONNREFUSED,
            errno.EREMOTEIO,
            errno.EAGAIN,
            errno.EBUSY,
            errno.EMFILE,
            errno.ENFILE,
            errno.ENOMEM,
        ),
        Unavailable,
    ),
}


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turns what the system says into the contract's errors. `doing` begins the message."""
    try:
        yield
    except OSError as exc:
        raise _BY_ERRNO.get(exc.errno or 0, StorageError)(f"{doing}: {exc.strerror or exc}") from exc


def open_child_directory(name: str, *, parent_fd: int, key: str) -> int:
    """A subdirectory on the way to `key`, never through a link. Raises ObjectNotFound if it is not there."""
    try:
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent_fd)
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise ObjectNotFound(f"no object {key}") from exc
        raise


def make_child_directory(name: str, *, parent_fd: int, key: str) -> int:
    """The same, made if need be, its name durable. Raises StorageError if something else is there."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=parent_fd)
    # Also where it was there before: who made it may have died before saying so to the disk.
    fsync_directory(parent_fd)
    try:
        return open_child_directory(name, parent_fd=parent_fd, key=key)
    except ObjectNotFound as exc:
        raise StorageError(f"{key} cannot be stored: {name!r} is not a directory") from exc


def fsync_directory(directory_fd: int) -> None:
    try:
        os.fsync(directory_fd)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that has no such notion
            raise


def is_regular(name: str, *, directory_fd: int) -> bool:
    try:
        status = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode)


def refuse_taken(name: str, *, directory_fd: int, key: str) -> None:
    """Spares the copying where the outcome is known; the naming itself decides. Raises ObjectExists, or
    StorageError where something that is not an object has the name."""
    try:
        status = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(status.st_mode):
        raise StorageError(f"{key} cannot be stored: there is a directory or link of that name")
    raise ObjectExists(f"{key} is already stored")


def modified_at(status: os.stat_result) -> datetime:
    return datetime.fromtimestamp(status.st_mtime, UTC)


class RegularFile(io.RawIOBase):
    """Bytes of an open file, from an offset, as many as there were when it was opened."""

    def __init__(self, fd: int, *, key: str, offset: int, length: int | None) -> None:
        super().__init__()
        self._fd = fd
        self._key = key
        self._position = offset
        available = max(0, os.fstat(fd).st_size - offset)
        self._remaining_bytes = available if length is None else min(available, length)

    @classmethod
    def buffered(cls, fd: int, *, key: str, offset: int, length: int | None) -> BinaryIO:
        """Takes over `fd`."""
        raw = cls(fd, key=key, offset=offset, length=length)
        return cast(BinaryIO, io.BufferedReader(raw, BUFFER_BYTES))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        with memoryview(buffer).cast("B") as view:  # type: ignore[arg-type]
            wanted = min(len(view), self._remaining_bytes)
            with translated(f"reading {self._key}"):
                count = os.preadv(self._fd, [view[:wanted]], self._position) if wanted else 0
        if count < wanted and count == 0:
            raise Unavailable(f"{self._key} ends {self._remaining_bytes} bytes before it should")
        self._position += count
        self._remaining_bytes -= count
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()
