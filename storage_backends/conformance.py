"""What every backend must pass. Ships, so that a third-party backend can prove itself:

    class TestMyBackend(BackendConformance):
        @pytest.fixture
        def backend(self) -> Iterator[StorageBackend]:
            with closing(open_backend("mine://...", {})) as backend:
                yield backend

The fixture gives each test an empty destination. The class attributes and `another` can be overridden.
Nothing else of storage_backends imports this module: it needs pytest.
"""

from __future__ import annotations

import hashlib
import io
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import BinaryIO, ClassVar

import pytest

from storage_backends.base import (
    BytesSource,
    Corrupted,
    InvalidKey,
    ObjectExists,
    ObjectInfo,
    ObjectNotFound,
    Source,
    StorageBackend,
    StorageError,
    Unavailable,
)

INVALID_KEYS = [
    "",
    "/",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "a/../b",
    "a/./b",
    "../a",
    ".hidden",
    "a b",
    "a\nb",
    "a\0b",
    "a\n",
    "a\\b",
    "a%2Fb",
    "a?b",
    "schön",
    "а",  # Cyrillic
    "a\u202eb",
    "x" * 256,
    "/".join(["x" * 100] * 9),
]


@dataclass(frozen=True, slots=True)
class AnnouncedSource:
    """Says one thing of itself and holds another."""

    data: bytes
    size_bytes: int
    sha256: str

    def open(self, offset: int = 0) -> BinaryIO:
        return io.BytesIO(self.data[offset:])


class FailingSource:
    """Raises OSError once reading comes to `fails_at`."""

    def __init__(self, data: bytes, *, fails_at: int) -> None:
        self._data = data
        self._fails_at = fails_at
        self.size_bytes = len(data)
        self.sha256 = hashlib.sha256(data).hexdigest()

    def open(self, offset: int = 0) -> BinaryIO:
        return _FailingStream(self._data, offset=offset, fails_at=self._fails_at)


class _FailingStream(io.BytesIO):
    def __init__(self, data: bytes, *, offset: int, fails_at: int) -> None:
        super().__init__(data)
        self.seek(offset)
        self._fails_at = fails_at

    def read(self, size: int | None = -1, /) -> bytes:
        room = self._fails_at - self.tell()
        if room <= 0:
            raise OSError("the source's disk is on fire")
        return super().read(room if size is None or size < 0 else min(size, room))


