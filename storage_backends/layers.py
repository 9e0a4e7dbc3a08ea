"""Backends that wrap a backend.

`Retrying` tries again what may work later (`Unavailable`, nothing else) with exponential backoff and
full jitter. It keeps the contract: a put goes on from the latest resume token, a listing after the
last key. A stream that breaks while it is read is not mended: `open` retries the opening alone, and
the reader knows its offset.

Source: "Exponential Backoff And Jitter", AWS Architecture Blog, for full jitter.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import BinaryIO, Self, TypeVar

from storage_backends.base import (
    Capabilities,
    InvalidDestination,
    ObjectInfo,
    Source,
    StorageBackend,
    StorageError,
    Unavailable,
)

T = TypeVar("T")


class Retrying(StorageBackend):
    def __init__(
        self,
        backend: StorageBackend,
        *,
        attempts: int = 5,
        first_delay_seconds: float = 0.5,
        max_delay_seconds: float = 30.0,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """attempts: in all, at least 1. jitter: from 0 to 1, the share of a delay that is waited."""
        if attempts < 1:
            raise ValueError("attempts must be at least 1")
        self._backend = backend
        self._attempts = attempts
        self._first_delay_seconds = first_delay_seconds
        self._max_delay_seconds = max_delay_seconds
        self._sleep = sleep
        self._jitter = jitter

    def __repr__(self) -> str:
        return f"Retrying({self._backend!r}, attempts={self._attempts})"

    @classmethod
    def from_url(cls, url: str, options: Mapping[str, str]) -> Self:
        del url, options
        raise InvalidDestination("a layer is put around a backend, not opened from a URL")

    def probe(self) -> Capabilities:
        return self._retried(self._backend.probe)

    def put(
        self,
        key: str,
        source: Source,
        *,
        resume: str | None = None,
        on_resume_token: Callable[[str], None] | None = None,
    ) -> ObjectInfo:
        """ObjectExists after a first attempt that was Unavailable may be that attempt's own success."""
        latest = resume

        def keep(token: str) -> None:
            nonlocal latest
            latest = token
            if on_resume_token is not None:
                on_resume_token(token)

        try:
            return self._retried(lambda: self._backend.put(key, source, resume=latest, on_resume_token=keep))
        except BaseException:
            if latest is not None and on_resume_token is None:
                with suppress(StorageError):  # nobody else could: the token was ours alone
                    self._backend.discard(key, latest)
            raise

    def open(self, key: str, *, offset: int = 0, length: int | None = None) -> BinaryIO:
        return self._retried(lambda: self._backend.open(key, offset=offset, length=length))

    def stat(self, key: str) -> ObjectInfo:
        return self._retried(lambda: self._backend.stat(key))

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        failures = 0
        while True:
            try:
                for info in self._backend.list(prefix, start_after=start_after):
                    yield info
                    start_after = info.key
                    failures = 0
            except Unavailable:
                failures += 1
                if failures >= self._attempts:
                    raise
                self._wait(failures)
            else:
                return

    def delete(self, key: str) -> None:
        self._retried(lambda: self._backend.delete(key))

    def discard(self, key: str, resume: str) -> None:
        self._retried(lambda: self._backend.discard(key, resume))

    def close(self) -> None:
        self._backend.close()

    def _retried(self, attempt: Callable[[], T]) -> T:
        for failures in range(1, self._attempts):
            try:
                return attempt()
            except Unavailable:
                self._wait(failures)
        return attempt()

    def _wait(self, failures: int) -> None:
        longest_seconds = min(self._max_delay_seconds, self._first_delay_seconds * 2 ** (failures - 1))
        self._sleep(longest_seconds * self._jitter())
