"""Objects as files below a directory, local or mounted (NFS): `file:///mnt/nas/agents`.

Owns everything below the base directory; a key is the path of its file. Unfinished files live in
`.incoming`, on the same file system, and get their name by link(2), which is atomic and never
replaces, on NFS too. The base itself is never made: a share that is not mounted must not become a
directory on the root disk. Symbolic links below the base are never followed.

Crash model: a put that dies leaves at most a file in `.incoming` (or a second name of a finished one
there), which the first put of a later backend removes. Bytes are fsynced before they get their name,
directories after.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import BinaryIO, ClassVar, Self
from urllib.parse import unquote, urlsplit

from storage_backends.base import (
    CHUNK_BYTES,
    Capabilities,
    ContainerNotFound,
    Corrupted,
    InvalidDestination,
    ObjectInfo,
    ObjectNotFound,
    Source,
    StorageBackend,
    directory_of,
    is_valid_key,
    validate_key,
    validate_range,
)
from storage_backends.filesystem.incoming import Incoming, name_without_replacing
from storage_backends.filesystem.io import (
    RegularFile,
    fsync_directory,
    is_regular,
    make_child_directory,
    modified_at,
    open_child_directory,
    refuse_taken,
    translated,
)


class FilesystemBackend(StorageBackend):
    option_names: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, base: Path) -> None:
        self._base = base
        self._cleaned = False
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"FilesystemBackend({str(self._base)!r})"

    @classmethod
    def from_url(cls, url: str, options: Mapping[str, str]) -> Self:
        parts = urlsplit(url)
        path = unquote(parts.path)
        if parts.scheme != "file" or parts.netloc or parts.query or parts.fragment or options:
            raise InvalidDestination("a file destination is file:///ABSOLUTE/PATH, without host or options")
        if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
            raise InvalidDestination("a file destination's path must be absolute and without '..'")
        return cls(Path(path))

    def probe(self) -> Capabilities:
        with self._open_base() as base_fd, Incoming(base_fd) as incoming, translated("probing"):
            conditional_put = incoming.refuses_taken_names()
        return Capabilities(
            conditional_put=conditional_put,
            checksums=True,
            versioning=False,
            object_lock=False,
            resumable_put=False,
        )

    def put(
        self,
        key: str,
        source: Source,
        *,
        resume: str | None = None,
        on_resume_token: Callable[[str], None] | None = None,
    ) -> ObjectInfo:
        validate_key(key)
        del resume, on_resume_token  # writing again is as quick as proving what is there
        with (
            self._open_base() as base_fd,
            Incoming(base_fd) as incoming,
            _open_parent(key, base_fd=base_fd, make=True) as (directory_fd, name),
        ):
            self._clean_once(incoming)
            with translated(f"storing {key}"):
                refuse_taken(name, directory_fd=directory_fd, key=key)
            with incoming.new_file() as new:
                _write(source, new.fd, key=key)
                with translated(f"storing {key}"):
                    os.fsync(new.fd)
                    name_without_replacing(new, name, directory_fd=directory_fd, key=key)
                    fsync_directory(directory_fd)
                    stored_at = modified_at(os.fstat(new.fd))
        return ObjectInfo(key, source.size_bytes, stored_at, source.sha256)

    def open(self, key: str, *, offset: int = 0, length: int | None = None) -> BinaryIO:
        validate_range(offset=offset, length=length)
        with self._open_object(key) as fd:
            return RegularFile.buffered(os.dup(fd), key=key, offset=offset, length=length)

    def stat(self, key: str) -> ObjectInfo:
        with self._open_object(key) as fd:
            status = os.fstat(fd)
            return ObjectInfo(key, status.st_size, modified_at(status))

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        with self._open_base():
            pass  # a base that is not there is not an empty one
        directory = directory_of(prefix)
        if directory is None:
            return
        for key in self._keys_below(directory, prefix=prefix, start_after=start_after):
            with contextlib.suppress(ObjectNotFound):  # deleted since its directory was read
                yield self.stat(key)

    def delete(self, key: str) -> None:
        validate_key(key)
        with (
            contextlib.suppress(ObjectNotFound),
            self._open_base() as base_fd,
            _open_parent(key, base_fd=base_fd) as (directory_fd, name),
            translated(f"deleting {key}"),
        ):
            if is_regular(name, directory_fd=directory_fd):
                with contextlib.suppress(FileNotFoundError):  # another process was quicker
                    os.unlink(name, dir_fd=directory_fd)
                fsync_directory(directory_fd)

    def discard(self, key: str, resume: str) -> None:
        validate_key(key)
        del resume

    def close(self) -> None:
        """Nothing is held open between calls."""

    def _clean_once(self, incoming: Incoming) -> None:
        with self._lock:
            if not self._cleaned:
                incoming.remove_abandoned()
                self._cleaned = True

    @contextlib.contextmanager
    def _open_base(self) -> Iterator[int]:
        with translated(f"opening the base directory {self._base}"):
            try:
                fd = os.open(self._base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError) as exc:
                raise ContainerNotFound(f"no directory {self._base} (is the share mounted?)") from exc
        try:
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _open_object(self, key: str) -> Iterator[int]:
        validate_key(key)
        with self._open_base() as base_fd, _open_parent(key, base_fd=base_fd) as (directory_fd, name):
            with translated(f"opening {key}"):
                # Looked at first: opening a FIFO or a device has effects of its own.
                if not is_regular(name, directory_fd=directory_fd):
                    raise ObjectNotFound(f"no object {key}")
                try:
                    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory_fd)
                except FileNotFoundError as exc:
                    raise ObjectNotFound(f"no object {key}") from exc
            try:
                yield fd
            finally:
                os.close(fd)

    def _keys_below(self, directory: str, *, prefix: str, start_after: str) -> Iterator[str]:
        """Keys below `directory` ("" or ending in a slash) in order; one directory's names are held at a
        time and depth. A directory's place is that of its name with the slash: `a-b` < `a/b`.
        """
        for key in self._entries(directory):
            if not key.endswith("/"):
                if key.startswith(prefix) and key > start_after:
                    yield key
            elif key.startswith(prefix) and (key > start_after or start_after.startswith(key)):
                yield from self._keys_below(key, prefix=prefix, start_after=start_after)

    def _entries(self, directory: str) -> Iterator[str]:
        """Keys and (with a slash) subdirectories of one directory, in order, links and strangers left out."""
        found = []
        with (
            contextlib.suppress(ObjectNotFound),
            self._open_base() as base_fd,
            _open_parent(directory + "-", base_fd=base_fd) as (directory_fd, _name),
            translated(f"listing {directory}"),
            os.scandir(directory_fd) as entries,
        ):
            for entry in entries:
                if is_valid_key(directory + entry.name):
                    if entry.is_dir(follow_symlinks=False):
                        found.append(directory + entry.name + "/")
                    elif entry.is_file(follow_symlinks=False):
                        found.append(directory + entry.name)
        return iter(sorted(found))


@contextlib.contextmanager
def _open_parent(key: str, *, base_fd: int, make: bool = False) -> Iterator[tuple[int, str]]:
    """The directory that holds `key`, reached without following links, and the file's name in it."""
    *parents, name = key.split("/")
    fd = os.dup(base_fd)
    try:
        for segment in parents:
            with translated(f"opening the directory of {key}"):
                step = make_child_directory if make else open_child_directory
                child_fd = step(segment, parent_fd=fd, key=key)
            os.close(fd)
            fd = child_fd
        yield fd, name
    finally:
        os.close(fd)


def _write(source: Source, fd: int, *, key: str) -> None:
    """All the source's bytes, hashed on the way. Raises Corrupted, and what the source raises."""
    digest = hashlib.sha256()
    size_bytes = 0
    with closing(source.open()) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            size_bytes += len(chunk)
            view = memoryview(chunk)
            with translated(f"storing {key}"):
                while view:
                    view = view[os.write(fd, view) :]
    if size_bytes != source.size_bytes or digest.hexdigest() != source.sha256:
        raise Corrupted(f"the bytes to store under {key} are not those that were announced")
