"""The application's only fsync, rename into place, and locks.

Crash model: a file under its final name is whole and has been fsynced, and so has the directory entry.
What was being written when the process or the host died is left under a name that starts with
`TEMPORARY_PREFIX`, never under the final one, and can be thrown away.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from daemon.errors import BusyError, LocalWriteError, RefusedError

TEMPORARY_PREFIX = ".agentkeep-"

_libc = ctypes.CDLL(None, use_errno=True)

_HINTS = {
    errno.ENOSPC: "free some space on this file system, or point the command at another one",
    errno.EDQUOT: "the disk quota is used up: free some space or raise it",
    errno.EROFS: "the file system is mounted read-only",
    errno.EACCES: "run this as a user who may write there",
    errno.EPERM: "run this as a user who may write there",
}


@contextmanager
def translating_os_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn an OSError of local writing into LocalWriteError, with what to do about it."""
    try:
        yield
    except OSError as exc:
        reason = exc.strerror or str(exc)
        hint = _HINTS.get(exc.errno or 0, "")
        raise LocalWriteError(f"cannot {doing} {path}: {reason}", hint=hint) from exc


def make_private_directory(path: Path) -> Path:
    """Make `path` and its missing parents with mode 0700, durably. Idempotent. Raises LocalWriteError."""
    missing = [path]
    with translating_os_errors("make the directory", path):
        while not missing[-1].parent.exists():
            missing.append(missing[-1].parent)
        for directory in reversed(missing):
            if not directory.is_dir():
                directory.mkdir(mode=0o700, exist_ok=True)
                fsync_directory(directory.parent)
    return path


@contextmanager
def made_directory(directory: Path) -> Iterator[None]:
    """A directory and those above it, made where they are missing, and gone again if nothing comes of the
    block. Raises LocalWriteError."""
    missing = []
    while not os.path.lexists(directory):
        missing.append(directory)
        directory = directory.parent
    try:
        for path in reversed(missing):
            with translating_os_errors("make the directory", path):
                path.mkdir(exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):  # not there, or somebody else has put something in it
                path.rmdir()
        raise


def fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create_private(path: Path) -> BinaryIO:
    """Open a file that must not exist yet for writing, mode 0600. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    return os.fdopen(descriptor, "wb")


@contextmanager
def claimed_temporary(path: Path, *, what: str) -> Iterator[BinaryIO]:
    """A temporary file of a fixed name, ours alone for the time of a block and gone after it; one that a
    killed process left is taken over. Raises BusyError (another process is at it) and OSError."""
    with suppress(FileNotFoundError):
        if path.lstat().st_nlink > 1:  # killed between the final name and the end: not ours to write to
            path.unlink()
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o600), "wb") as stream:
        _refuse_foreign(path, stream.fileno())
        if not _try_lock(stream.fileno()) or not _is_still(path, stream.fileno()):
            raise BusyError(f"{what} is already being written by another process", hint="wait for it")
        try:
            stream.truncate(0)
            yield stream
        finally:
            path.unlink(missing_ok=True)


def sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def sync_file_system(path: Path) -> None:
    """Flush everything written to the file system that `path` is on (syncfs(2)): one call for a whole tree.

    Raises OSError for a write that failed since the file system was last flushed.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if _libc.syncfs(descriptor) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
    finally:
        os.close(descriptor)


def rename_into_place(temporary: Path, final: Path) -> None:
    """Give a written and fsynced file or directory its final name, durably. Replaces a file of that name,
    or an empty directory; refuses (OSError) a directory that holds something."""
    temporary.replace(final)
    fsync_directory(final.parent)


def discard_temporaries(path: Path) -> None:
    """Remove what killed writers of the small file `path` left beside it. For whoever is its only writer."""
    for leftover in path.parent.glob(f"{TEMPORARY_PREFIX}{glob.escape(path.name)}.*"):
        leftover.unlink(missing_ok=True)


def write_file(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write a small file whole or not at all, replacing one of that name. Raises LocalWriteError."""
    # Of this thread alone, so one that is there is of a process that was killed: in a container the next
    # one mostly has the same id.
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}.{os.getpid()}.{threading.get_native_id()}")
    with translating_os_errors("write", path):
        try:
            temporary.unlink(missing_ok=True)
            with create_private(temporary) as stream:
                stream.write(data)
                os.fchmod(stream.fileno(), mode)
                sync(stream)
            rename_into_place(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def scratch_path(parent: Path, name: str) -> Path:
    """Where a scratch directory of that name is."""
    return parent / f"{TEMPORARY_PREFIX}{name}"


@contextmanager
def scratch_directory(parent: Path, name: str, *, what: str) -> Iterator[Path]:
    """A private directory below `parent`, ours alone for the time of a job and gone after it; what a
    killed process left under that name is thrown away first. Raises BusyError, LocalWriteError.
    """
    path = scratch_path(parent, name)
    with translating_os_errors("make the directory", path):
        path.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _refuse_foreign(path, descriptor)
        if not _try_lock(descriptor) or not _is_still(path, descriptor):
            raise BusyError(f"{what} is already under way in another process", hint="wait for it to finish")
        with translating_os_errors("clear", path):
            for leftover in path.iterdir():
                _remove(leftover)
        try:
            yield path
        finally:
            _remove(path)
    finally:
        os.close(descriptor)


def _refuse_foreign(path: Path, descriptor: int) -> None:
    """A neighbour may have made it first, to change what we put there."""
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise RefusedError(
            f"{path} is not ours alone: somebody else made it, or may write to it",
            hint="find out who made it, remove it, and choose a directory that others cannot write to",
        )


def _remove(path: Path) -> None:
    """Remove a file or a whole tree of ours, also where a directory in it was made read-only."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    for directory, _, _ in os.walk(path):
        Path(directory).chmod(0o700)
    shutil.rmtree(path)


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether `path` is what was opened: whoever held the lock before may have removed it."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def file_lock(path: Path, *, what: str, timeout_seconds: float = 0.0) -> Iterator[None]:
    """Hold an exclusive lock across processes. It dies with its holder. Raises BusyError, LocalWriteError.

    The file stays: removing a lock file lets two processes hold "the" lock on different inodes.
    """
    make_private_directory(path.parent)
    with translating_os_errors("open the lock", path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + timeout_seconds
        while not _try_lock(descriptor):
            if time.monotonic() >= deadline:
                raise BusyError(
                    f"{what} is busy: another agentkeep process holds {path}",
                    hint="wait for it to finish, or give a longer lock_timeout_seconds",
                )
            time.sleep(0.05)
        try:
            yield
        finally:
            # A child that another thread is just starting has the descriptor too, until its exec.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
