"""Taking snapshots: lock, cut, bundle, sibling, final name, catalog. And the store they are kept in.

Crash model: work happens in a scratch directory under `state_dir`, removed by the next snapshot of the
same agent. The catalog is told before the bundle gets its final name and again after (catalog.py).
"""

from __future__ import annotations

import hashlib
import platform
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zstandard

from daemon import __version__, durable
from daemon.bundle.encryption import parse_recipients
from daemon.bundle.sibling import HashingSink, sibling_bytes
from daemon.bundle.writer import write_bundle
from daemon.catalog import Catalog
from daemon.errors import IntegrityError
from daemon.model import (
    SIBLING_SUFFIX,
    AgentSpec,
    BundleKey,
    Ceilings,
    Encryption,
    Header,
    SnapshotRecord,
    Upload,
    UploadState,
    agent_prefix,
    new_snapshot_id,
    presentable,
)

if TYPE_CHECKING:
    from daemon.capture import Capture, CutOptions


class Store:
    """Where this host keeps bundles and what it knows of them: `state_dir`."""

    def __init__(self, state_dir: Path, *, lock_timeout_seconds: float = 0.0) -> None:
        """Raises LocalWriteError."""
        self.state_dir = durable.make_private_directory(state_dir)
        self.scratch = durable.make_private_directory(state_dir / "scratch")
        self.catalog = Catalog(state_dir / "catalog.sqlite")
        self._lock_timeout_seconds = lock_timeout_seconds

    def path_of(self, key: BundleKey) -> Path:
        return self.state_dir / str(key)

    @contextmanager
    def locked_agent(self, tenant: str, agent_id: str) -> Iterator[None]:
        """Be the only one that works on this agent, and tidy up after whoever was killed while doing so.

        Raises BusyError, LocalWriteError.
        """
        name = f"{tenant}.{agent_id}"
        path = self.state_dir / "locks" / f"agent.{name}.lock"
        what = f"agent {agent_id!r}"
        with durable.file_lock(path, what=what, timeout_seconds=self._lock_timeout_seconds):
            self.catalog.settle(tenant, agent_id, is_in_place=self._is_in_place)
            for leftover in (self.state_dir / agent_prefix(tenant, agent_id)).glob(
                f"{durable.TEMPORARY_PREFIX}*"
            ):
                leftover.unlink(missing_ok=True)
            yield

    @contextmanager
    def locked_destination(self, name: str, *, timeout_seconds: float) -> Iterator[None]:
        """Be the only one that uploads to a destination. Raises BusyError."""
        path = self.state_dir / "locks" / f"upload.{name}.lock"
        with durable.file_lock(path, what=f"destination {name!r}", timeout_seconds=timeout_seconds):
            yield

    def _is_in_place(self, record: SnapshotRecord) -> bool:
        """Whether an announced bundle got its final name; if not, its sibling goes too."""
        path = self.path_of(record.key)
        if path.is_file() and _sha256_of(path) == record.sha256:
            return True
        path.with_name(path.name + SIBLING_SUFFIX).unlink(missing_ok=True)
        return False


@dataclass(frozen=True, slots=True)
class Sealing:
    """How bundles are made. With recipients they are encrypted, on every path, or not made at all."""

    recipients: tuple[str, ...] = ()
    compression_level: int = 3
    cut: CutOptions | None = None


def take_snapshot(
    store: Store,
    spec: AgentSpec,
    *,
    sealing: Sealing,
    destinations: Sequence[str] = (),
    label: str | None = None,
    created_by: str = "cli",
    unless_unchanged: bool = False,
) -> SnapshotRecord:
    """Take one snapshot and seal it into a local bundle, which then waits in the outbox of `destinations`.

    An incomplete one is sealed too and says so. unless_unchanged: where nothing of the agent has changed
    since its latest complete snapshot, that one is noted as still current (`unchanged_at_ms`) and returned.
    Raises AgentNotFound, BusyError, ConfigError (recipients), NotOneInstant, RefusedError, LocalWriteError.
    """
    from daemon.capture import take_cut_unless  # slow to import, and not for those who only look at a store

    label = None if label is None else presentable(label)
    recipients = parse_recipients(sealing.recipients)  # first of all: no capture that could not be sealed
    with (
        store.locked_agent(spec.tenant, spec.agent_id),
        durable.scratch_directory(
            store.scratch, f"{spec.tenant}.{spec.agent_id}", what="a snapshot of this agent"
        ) as scratch,
        durable.translating_os_errors("write the snapshot below", store.state_dir),
    ):
        latest = _latest_of_use(store, spec, destinations) if unless_unchanged else None
        looked_at_ms = time.time_ns() // 1_000_000

        def is_current(fingerprint: str) -> bool:
            return latest is not None and latest.fingerprint == _basis(fingerprint, sealing)

        capture = take_cut_unless(is_current, spec, scratch, options=sealing.cut)
        if capture is None:
            assert latest is not None
            store.catalog.note_unchanged(latest.snapshot_id, at_ms=looked_at_ms)
            return store.catalog.find(latest.snapshot_id)
        record = _seal(
            scratch / "bundle",
            capture,
            recipients,
            sealing=sealing,
            destinations=destinations,
            label=label,
            created_by=created_by,
        )
        _put_in_place(store, record, scratch / "bundle", destinations)
    return record


