"""The contract every storage backend keeps, in prose and in types.

A backend keeps *objects*: immutable byte strings under keys. It knows nothing of bundles, agents or
schedules. It is used by several threads at once and by several processes on several hosts at once.

What every backend promises
---------------------------
* **Atomic.** An object is there whole or not at all. Whatever moment a `put` dies, no reader ever
  sees a part of it under its key.
* **Never overwritten.** `put` stores under a key that is free. Where the server can refuse an
  existing key (`Capabilities.conditional_put`), the server decides; elsewhere the backend looks
  first, which two concurrent writers of one key can still slip through.
* **Proven, not hoped.** `ObjectInfo.sha256` is set only when the stored bytes are known to have that
  digest: the server checked what it received, or the backend did. A digest that a client merely
  wrote beside the object (metadata) is not proof and is never reported as one. `None` means: read
  the object back and hash it yourself.
* **Durable.** When `put` returns, the bytes have reached the storage's own idea of safety (fsync of
  file and directory; the server's acknowledgement).
* **Bounded.** Memory does not grow with an object's size. Nothing is read whole.
* **Ordered.** `list` yields keys in ascending order of their bytes, every key once that existed
  during the whole walk, fetching pages as it goes.
* **Honest errors.** Vendor errors are translated in one place per backend, most specific first,
  into the classes below, the original kept as `__cause__`. No secret appears in a message.

Which call may raise what is said at each method. `Unavailable` (and only it) means that the same
call may work later; every method may raise it, as may `Forbidden` and `StorageError` itself.

Source: restic's backend design, for the shape of the contract; Amazon S3's API reference for what
an object store can promise.
"""

from __future__ import annotations

import hashlib
import io
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, ClassVar, Protocol, Self

MAX_KEY_BYTES = 900  # S3 allows 1024, of which a destination's prefix needs some
MAX_SEGMENT_BYTES = 255  # NAME_MAX of the usual file systems
CHUNK_BYTES = 1 << 20
_KEY = re.compile(r"[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)*\Z")


class StorageError(Exception):
    """Root of everything a backend raises.

    StorageError              something else went wrong; the message says what
    ├── ObjectNotFound        no object under that key
    ├── ObjectExists          put: the key is taken (by whatever bytes)
    ├── Forbidden             credentials missing, wrong or not allowed to do this: do not retry
    ├── ContainerNotFound     the bucket or base directory itself is not there: do not retry
    ├── StorageFull           no room left: a person has to act
    ├── Corrupted             bytes sent or received do not have the digest they should
    ├── InvalidKey            the key breaks the rules of `validate_key`
    ├── InvalidDestination    the URL or an option cannot be used; nothing was contacted
    └── Unavailable           network, time-out, throttling, a server's bad moment: try later
    """


class ObjectNotFound(StorageError): ...


class ObjectExists(StorageError): ...


class Forbidden(StorageError): ...


class ContainerNotFound(StorageError): ...


class StorageFull(StorageError): ...


class Corrupted(StorageError): ...


class InvalidKey(StorageError): ...


class InvalidDestination(StorageError): ...


class Unavailable(StorageError): ...


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What is known of one stored object.

    key: as given to `put`, without the destination's prefix
    size_bytes: length of the stored bytes
    modified_at: aware UTC, by the storage's clock
    sha256: lower-case hex digest if *proven* (see the contract), else None
    """

    key: str
    size_bytes: int
    modified_at: datetime
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What this very destination does, found out by trying (`probe`), never assumed from its name.

    conditional_put: two puts of one key cannot both succeed; the storage itself refuses the second
    checksums: a put whose bytes do not match the SHA-256 sent with it is refused by the storage
    versioning: a deleted or replaced object can still be had from the storage
    object_lock: objects can be made undeletable for a time
    resumable_put: an interrupted `put` can go on in another process from its resume token
    """

    conditional_put: bool
    checksums: bool
    versioning: bool
    object_lock: bool
    resumable_put: bool


