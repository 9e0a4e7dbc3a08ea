"""The tar inside: ustar with pax headers, regular files only.

Headers are written by the standard library. They are read here, since tarfile reads pax headers of any
size into memory and accepts far more than a bundle may hold.

Source: POSIX.1-2017, pax, "pax Interchange Format".
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import dataclass

from daemon.errors import MalformedBundle

BLOCK_BYTES = 512
_MAX_PAX_BYTES = 64 << 10
_PAX_KEYS = {"path", "size", "mtime"}
END = bytes(2 * BLOCK_BYTES)


@dataclass(frozen=True, slots=True)
class Entry:
    name: str
    size_bytes: int


def header(name: str, *, size_bytes: int, mode: int, mtime_seconds: int) -> bytes:
    """The blocks that precede a regular file's content."""
    info = tarfile.TarInfo(name)
    info.size = size_bytes
    info.mode = mode
    info.mtime = mtime_seconds
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def padding_bytes(size_bytes: int) -> int:
    return -size_bytes % BLOCK_BYTES


def read_entry(read: Callable[[int], bytes]) -> Entry | None:
    """The next entry, or None at the end of the archive. Raises MalformedBundle."""
    pax: dict[str, str] = {}
    info = _read_info(read)
    if info is None:
        return None
    if info.type == tarfile.XHDTYPE:
        pax = _read_pax(read, info.size)
        info = _read_info(read)
        if info is None:
            raise MalformedBundle("a tar extended header is followed by nothing")
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise MalformedBundle(f"a tar member is neither a plain file nor its header: {info.name[:200]!r}")
    size_bytes = _number(pax["size"]) if "size" in pax else info.size
    if size_bytes < 0:
        raise MalformedBundle("a tar member has a negative size")
    return Entry(pax.get("path", info.name), size_bytes)


def _read_info(read: Callable[[int], bytes]) -> tarfile.TarInfo | None:
    block = read(BLOCK_BYTES)
    if len(block) != BLOCK_BYTES:
        raise MalformedBundle("the tar ends without its end marker")
    if block == bytes(BLOCK_BYTES):
        if read(BLOCK_BYTES) != bytes(BLOCK_BYTES) or read(1):
            raise MalformedBundle("the tar's end marker is not its end")
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, ValueError) as exc:
        raise MalformedBundle(f"a tar header is damaged: {exc}") from exc


def _read_pax(read: Callable[[int], bytes], size_bytes: int) -> dict[str, str]:
    """Records of the form `LENGTH KEY=VALUE\\n`."""
    if not 0 < size_bytes <= _MAX_PAX_BYTES:
        raise MalformedBundle("a tar extended header is larger than it may be")
    data = read(size_bytes + padding_bytes(size_bytes))[:size_bytes]
    records: dict[str, str] = {}
    while data:
        length_text, _, _ = data.partition(b" ")
        length = _number(length_text[:8].decode("ascii", "replace"))
        if length > len(data):
            raise MalformedBundle("a tar extended header is damaged")
        record, data = data[len(length_text) + 1 : length], data[length:]
        key, equals, value = record[:-1].partition(b"=")
        if record[-1:] != b"\n" or not equals:
            raise MalformedBundle("a tar extended header is damaged")
        try:
            name, text = key.decode(), value.decode()
        except UnicodeDecodeError as exc:
            raise MalformedBundle("a tar extended header is not UTF-8") from exc
        if name not in _PAX_KEYS or name in records:
            raise MalformedBundle(f"a tar extended header has an unexpected key: {name[:40]!r}")
        records[name] = text
    return records


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise MalformedBundle("a number in a tar extended header is damaged")
    return int(text)
