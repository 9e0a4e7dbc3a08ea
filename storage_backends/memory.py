"""Objects in this process's memory: for tests, and as the shortest example of a backend.

`memory://name` names a store that all backends of that name in the process share. Nothing survives
the process, and memory grows with what is stored.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import BinaryIO, ClassVar, Self

from storage_backends.base import (
    CHUNK_BYTES,
    Capabilities,
    Corrupted,
    InvalidDestination,
    ObjectExists,
    ObjectInfo,
    ObjectNotFound,
    Source,
    StorageBackend,
    validate_key,
    validate_range,
)


@dataclass(slots=True)
class _Store:
    lock: threading.Lock = field(default_factory=threading.Lock)
    objects: dict[str, tuple[ObjectInfo, bytes]] = field(default_factory=dict)


_stores: dict[str, _Store] = {}
_stores_lock = threading.Lock()


class MemoryBackend(StorageBackend):
    option_names: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, name: str) -> None:
        self._name = name
        with _stores_lock:
            self._store = _stores.setdefault(name, _Store())

    def __repr__(self) -> str:
        return f"MemoryBackend({self._name!r})"

    @classmethod
    def from_url(cls, url: str, options: Mapping[str, str]) -> Self:
        name = url.removeprefix("memory://")
        if not name or name == url or "/" in name or options:
            raise InvalidDestination("a memory destination is memory://NAME, without options")
        return cls(name)

    def probe(self) -> Capabilities:
        return Capabilities(
            conditional_put=True, checksums=True, versioning=False, object_lock=False, resumable_put=False
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
        del resume, on_resume_token  # nothing of an interrupted put is kept
        data = _read_all(source)
        digest = hashlib.sha256(data).hexdigest()
        if len(data) != source.size_bytes or digest != source.sha256:
            raise Corrupted(f"the bytes to store under {key} are not those that were announced")
        info = ObjectInfo(key, len(data), datetime.now(UTC), digest)
        with self._store.lock:
            if key in self._store.objects:
                raise ObjectExists(f"{key} is already stored")
            self._store.objects[key] = (info, data)
        return info

    def open(self, key: str, *, offset: int = 0, length: int | None = None) -> BinaryIO:
        validate_range(offset=offset, length=length)
        _info, data = self._look_up(key)
        return io.BytesIO(data[offset:] if length is None else data[offset : offset + length])

    def stat(self, key: str) -> ObjectInfo:
        return self._look_up(key)[0]

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        with self._store.lock:
            keys = sorted(key for key in self._store.objects if key.startswith(prefix) and key > start_after)
        for key in keys:
            found = self._store.objects.get(key)
            if found is not None:
                yield found[0]

    def delete(self, key: str) -> None:
        validate_key(key)
        with self._store.lock:
            self._store.objects.pop(key, None)

    def discard(self, key: str, resume: str) -> None:
        validate_key(key)
        del resume

    def close(self) -> None:
        """The store stays, for the next backend of its name."""

    def _look_up(self, key: str) -> tuple[ObjectInfo, bytes]:
        validate_key(key)
        with self._store.lock:
            found = self._store.objects.get(key)
        if found is None:
            raise ObjectNotFound(f"no object {key}")
        return found


def _read_all(source: Source) -> bytes:
    data = bytearray()
    with closing(source.open()) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            data += chunk
    return bytes(data)