class Source(Protocol):
    """Bytes to be stored: can be opened again and again, at any offset, always the same bytes."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def sha256(self) -> str:
        """Lower-case hex digest of all the bytes."""
        ...

    def open(self, offset: int = 0) -> BinaryIO:
        """A new stream from `offset` on; the caller closes it."""
        ...


@dataclass(frozen=True, slots=True)
class FileSource:
    """A file that holds still while it is stored."""

    path: Path
    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """Measure and hash `path`. Raises OSError."""
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            return cls(path, stream.tell(), digest)

    def open(self, offset: int = 0) -> BinaryIO:
        stream = self.path.open("rb")
        stream.seek(offset)
        return stream


@dataclass(frozen=True, slots=True)
class BytesSource:
    """Bytes at hand, for the small ones: siblings, signatures."""

    data: bytes

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def open(self, offset: int = 0) -> BinaryIO:
        return io.BytesIO(self.data[offset:])


class StorageBackend(ABC):
    """One destination. See the module's docstring for what all methods promise."""

    option_names: ClassVar[frozenset[str]] = frozenset()
    """The options that `from_url` understands besides the URL."""

    @classmethod
    @abstractmethod
    def from_url(cls, url: str, options: Mapping[str, str]) -> Self:
        """Make a backend without contacting anything. Raises InvalidDestination."""

    @abstractmethod
    def probe(self) -> Capabilities:
        """Find out by trying what the destination can do. Leaves no object behind (a versioned bucket
        keeps what every deletion there keeps).

        Raises ContainerNotFound, Forbidden.
        """

    @abstractmethod
    def put(
        self,
        key: str,
        source: Source,
        *,
        resume: str | None = None,
        on_resume_token: Callable[[str], None] | None = None,
    ) -> ObjectInfo:
        """Store `source` under `key`, which must be free.

        on_resume_token is called with a short printable string as soon as an interruption could be
        resumed, before the first byte is sent; the caller keeps it durably. `resume` is such a string
        of an earlier call for the same key and bytes, perhaps in another process: what the storage
        already has and what still matches `source` is not sent again. A token that is stale, unknown
        or of other bytes is not an error: the put starts anew.

        Not idempotent: a second put of one key raises ObjectExists, identical or not; the caller
        compares. The same goes for a put that raised Unavailable after its last byte: it may have been
        stored. A key that is also another key's directory (`a` and `a/b`) may be refused with
        StorageError. What the source itself raises passes through unchanged, and nothing is stored.

        Raises ObjectExists, StorageFull, Corrupted (the source's bytes did not have `source.sha256`,
        or the storage says that what arrived does not; nothing is stored), InvalidKey, ContainerNotFound.
        """

    @abstractmethod
    def open(self, key: str, *, offset: int = 0, length: int | None = None) -> BinaryIO:
        """Stream an object from `offset`, at most `length` bytes; the caller closes it.

        Reading raises Unavailable when the stream breaks off before its end: a short read that looks
        like the end never happens. An offset at or past the end gives an empty stream.
        Raises ObjectNotFound, InvalidKey; ValueError for a negative offset or length.
        """

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo:
        """What is stored under `key`, as of now. Raises ObjectNotFound, InvalidKey."""

    @abstractmethod
    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key begins with `prefix` (a plain string prefix; "" is all) and is greater than
        `start_after`, in ascending order. `sha256` may be None even where `stat` would know it.
        Objects of others whose keys `validate_key` refuses are not shown. Nothing is contacted before
        the first item is asked for. Raises ContainerNotFound.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object. Idempotent: a key that is not there is success. Raises InvalidKey."""

    @abstractmethod
    def discard(self, key: str, resume: str) -> None:
        """Give up an interrupted put and free what the storage holds of it. Idempotent: an unknown,
        finished or malformed token is success, and a finished object is never touched. Raises
        InvalidKey."""

    @abstractmethod
    def close(self) -> None:
        """Release connections. Idempotent. The backend is not used afterwards."""


def validate_key(key: str) -> str:
    """The key itself if it is one that every storage can hold and no path can be escaped with.

    Segments of `[A-Za-z0-9._-]` joined by single slashes, none of them `.` or `..` or longer than 255
    bytes, at most 900 bytes in all. A key that begins with a dot is refused too: such names are the
    backends' own (probes, unfinished files), and so never listed. Raises InvalidKey.
    """
    segments = key.split("/")
    too_long = len(key) > MAX_KEY_BYTES or any(len(segment) > MAX_SEGMENT_BYTES for segment in segments)
    if too_long or not _KEY.match(key) or key.startswith(".") or {".", ".."} & set(segments):
        shown = key if len(key) <= 80 else key[:77] + "..."
        raise InvalidKey(f"not a valid object key: {shown!r}")
    return key


def validate_range(*, offset: int, length: int | None) -> None:
    """Raises ValueError for a range that no object can have."""
    if offset < 0 or (length is not None and length < 0):
        raise ValueError(f"negative range: offset={offset} length={length}")


def is_valid_key(key: str) -> bool:
    try:
        validate_key(key)
    except InvalidKey:
        return False
    return True


def directory_of(prefix: str) -> str | None:
    """The part of a listing's prefix up to its last slash ("" if there is none), where a walk begins;
    None if no valid key can begin with the prefix, such as `../`."""
    directory = prefix[: prefix.rfind("/") + 1]
    return directory if not directory or is_valid_key(directory[:-1]) else None