class BackendConformance:
    big_bytes: ClassVar[int] = 12 << 20
    """Of an object that the backend stores in several parts, if it ever does."""
    fails_at_bytes: ClassVar[int] = 11 << 20
    """Where a source fails such that some parts of a big object are stored already."""
    many_keys: ClassVar[int] = 1200
    """More than the backend lists at once."""

    @pytest.fixture
    def backend(self) -> StorageBackend:
        raise NotImplementedError("a subclass provides the backend under test")

    def another(self, backend: StorageBackend) -> StorageBackend:
        """Another backend on the same destination, as in another process. Closed by nobody."""
        return backend

    # Storing and reading back

    @pytest.mark.parametrize("size_bytes", [0, 1, 65_537])
    def test_what_is_put_comes_back(self, backend: StorageBackend, size_bytes: int) -> None:
        data = noise(size_bytes)
        began = datetime.now(UTC)
        info = backend.put("tenants/default/a_b-c.tar.zst", BytesSource(data))
        assert_describes(info, "tenants/default/a_b-c.tar.zst", data)
        found = backend.stat("tenants/default/a_b-c.tar.zst")
        assert_describes(found, "tenants/default/a_b-c.tar.zst", data)
        assert abs(found.modified_at - began) < timedelta(hours=1)
        assert read(backend, "tenants/default/a_b-c.tar.zst") == data

    def test_a_big_object_comes_back(self, backend: StorageBackend) -> None:
        data = noise(self.big_bytes)
        assert_describes(backend.put("big", BytesSource(data)), "big", data)
        assert_describes(backend.stat("big"), "big", data)
        assert read(backend, "big") == data
        assert read(backend, "big", offset=self.big_bytes - 7) == data[-7:]

    def test_another_backend_sees_it(self, backend: StorageBackend) -> None:
        backend.put("a", BytesSource(b"seen"))
        assert read(self.another(backend), "a") == b"seen"

    def test_every_valid_key_can_be_stored(self, backend: StorageBackend) -> None:
        wanted = ["x" * 255, "/".join(["y" * 99] * 9), "A.b_c-9/Z", "a..b", "-", "c/.b", "_/-", "0"]
        for key in wanted:
            backend.put(key, BytesSource(key.encode()))
            assert read(backend, key) == key.encode()
        assert keys(backend) == sorted(wanted)

    def test_ranges(self, backend: StorageBackend) -> None:
        data = noise(100)
        backend.put("a", BytesSource(data))
        ends: list[tuple[int, int | None]] = [(0, None), (40, None), (100, None), (0, 0), (3, 0), (0, 10)]
        for offset, length in [*ends, (40, 20), (99, 1), (90, 50), (100, 1), (500, 5)]:
            expected = data[offset:] if length is None else data[offset : offset + length]
            assert read(backend, "a", offset=offset, length=length) == expected, (offset, length)

    def test_ranges_of_an_empty_object(self, backend: StorageBackend) -> None:
        backend.put("a", BytesSource(b""))
        assert read(backend, "a") == b""
        assert read(backend, "a", offset=1) == b""
        assert read(backend, "a", offset=0, length=5) == b""

    def test_negative_ranges_are_refused(self, backend: StorageBackend) -> None:
        backend.put("a", BytesSource(b"data"))
        with pytest.raises(ValueError, match="negative"):
            backend.open("a", offset=-1)
        with pytest.raises(ValueError, match="negative"):
            backend.open("a", length=-1)

    def test_a_stream_can_be_read_bit_by_bit_and_left(self, backend: StorageBackend) -> None:
        data = noise(300_000)
        backend.put("a", BytesSource(data))
        with closing(backend.open("a")) as stream:
            assert b"".join(iter(lambda: stream.read(70_001), b"")) == data
            assert stream.read(1) == b""
        with closing(backend.open("a")) as stream:
            assert stream.read(1) == data[:1]
        assert read(backend, "a") == data

    # What is not there

    def test_opening_what_is_not_there(self, backend: StorageBackend) -> None:
        backend.put("a/b", BytesSource(b""))
        for key in ("nothing", "a", "a/b/c", "a/c"):
            with pytest.raises(ObjectNotFound):
                backend.open(key)
            with pytest.raises(ObjectNotFound):
                backend.open(key, offset=5, length=5)
            with pytest.raises(ObjectNotFound):
                backend.open(key, length=0)

    def test_stat_of_what_is_not_there(self, backend: StorageBackend) -> None:
        backend.put("a/b", BytesSource(b""))
        for key in ("nothing", "a", "a/b/c", "a/c"):
            with pytest.raises(ObjectNotFound):
                backend.stat(key)

    def test_delete(self, backend: StorageBackend) -> None:
        backend.put("a/b", BytesSource(b"1"))
        backend.put("a/c", BytesSource(b"2"))
        for key in ("a/b", "a/b", "never/was", "a", "a/c/d"):
            backend.delete(key)
        with pytest.raises(ObjectNotFound):
            backend.stat("a/b")
        assert keys(backend) == ["a/c"]

    def test_a_deleted_key_is_free(self, backend: StorageBackend) -> None:
        backend.put("a", BytesSource(b"1"))
        backend.delete("a")
        backend.put("a", BytesSource(b"2"))
        assert read(backend, "a") == b"2"

    # Never overwritten

    def test_a_taken_key_is_refused(self, backend: StorageBackend) -> None:
        backend.put("a", BytesSource(b"first"))
        another = self.another(backend)
        for second in (b"first", b"other", b""):
            with pytest.raises(ObjectExists):
                another.put("a", BytesSource(second))
        assert read(backend, "a") == b"first"

    def test_a_taken_key_is_refused_for_a_big_object(self, backend: StorageBackend) -> None:
        backend.put("a", BytesSource(b"first"))
        with pytest.raises(ObjectExists):
            backend.put("a", BytesSource(noise(self.big_bytes)))
        assert read(backend, "a") == b"first"

    @pytest.mark.parametrize("big", [False, True])
    def test_of_concurrent_putters_one_wins(self, backend: StorageBackend, big: bool) -> None:
        conditional_put = backend.probe().conditional_put
        candidates = [noise(self.big_bytes if big else 1000, seed=seed) for seed in range(3)]
        together = threading.Barrier(len(candidates))
        backends = [backend, *(self.another(backend) for _ in candidates[1:])]

        def put(number: int) -> bytes | None:
            together.wait()
            try:
                backends[number].put("contested", BytesSource(candidates[number]))
            except (ObjectExists, Unavailable):
                return None
            return candidates[number]

        with ThreadPoolExecutor(len(candidates)) as pool:
            stored = [data for data in pool.map(put, range(len(candidates))) if data is not None]
        assert stored
        assert read(backend, "contested") in stored
        if conditional_put:
            assert len(stored) == 1

    # Nothing but what was announced

    def test_wrong_bytes_are_refused(self, backend: StorageBackend) -> None:
        data = noise(5000)
        self._refused(backend, AnnouncedSource(data, len(data), hashlib.sha256(b"other").hexdigest()))

    def test_wrong_bytes_of_a_big_object_are_refused(self, backend: StorageBackend) -> None:
        data = noise(self.big_bytes)
        self._refused(backend, AnnouncedSource(data, len(data), hashlib.sha256(b"other").hexdigest()))

    @pytest.mark.parametrize("error_bytes", [-1, 1])
    @pytest.mark.parametrize("big", [False, True])
    def test_a_wrong_size_is_refused(self, backend: StorageBackend, error_bytes: int, big: bool) -> None:
        data = noise(self.big_bytes if big else 5000)
        digest = hashlib.sha256(data).hexdigest()
        self._refused(backend, AnnouncedSource(data, len(data) + error_bytes, digest))

    @pytest.mark.parametrize("big", [False, True])
    def test_a_source_that_fails_midway_stores_nothing(self, backend: StorageBackend, big: bool) -> None:
        data = noise(self.big_bytes if big else 5000)
        source = FailingSource(data, fails_at=self.fails_at_bytes if big else 2500)
        with pytest.raises(OSError, match="on fire"):
            backend.put("a", source)
        self._assert_empty(backend)
        backend.put("a", BytesSource(data))
        assert read(backend, "a") == data

    def _refused(self, backend: StorageBackend, source: Source) -> None:
        with pytest.raises(Corrupted):
            backend.put("a", source)
        self._assert_empty(backend)

    def _assert_empty(self, backend: StorageBackend) -> None:
        assert keys(backend) == []
        with pytest.raises(ObjectNotFound):
            backend.stat("a")

    # Going on with an interrupted put

    def test_an_interrupted_put_goes_on(self, backend: StorageBackend) -> None:
        data, token = noise(self.big_bytes), self._interrupted(backend)
        later = self.another(backend)
        tokens: list[str] = []
        info = later.put("a", BytesSource(data), resume=token, on_resume_token=tokens.append)
        assert_describes(info, "a", data)
        assert read(backend, "a") == data
        if token is not None:
            assert tokens == [token]

    def test_a_resumed_put_of_changed_bytes_is_refused(self, backend: StorageBackend) -> None:
        token = self._interrupted(backend)
        changed = b"X" + noise(self.big_bytes)[1:]
        announced = hashlib.sha256(noise(self.big_bytes)).hexdigest()
        with pytest.raises(Corrupted):
            backend.put("a", AnnouncedSource(changed, len(changed), announced), resume=token)
        self._assert_empty(backend)

    def test_a_token_of_other_bytes_starts_anew(self, backend: StorageBackend) -> None:
        token = self._interrupted(backend)
        other = noise(self.big_bytes, seed=9)
        backend.put("a", BytesSource(other), resume=token)
        assert read(backend, "a") == other
        backend.put("elsewhere", BytesSource(other), resume=token)
        assert read(backend, "elsewhere") == other

    def test_an_unknown_token_starts_anew(self, backend: StorageBackend) -> None:
        data = noise(self.big_bytes)
        for token in ("", "nonsense", '{"upload_id":7}', "[1,2]", "null"):
            backend.put("a", BytesSource(data), resume=token)
            assert read(backend, "a") == data
            backend.discard("a", token)
            backend.discard("b", token)
            assert keys(backend) == ["a"]
            backend.delete("a")

    def test_a_discarded_put_starts_anew(self, backend: StorageBackend) -> None:
        data, token = noise(self.big_bytes), self._interrupted(backend)
        if token is not None:
            backend.discard("a", token)
            backend.discard("a", token)
        self._assert_empty(backend)
        backend.put("a", BytesSource(data), resume=token)
        assert read(backend, "a") == data

    def test_discarding_a_finished_put_changes_nothing(self, backend: StorageBackend) -> None:
        data = noise(self.big_bytes)
        tokens: list[str] = []
        backend.put("a", BytesSource(data), on_resume_token=tokens.append)
        for token in tokens or ["nonsense"]:
            backend.discard("a", token)
        assert read(backend, "a") == data
        with pytest.raises(ObjectExists):
            backend.put("a", BytesSource(data), resume=(tokens or ["nonsense"])[0])

    def _interrupted(self, backend: StorageBackend) -> str | None:
        """The token of a put of `noise(big_bytes)` under "a" that broke off; None if there is none."""
        tokens: list[str] = []
        source = FailingSource(noise(self.big_bytes), fails_at=self.fails_at_bytes)
        with pytest.raises(OSError, match="on fire"):
            backend.put("a", source, on_resume_token=tokens.append)
        self._assert_empty(backend)
        assert all(token.isprintable() for token in tokens)
        if backend.probe().resumable_put:
            assert tokens
        return tokens[-1] if tokens else None

    # Listing

    def test_list_is_in_the_order_of_bytes(self, backend: StorageBackend) -> None:
        stored = [
            "A/b",
            "Z",
            "a-/x",
            "a-b",
            "a-b.c/d",
            "a.b",
            "a/b",
            "a/b-c/d/e",
            "a/c/d",
            "a0",
            "ab",
            "b/a",
            "z",
        ]
        assert stored == sorted(stored)
        put_all(backend, stored)
        assert keys(backend) == stored
        for prefix in ("a", "a/", "a-", "a/b", "a/b/", "A", "b/a", "zz", "/", "../", ".", "a//", "ö"):
            assert keys(backend, prefix) == [key for key in stored if key.startswith(prefix)], prefix
        for start in ("A/b", "a-b", "a-b.c/d", "a/b", "a/b-c/d/e", "z", "a", "a-b/", "a/", "a/z", "a-b.c"):
            later = [key for key in stored if key > start]
            assert keys(backend, start_after=start) == later, start
            assert keys(backend, "a", start_after=start) == [key for key in later if key[0] == "a"], start

    def test_list_describes_what_is_stored(self, backend: StorageBackend) -> None:
        backend.put("a/b", BytesSource(b"12345"))
        [info] = backend.list()
        assert_describes(info, "a/b", b"12345")

    def test_list_goes_over_pages(self, backend: StorageBackend) -> None:
        stored = sorted(f"many/{'d-' if n % 7 else 'd/'}{n:05}" for n in range(self.many_keys))
        put_all(backend, stored)
        assert keys(backend, "many/") == stored
        middle = stored[len(stored) // 2]
        assert keys(backend, "many/", start_after=middle) == [key for key in stored if key > middle]
        walk = backend.list()
        assert [next(walk).key for _ in range(3)] == stored[:3]

    def test_list_of_nothing(self, backend: StorageBackend) -> None:
        assert keys(backend) == []
        assert keys(backend, "a/b", start_after="a/c") == []

    # The rest

    def test_every_method_refuses_an_invalid_key(self, backend: StorageBackend) -> None:
        calls: list[Callable[[str], object]] = [
            lambda key: backend.put(key, BytesSource(b"")),
            lambda key: backend.open(key),
            lambda key: backend.open(key, length=0),
            backend.stat,
            backend.delete,
            lambda key: backend.discard(key, "token"),
        ]
        for key in INVALID_KEYS:
            for call in calls:
                with pytest.raises(InvalidKey):
                    call(key)

    def test_probe_leaves_nothing_behind(self, backend: StorageBackend) -> None:
        backend.put("a", BytesSource(b"stays"))
        assert backend.probe() == self.another(backend).probe()
        assert keys(backend) == ["a"]

    def test_a_key_and_its_directory(self, backend: StorageBackend) -> None:
        """`a` and `a/b` may both be stored or not, but what is stored stays as it was."""
        backend.put("a", BytesSource(b"file"))
        try:
            backend.put("a/b", BytesSource(b"below"))
        except StorageError:
            assert keys(backend) == ["a"]
        else:
            assert read(backend, "a/b") == b"below"
            assert keys(backend) == ["a", "a/b"]
        assert read(backend, "a") == b"file"

    def test_repr_is_short_and_one_line(self, backend: StorageBackend) -> None:
        assert "\n" not in repr(backend)
        assert len(repr(backend)) < 500

    def test_close_is_idempotent(self, backend: StorageBackend) -> None:
        backend.put("a", BytesSource(b"1"))
        backend.close()
        backend.close()


def noise(size_bytes: int, *, seed: int = 1) -> bytes:
    """Always the same for one size and seed."""
    return random.Random(seed).randbytes(size_bytes)  # noqa: S311 - to be told apart, not to be secret


def read(backend: StorageBackend, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
    with closing(backend.open(key, offset=offset, length=length)) as stream:
        return stream.read()


def keys(backend: StorageBackend, prefix: str = "", *, start_after: str = "") -> list[str]:
    return [info.key for info in backend.list(prefix, start_after=start_after)]


def put_all(backend: StorageBackend, wanted: list[str]) -> None:
    shuffled = random.Random(2).sample(wanted, k=len(wanted))  # noqa: S311
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: backend.put(key, BytesSource(key.encode())), shuffled))


def assert_describes(info: ObjectInfo, key: str, data: bytes) -> None:
    assert info.key == key
    assert info.size_bytes == len(data)
    assert info.modified_at.utcoffset() == timedelta(0)
    assert info.sha256 in (None, hashlib.sha256(data).hexdigest())
