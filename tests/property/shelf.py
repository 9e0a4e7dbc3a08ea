"""A host with bundles: a store with sealed snapshots in it, and destinations they can be uploaded to."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daemon.bundle.sibling import sibling_bytes
from daemon.destinations import Destination
from daemon.locate import Places
from daemon.model import SnapshotRecord, new_snapshot_id
from daemon.snapshots import Store
from daemon.transfer import upload
from storage_backends import BytesSource, StorageBackend, open_backend
from tests.property.honest import CUT, Piece, Sealed, seal

NOON_MS = 1_764_000_000_000
HOUR_MS = 3_600_000


@dataclass
class Shelf:
    """memory(), directory(): new destinations, empty; put(): a sealed snapshot, as if it had been taken."""

    root: Path
    destinations: dict[str, Destination] = field(default_factory=dict)
    agents: list[tuple[str, str]] = field(default_factory=lambda: [("default", "ana")])

    def __post_init__(self) -> None:
        self.store = Store(self.root / "state")

    @property
    def places(self) -> Places:
        return Places(self.store, self.destinations, self.agents)

    @property
    def elsewhere(self) -> Places:
        """The same destinations, from a host that has the same configuration and nothing else."""
        store = Store(self.root / f"new-host-{secrets.token_hex(4)}")
        return Places(store, self.destinations, self.agents)

    def memory(self, name: str) -> Destination:
        return self._add(Destination(name, f"memory://{name}-{secrets.token_hex(8)}"))

    def directory(self, name: str) -> Destination:
        (self.root / name).mkdir()
        return self._add(Destination(name, f"file://{self.root / name}"))

    def missing_directory(self, name: str) -> Destination:
        """A share that is not mounted."""
        return self._add(Destination(name, f"file://{self.root / name}-not-mounted"))

    def _add(self, destination: Destination) -> Destination:
        self.destinations[destination.name] = destination
        return destination

    def put(
        self,
        *,
        at_ms: int = NOON_MS,
        tenant: str = "default",
        agent_id: str = "ana",
        complete: bool = True,
        recipients: Sequence[Any] = (),
        data: bytes = b"remember the milk\n",
        to: Sequence[Destination] = (),
    ) -> SnapshotRecord:
        sealed = seal(
            [Piece("files/notes.txt", data)],
            snapshot_id=new_snapshot_id(at_ms=at_ms),
            tenant=tenant,
            agent_id=agent_id,
            complete=complete,
            recipients=recipients,
        )
        record = record_of(sealed, at_ms=at_ms)
        path = self.store.path_of(sealed.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sealed.data)
        path.with_name(path.name + ".sha256").write_bytes(sibling_bytes(record.sha256, path.name))
        self.store.catalog.announce(record, [destination.name for destination in to])
        self.store.catalog.confirm_sealed(record.snapshot_id)
        return record

    def upload(self, record: SnapshotRecord, *destinations: Destination) -> None:
        for destination in destinations:
            upload(self.store, record, destination)

    def forget_local(self, record: SnapshotRecord) -> None:
        path = self.store.path_of(record.key)
        path.unlink()
        path.with_name(path.name + ".sha256").unlink()


def record_of(sealed: Sealed, *, at_ms: int) -> SnapshotRecord:
    return SnapshotRecord(
        key=sealed.key,
        created_at_ms=at_ms,
        label=None,
        complete=sealed.manifest.complete,
        consistency=CUT,
        size_bytes=len(sealed.data),
        sha256=hashlib.sha256(sealed.data).hexdigest(),
        content_bytes=sum(artifact.size_bytes for artifact in sealed.manifest.artifacts),
    )


def backend_of(destination: Destination) -> StorageBackend:
    return open_backend(destination.url, destination.options)


def stored(destination: Destination) -> dict[str, bytes]:
    """Every object at a destination."""
    backend = backend_of(destination)
    objects = {}
    for info in backend.list():
        with backend.open(info.key) as stream:
            objects[info.key] = stream.read()
    return objects


def store_object(destination: Destination, key: str, data: bytes) -> None:
    backend_of(destination).put(key, BytesSource(data))
