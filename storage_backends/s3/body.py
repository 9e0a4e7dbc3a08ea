"""The bytes of one request: hashed from a source, and read from it again by the HTTP client.

Owns the care that what a source raises reaches the caller as it was, and is not taken for a broken
connection.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import BinaryIO, cast

from storage_backends.base import CHUNK_BYTES, Corrupted, Source, StorageError


@dataclass(frozen=True, slots=True)
class Digests:
    """Of the bytes of one request. Raw, not hex. md5 only where something is to be compared with it."""

    sha256: bytes
    md5: bytes | None


def hash_part(stream: BinaryIO, length: int, *, whole: hashlib._Hash, md5_too: bool) -> Digests:
    """Digests of the next `length` bytes (fewer at the end), which `whole` takes in as well."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    while length and (chunk := stream.read(min(length, CHUNK_BYTES))):
        length -= len(chunk)
        sha256.update(chunk)
        whole.update(chunk)
        if md5_too:
            md5.update(chunk)
    return Digests(sha256.digest(), md5.digest() if md5_too else None)


def require_digest(source: Source, stream: BinaryIO, sha256: str, *, key: str) -> None:
    """Raises Corrupted unless the stream is at its end and what was read is what was announced."""
    if stream.read(1) or sha256 != source.sha256:
        raise Corrupted(f"the bytes to store under {key} are not those that were announced")


def send(source: Source, offset: int, length: int, request: Callable[[BinaryIO], str]) -> str:
    body = _Slice(source, offset=offset, length=length)
    with closing(body):
        try:
            return request(cast(BinaryIO, body))
        except StorageError:
            if body.error is not None:
                raise body.error from None
            raise


class _Slice(io.RawIOBase):
    """A source's bytes from `offset` on as a file of its own, which the HTTP client can rewind.

    error: what the source raised; the HTTP client would pass it off as a broken connection
    """

    def __init__(self, source: Source, *, offset: int, length: int) -> None:
        super().__init__()
        self._source = source
        self._offset = offset
        self._length = length
        self._position = 0
        self._stream: BinaryIO | None = None
        self.error: Exception | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if start + offset != self._position:
            self._let_go()
            self._position = start + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        wanted = self._length - self._position
        if size >= 0:
            wanted = min(size, wanted)
        if wanted <= 0:
            return b""
        with self._remembering():
            if self._stream is None:
                self._stream = self._source.open(self._offset + self._position)
            data = self._stream.read(wanted)
            if not data:
                raise Corrupted("the bytes to store became fewer while they were sent")
        self._position += len(data)
        return data

    def close(self) -> None:
        self._let_go()
        super().close()

    def _let_go(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    @contextlib.contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except Exception as exc:
            self.error = exc
            raise
