"""Bundles that no honest writer makes: built from the format's description with tarfile, zstandard and an
RFC 8785 of our own, so that nothing of what is tested takes part in making them.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import struct
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import zstandard

SNAPSHOT_ID = "019ab1b5-7e00-7abc-8def-0123456789ab"
FRAME_BYTES = 64 << 10


# --- RFC 8785 and the seal ------------------------------------------------------------------------

_SHORT = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def jcs(value: Any) -> bytes:
    """The canonical form of RFC 8785, for values without fractions."""
    return _jcs(value).encode("utf-8")


def _jcs(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case str():
            return '"' + "".join(_jcs_character(char) for char in value) + '"'
        case list():
            return "[" + ",".join(_jcs(item) for item in value) + "]"
        case dict():
            return (
                "{" + ",".join(f"{_jcs(key)}:{_jcs(value[key])}" for key in sorted(value, key=_utf16)) + "}"
            )
        case _:
            raise TypeError(f"no such value in a manifest: {value!r}")


def _jcs_character(char: str) -> str:
    if char in _SHORT:
        return _SHORT[char]
    return f"\\u{ord(char):04x}" if ord(char) < 0x20 else char


def _utf16(text: str) -> list[int]:
    """A string as its UTF-16 code units, by which RFC 8785 sorts."""
    units: list[int] = []
    for char in text:
        code = ord(char)
        if code < 0x10000:
            units.append(code)
        else:
            units += [0xD800 + (code - 0x10000 >> 10), 0xDC00 + (code - 0x10000 & 0x3FF)]
    return units


def seal_over(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "seal"}
    return "sha256:" + hashlib.sha256(jcs(rest)).hexdigest()


# --- zstd frames ----------------------------------------------------------------------------------


def frame(content: bytes, *, with_size: bool = True, with_checksum: bool = True) -> bytes:
    parameters = zstandard.ZstdCompressor(level=3, write_content_size=with_size, write_checksum=with_checksum)
    return parameters.compress(content)


def seek_table(sizes: Sequence[tuple[int, int]]) -> bytes:
    """sizes: of each frame, compressed and not."""
    entries = b"".join(struct.pack("<II", compressed, content) for compressed, content in sizes)
    footer = struct.pack("<I", len(sizes)) + b"\0" + struct.pack("<I", 0x8F92EAB1)
    return struct.pack("<II", 0x184D2A5E, len(entries) + len(footer)) + entries + footer


def container(frames: Sequence[tuple[bytes, int]]) -> bytes:
    """frames: bytes, and how long their content is."""
    table = seek_table([(len(data), content_bytes) for data, content_bytes in frames])
    return b"".join(data for data, _ in frames) + table


def framed(plain: bytes, *, frame_bytes: int = FRAME_BYTES) -> list[tuple[bytes, int]]:
    parts = [plain[start : start + frame_bytes] for start in range(0, len(plain), frame_bytes)]
    return [(frame(part), len(part)) for part in parts]


def split_frames(bundle: bytes) -> list[tuple[bytes, bytes]]:
    """The frames that a bundle's seek table names: each one's bytes and content."""
    count, _flags, magic = struct.unpack("<IBI", bundle[-9:])
    assert magic == 0x8F92EAB1
    table = bundle[-9 - 8 * count : -9]
    found, offset = [], 0
    for compressed_bytes, content_bytes in struct.iter_unpack("<II", table):
        data = bundle[offset : offset + compressed_bytes]
        content = zstandard.ZstdDecompressor().decompress(data)
        assert len(content) == content_bytes
        found.append((data, content))
        offset += compressed_bytes
    assert offset == len(bundle) - 9 - 8 * count - 8
    return found


# --- tar ------------------------------------------------------------------------------------------


@dataclass
class Member:
    """One tar member. `raw` takes the place of its header blocks."""

    name: str
    data: bytes = b""
    type: bytes = tarfile.REGTYPE
    linkname: str = ""
    pax: dict[str, str] = field(default_factory=dict)
    tar_format: Literal[0, 1, 2] = tarfile.PAX_FORMAT
    claimed_bytes: int | None = None
    raw: bytes | None = None

    def to_bytes(self) -> bytes:
        info = tarfile.TarInfo(self.name)
        info.type = self.type
        info.linkname = self.linkname
        info.size = len(self.data) if self.claimed_bytes is None else self.claimed_bytes
        info.mode = 0o600
        info.pax_headers = dict(self.pax)
        blocks = info.tobuf(self.tar_format, "utf-8", "surrogateescape") if self.raw is None else self.raw
        return blocks + self.data + bytes(-len(self.data) % 512)


def raw_pax_header(records: bytes, *, claimed_bytes: int | None = None) -> bytes:
    """An extended header of any bytes, for the member whose header follows."""
    info = tarfile.TarInfo("./PaxHeaders/x")
    info.type = tarfile.XHDTYPE
    info.size = len(records) if claimed_bytes is None else claimed_bytes
    return info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512)


def pax_record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


# --- a whole bundle -------------------------------------------------------------------------------


@dataclass
class Draft:
    """A bundle before it is put together: sound as it comes from `draft`, and open to any change.

    header_json, manifest_json: bytes in the place of the document; tail: what follows the manifest
    reseal: make the seal anew over the manifest as it is when the bundle is built
    """

    header: dict[str, Any]
    members: list[Member]
    manifest: dict[str, Any]
    header_json: bytes | None = None
    manifest_json: bytes | None = None
    tail: list[Member] = field(default_factory=list)
    end: bytes = bytes(1024)
    reseal: bool = True

    def tar(self) -> bytes:
        manifest = copy.deepcopy(self.manifest)
        if self.reseal:
            manifest["seal"] = seal_over(manifest)
        header_json = to_json(self.header) if self.header_json is None else self.header_json
        manifest_json = to_json(manifest) if self.manifest_json is None else self.manifest_json
        members = [
            Member("agentkeep.json", header_json),
            *self.members,
            Member("manifest.json", manifest_json),
            *self.tail,
        ]
        return b"".join(member.to_bytes() for member in members) + self.end

    def build(self) -> bytes:
        return container(framed(self.tar()))

    def declare(self, member: Member, *, name: str | None = None) -> None:
        """Add a member that header and manifest know of."""
        self.members.append(member)
        self.header["ceilings"]["members"] += 1
        self.header["ceilings"]["total_bytes"] += len(member.data)
        self.manifest["artifacts"].append(artifact_entry(name or member.name, member.data))


def draft(artifacts: Mapping[str, bytes] | None = None) -> Draft:
    artifacts = {"files/notes.txt": b"remember the milk\n"} if artifacts is None else artifacts
    return Draft(
        header={
            "format": "agentkeep-bundle",
            "version": 1,
            "snapshot_id": SNAPSHOT_ID,
            "tenant": "default",
            "agent_id": "ana",
            "ceilings": {
                "members": len(artifacts),
                "total_bytes": sum(len(data) for data in artifacts.values()),
            },
        },
        members=[Member(name, data) for name, data in artifacts.items()],
        manifest={
            "manifest_version": 1,
            "snapshot_id": SNAPSHOT_ID,
            "agent_id": "ana",
            "tenant": "default",
            "label": None,
            "created_at_ms": 1_764_000_000_123,
            "created_by": "somebody",
            "complete": True,
            "consistency": {"level": "point_in_time", "window_ms": 3, "attempts": 1, "moved": []},
            "schema_versions": {},
            "artifacts": [artifact_entry(name, data) for name, data in artifacts.items()],
            "tool_versions": {},
        },
    )


def artifact_entry(name: str, data: bytes) -> dict[str, Any]:
    return {
        "path_in_bundle": name,
        "kind": "file",
        "size_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "mode": 0o600,
        "mtime": None,
    }


def to_json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")


class CountingStream(io.BytesIO):
    """Knows how much of it was read."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.read_bytes = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.read_bytes += len(data)
        return data
