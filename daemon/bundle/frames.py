"""A byte stream as independent zstd frames that end in a seek table.

Written and read on several threads (zstandard lets go of the interpreter lock), in order, with a bounded
number of frames in flight. `zstd -d` reads it like any other file.

Source: RFC 8878 (frames, blocks); the zstd seekable format 0.1.0, contrib/seekable_format of zstd.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, Protocol

import zstandard

from daemon.errors import MalformedBundle

REGION_BYTES = 1 << 20
"""How much content a frame holds at most when we write: see docs/FORMAT.md for how it was chosen."""
MAX_FRAME_CONTENT_BYTES = 4 << 20
"""How much we accept when we read."""
THREADS = 2
_IN_FLIGHT = 2 * THREADS

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_SEEK_TABLE_MAGIC = struct.pack("<I", 0x184D2A5E)
_SEEKABLE_MAGIC = 0x8F92EAB1
_MAX_BLOCK_BYTES = 128 << 10
_BLOCK_RLE, _BLOCK_RESERVED = 1, 3

_local = threading.local()


class Sink(Protocol):
    def write(self, data: bytes, /) -> object: ...


class FrameWriter:
    """Compresses what is written. `cut` ends the frame that is being filled; `close` writes the table."""

    def __init__(self, sink: Sink, *, level: int) -> None:
        self._sink = sink
        self._level = level
        self._buffer = bytearray()
        self._table: list[tuple[int, int]] = []
        self._pending: deque[tuple[int, Future[bytes]]] = deque()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="compress")

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            taken = view[: REGION_BYTES - len(self._buffer)]
            self._buffer += taken
            view = view[len(taken) :]
            if len(self._buffer) == REGION_BYTES:
                self.cut()

    def cut(self) -> None:
        """The next byte starts a new frame. Nothing to do if it would anyway."""
        if not self._buffer:
            return
        content = bytes(self._buffer)
        self._buffer.clear()
        self._pending.append((len(content), self._pool.submit(_compress, content, self._level)))
        while len(self._pending) > _IN_FLIGHT:
            self._drain_one()

    def close(self) -> None:
        """Write what is left and the seek table. The sink stays open."""
        self.cut()
        while self._pending:
            self._drain_one()
        self._sink.write(_seek_table(self._table))
        self._pool.shutdown()

    def abandon(self) -> None:
        """Free the threads without writing anything more. Idempotent."""
        self._pool.shutdown(cancel_futures=True)

    def _drain_one(self) -> None:
        content_bytes, future = self._pending.popleft()
        frame = future.result()
        self._table.append((len(frame), content_bytes))
        self._sink.write(frame)


class FrameReader:
    """Decompresses a stream that a FrameWriter wrote, strictly: every frame small and of known size, the
    seek table last and true, nothing after it. Raises MalformedBundle at the first byte that is not so.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._input = stream
        self._table: list[tuple[int, int]] = []
        self._contents = self._decompressed()
        self._chunk = memoryview(b"")

    def read(self, size_bytes: int) -> bytes:
        """Up to `size_bytes` bytes; fewer only at the end."""
        if len(self._chunk) >= size_bytes:  # the usual case, without a copy too many
            taken, self._chunk = self._chunk[:size_bytes], self._chunk[size_bytes:]
            return bytes(taken)
        parts = bytearray()
        while len(parts) < size_bytes:
            if not self._chunk:
                content = next(self._contents, None)
                if content is None:
                    break
                self._chunk = memoryview(content)
            taken = self._chunk[: size_bytes - len(parts)]
            parts += taken
            self._chunk = self._chunk[len(taken) :]
        return bytes(parts)

    def close(self) -> None:
        """Free the threads. The stream stays open. Idempotent."""
        self._contents.close()

    def _decompressed(self) -> Generator[bytes, None, None]:
        pending: deque[Future[bytes]] = deque()
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="decompress")
        try:
            for frame, content_bytes in self._frames():
                pending.append(pool.submit(_decompress, frame, content_bytes))
                if len(pending) > _IN_FLIGHT:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _frames(self) -> Iterator[tuple[bytes, int]]:
        while (magic := self._exactly(4, "a frame")) == _ZSTD_MAGIC:
            frame, content_bytes = self._frame(magic)
            self._table.append((len(frame), content_bytes))
            yield frame, content_bytes
        if magic != _SEEK_TABLE_MAGIC:
            raise MalformedBundle("not a bundle: neither a zstd frame nor a seek table where one should be")
        expected = _seek_table(self._table)
        if self._exactly(len(expected) - 4, "the seek table") != expected[4:]:
            raise MalformedBundle("the seek table does not describe the frames before it")
        if self._input.read(1):
            raise MalformedBundle("there are bytes after the end of the bundle")

    def _frame(self, magic: bytes) -> tuple[bytes, int]:
        """One frame's bytes, taken from the stream without decompressing, and its content's size."""
        frame = bytearray(magic + self._exactly(2, "a frame header"))
        descriptor = frame[4]
        header_bytes = _header_bytes(descriptor)
        frame += self._exactly(header_bytes - len(frame), "a frame header")
        try:
            parameters = zstandard.get_frame_parameters(bytes(frame))
        except zstandard.ZstdError as exc:
            raise MalformedBundle(f"a frame header is damaged: {exc}") from exc
        has_size = bool(descriptor >> 6 or descriptor & 0x20)
        if not has_size or not 0 < parameters.content_size <= MAX_FRAME_CONTENT_BYTES:
            raise MalformedBundle("a frame does not say its size, or is larger than a frame may be")
        if parameters.dict_id:
            raise MalformedBundle("a frame asks for a dictionary")
        last = False
        while not last:
            block_header = self._exactly(3, "a block")
            value = int.from_bytes(block_header, "little")
            last, kind, size_bytes = bool(value & 1), value >> 1 & 3, value >> 3
            if kind == _BLOCK_RESERVED or size_bytes > _MAX_BLOCK_BYTES:
                raise MalformedBundle("a block breaks the rules of zstd")
            frame += block_header + self._exactly(1 if kind == _BLOCK_RLE else size_bytes, "a block")
            if len(frame) > _largest_frame_bytes(parameters.content_size):
                raise MalformedBundle("a frame is larger than its content can need")
        if descriptor & 0x04:
            frame += self._exactly(4, "a frame's checksum")
        return bytes(frame), parameters.content_size

    def _exactly(self, size_bytes: int, what: str) -> bytes:
        data = bytearray()
        while len(data) < size_bytes:
            part = self._input.read(size_bytes - len(data))
            if not part:
                raise MalformedBundle(f"the bundle ends in the middle of {what}: it is truncated")
            data += part
        return bytes(data)


