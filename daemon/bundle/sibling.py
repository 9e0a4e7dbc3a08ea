"""The `.sha256` sibling: the digest of a bundle's bytes at rest, as `sha256sum -c` reads it.

Exactly one spelling is written and accepted: 64 lower-case hex digits, two spaces, the bundle's file
name, a newline. (sha256sum itself takes several.)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import BinaryIO, Self

from daemon.bundle.frames import Sink
from daemon.errors import SiblingMismatch

MAX_SIBLING_BYTES = 1024
_LINE = re.compile(rb"([0-9a-f]{64})  ([A-Za-z0-9._-]{1,200})\n\Z")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}\Z")


def sibling_bytes(sha256: str, file_name: str) -> bytes:
    """The sibling's content. Raises ValueError for a name that `sha256sum` would have to escape."""
    if not _NAME.match(file_name):
        raise ValueError(f"not a file name for a bundle: {file_name!r}")
    return f"{sha256}  {file_name}\n".encode()


def parse_sibling(data: bytes) -> str:
    """The digest in a sibling's content. Raises SiblingMismatch if it is not in the one spelling."""
    match = _LINE.match(data)
    if match is None:
        raise SiblingMismatch(
            "the .sha256 sibling is not in its form (64 hex digits, two spaces, the file name, newline)",
            hint="compare it with another copy; do not trust the bundle by it",
        )
    return match[1].decode()


class HashingSink:
    """Passes on what is written, and knows its length and SHA-256."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes) -> int:
        self._sink.write(data)
        self._digest.update(data)
        self.size_bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back here."""

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


class HashingReader:
    """Reads on, knows length and SHA-256 of what was read, and closes the stream; `finish` reads what is
    left."""

    def __init__(self, stream: BinaryIO, *, progress: Callable[[int], None] | None = None) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self._progress = progress
        self.size_bytes = 0

    def read(self, size_bytes: int = 1 << 20, /) -> bytes:
        data = self._stream.read(size_bytes if size_bytes >= 0 else 1 << 20)
        self._digest.update(data)
        self.size_bytes += len(data)
        if self._progress is not None:
            self._progress(self.size_bytes)
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def finish(self) -> str:
        """Read to the end; the digest of everything."""
        while self.read():
            pass
        return self._digest.hexdigest()