def _seal(
    bundle: Path,
    capture: Capture,
    recipients: list[Any],
    *,
    sealing: Sealing,
    destinations: Sequence[str],
    label: str | None,
    created_by: str,
) -> SnapshotRecord:
    """Write a capture to `bundle`, and what the catalog is to know of it."""
    spec, created_at_ms = capture.spec, capture.created_at_ms
    snapshot_id = new_snapshot_id(at_ms=created_at_ms)
    key = BundleKey(spec.tenant, spec.agent_id, snapshot_id, encrypted=bool(recipients))
    sha256 = _write(bundle, key, capture, recipients, sealing=sealing, label=label, created_by=created_by)
    return SnapshotRecord(
        key=key,
        created_at_ms=created_at_ms,
        label=label,
        complete=capture.is_complete,
        consistency=capture.consistency,
        size_bytes=bundle.stat().st_size,
        sha256=sha256,
        content_bytes=capture.content_bytes,
        failures=tuple(capture.failures),
        uploads={name: Upload(UploadState.PENDING) for name in destinations},
        fingerprint=_basis(capture.fingerprint, sealing),
    )


def _latest_of_use(store: Store, spec: AgentSpec, destinations: Sequence[str]) -> SnapshotRecord | None:
    """The latest complete snapshot, if it is where a new one would go."""
    latest = store.catalog.latest(spec.tenant, spec.agent_id)
    return latest if latest is not None and _is_kept(store, latest, destinations) else None


def _is_kept(store: Store, record: SnapshotRecord, destinations: Sequence[str]) -> bool:
    """Whether a snapshot is, or will be, everywhere where a new one would go."""
    uploads = [record.uploads.get(name) for name in destinations]
    if any(upload is None for upload in uploads):
        return False
    is_everywhere = all(upload is not None and upload.state == UploadState.CONFIRMED for upload in uploads)
    return store.path_of(record.key).is_file() or (is_everywhere and bool(uploads))


def _basis(fingerprint: str | None, sealing: Sealing) -> str | None:
    """Of a fingerprint and of all else that makes a bundle what it is."""
    if fingerprint is None:
        return None
    facts = (fingerprint, sealing.recipients, __version__)
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _write(
    bundle: Path,
    key: BundleKey,
    capture: Capture,
    recipients: list[Any],
    *,
    sealing: Sealing,
    label: str | None,
    created_by: str,
) -> str:
    """Write the bundle, fsync it, read it back; its SHA-256."""
    ceilings = Ceilings(members=len(capture.artifacts), total_bytes=capture.content_bytes)
    header = Header(snapshot_id=key.snapshot_id, tenant=key.tenant, agent_id=key.agent_id, ceilings=ceilings)
    with durable.create_private(bundle) as stream:
        sink = HashingSink(stream)
        write_bundle(
            sink,
            header=header,
            artifacts=capture.artifacts,
            facts=_facts(capture, recipients, label=label, created_by=created_by),
            recipients=recipients,
            level=sealing.compression_level,
        )
        durable.sync(stream)
    if _sha256_of(bundle) != sink.sha256:
        raise IntegrityError(
            f"the bundle at {bundle} does not read back as it was written",
            hint="the local disk or memory is failing: check the kernel's log",
        )
    return sink.sha256


def _facts(capture: Capture, recipients: list[Any], *, label: str | None, created_by: str) -> dict[str, Any]:
    return {
        "label": label,
        "created_at_ms": capture.created_at_ms,
        "created_by": created_by,
        "complete": capture.is_complete,
        "consistency": capture.consistency,
        "schema_versions": capture.schema_versions,
        "memdir": capture.memdir,
        "root_mode": capture.root_mode,
        "memdir_mode": capture.memdir_mode,
        "git": capture.git,
        "directories": capture.directories,
        "symlinks": capture.symlinks,
        "cut_logs": capture.cut_logs,
        "states": capture.states,
        "excluded": capture.excluded,
        "failures": tuple(capture.failures),
        "encryption": Encryption(recipients=len(recipients)) if recipients else None,
        "tool_versions": {
            "agentkeep": __version__,
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            "zstd": ".".join(map(str, zstandard.ZSTD_VERSION)),
        },
    }


def _put_in_place(store: Store, record: SnapshotRecord, bundle: Path, destinations: Sequence[str]) -> None:
    final = store.path_of(record.key)
    durable.make_private_directory(final.parent)
    store.catalog.announce(record, destinations)
    sibling = final.with_name(final.name + SIBLING_SUFFIX)
    durable.write_file(sibling, sibling_bytes(record.sha256, final.name))
    durable.rename_into_place(bundle, final)
    store.catalog.confirm_sealed(record.snapshot_id)


def _sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