def _header_bytes(descriptor: int) -> int:
    """The length of a frame header with its magic (RFC 8878, 3.1.1.1)."""
    single_segment = bool(descriptor & 0x20)
    size_field = (1 if single_segment else 0, 2, 4, 8)[descriptor >> 6]
    dictionary_field = (0, 1, 2, 4)[descriptor & 3]
    return 4 + 1 + (0 if single_segment else 1) + dictionary_field + size_field


def _largest_frame_bytes(content_bytes: int) -> int:
    """What no compressor exceeds (ZSTD_COMPRESSBOUND), and a little."""
    return content_bytes + (content_bytes >> 8) + 1024


def _seek_table(table: list[tuple[int, int]]) -> bytes:
    entries = b"".join(struct.pack("<II", frame, content) for frame, content in table)
    footer = struct.pack("<IBI", len(table), 0, _SEEKABLE_MAGIC)
    return _SEEK_TABLE_MAGIC + struct.pack("<I", len(entries) + len(footer)) + entries + footer


def _compress(content: bytes, level: int) -> bytes:
    compressors = _local.__dict__.setdefault("compressors", {})
    if level not in compressors:
        compressors[level] = zstandard.ZstdCompressor(
            level=level, write_checksum=True, write_content_size=True
        )
    compressed: bytes = compressors[level].compress(content)
    return compressed


def _decompress(frame: bytes, content_bytes: int) -> bytes:
    decompressor = _local.__dict__.get("decompressor")
    if decompressor is None:
        decompressor = _local.decompressor = zstandard.ZstdDecompressor()
    try:
        content: bytes = decompressor.decompress(frame, max_output_size=content_bytes)
    except zstandard.ZstdError as exc:
        raise MalformedBundle(f"a frame cannot be decompressed: {exc}") from exc
    if len(content) != content_bytes:
        raise MalformedBundle("a frame does not have the size that it claims")
    return content
