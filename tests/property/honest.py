"""Bundles as agentkeep writes them, from bytes at hand, and what comes out when they are read."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from daemon.bundle.encryption import new_identity, parse_identities, parse_recipients
from daemon.bundle.frames import Sink
from daemon.bundle.reader import BundleContents, read_bundle
from daemon.bundle.sibling import sibling_bytes
from daemon.bundle.writer import write_bundle
from daemon.locate import LocalBundle
from daemon.model import (
    ArtifactKind,
    BundleKey,
    Ceilings,
    Consistency,
    Header,
    Manifest,
    new_snapshot_id,
)

CREATED_AT_MS = 1_764_000_000_123
CUT = Consistency(level="point_in_time", window_ms=7, attempts=1)


@dataclass(frozen=True)
class Piece:
    """An artifact whose bytes are at hand."""

    path_in_bundle: str
    data: bytes
    kind: ArtifactKind = ArtifactKind.FILE
    mode: int = 0o640
    mtime_ns: int | None = 1_700_000_000_123_456_789

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def open(self) -> BinaryIO:
        return io.BytesIO(self.data)


@dataclass(frozen=True)
class Sealed:
    """A whole bundle in memory."""

    data: bytes
    manifest: Manifest
    key: BundleKey

    def placed(self, directory: Path, *, name: str | None = None) -> LocalBundle:
        """Its file and sibling in `directory`."""
        return place(directory, self.data, name=name or self.key.file_name)


@dataclass(frozen=True)
class KeyPair:
    identity: str
    recipient: str
    identities: list[Any] = field(repr=False)
    recipients: list[Any] = field(repr=False)


def new_key_pair() -> KeyPair:
    identity, recipient = new_identity()
    return KeyPair(identity, recipient, parse_identities(identity.encode()), parse_recipients([recipient]))


def seal(
    pieces: Sequence[Piece],
    *,
    recipients: Sequence[Any] = (),
    snapshot_id: str | None = None,
    tenant: str = "default",
    agent_id: str = "ana",
    **facts: Any,
) -> Sealed:
    sink = io.BytesIO()
    key = BundleKey(tenant, agent_id, snapshot_id or new_snapshot_id(), encrypted=bool(recipients))
    manifest = write(sink, key, pieces, recipients=recipients, **facts)
    return Sealed(sink.getvalue(), manifest, key)


def write(
    sink: Sink, key: BundleKey, pieces: Sequence[Piece], *, recipients: Sequence[Any] = (), **facts: Any
) -> Manifest:
    ceilings = Ceilings(members=len(pieces), total_bytes=sum(piece.size_bytes for piece in pieces))
    return write_bundle(
        sink,
        header=Header(
            snapshot_id=key.snapshot_id, tenant=key.tenant, agent_id=key.agent_id, ceilings=ceilings
        ),
        artifacts=pieces,
        facts={
            "created_at_ms": CREATED_AT_MS,
            "created_by": "test",
            "complete": True,
            "consistency": CUT,
            **facts,
        },
        recipients=list(recipients),
        level=3,
    )


def place(directory: Path, data: bytes, *, name: str = "bundle.tar.zst") -> LocalBundle:
    """Bytes as a file with a true sibling."""
    path = directory / name
    path.write_bytes(data)
    path.with_name(name + ".sha256").write_bytes(sibling_bytes(hashlib.sha256(data).hexdigest(), name))
    return LocalBundle(path)


def read(data: bytes, *, identities: Sequence[Any] = ()) -> tuple[BundleContents, dict[str, bytes]]:
    """What `read_bundle` says of a bundle, and every artifact's bytes."""
    received: dict[str, io.BytesIO] = {}
    contents = read_bundle(
        io.BytesIO(data),
        encrypted=bool(identities),
        identities=identities,
        receive=lambda name, _size_bytes: received.setdefault(name, io.BytesIO()),
    )
    return contents, {name: stream.getvalue() for name, stream in received.items()}


def contents_of(pieces: Sequence[Piece]) -> Mapping[str, bytes]:
    return {piece.path_in_bundle: piece.data for piece in pieces}
