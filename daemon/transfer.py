"""Outbox to destinations, and export: download and verify.

Upload: the sibling first, the bundle last, both put-if-absent, and nothing counts before it has been
confirmed at the destination. Export: to a temporary name beside the target, hashed on the way, compared
with the sibling, fsynced, renamed; nothing unproven ever has the final name.

Crash model: an interrupted upload is taken up again (from its resume token where the destination can);
an interrupted export leaves a temporary file, which the next export of the same name removes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from daemon import durable
from daemon.bundle.sibling import HashingReader, sibling_bytes
from daemon.destinations import Destination
from daemon.errors import (
    AgentkeepError,
    BusyError,
    IntegrityError,
    RefusedError,
    SiblingMismatch,
    SnapshotNotFound,
    StorageUnavailable,
    UsageError,
)
from daemon.locate import Bundle
from daemon.model import SIBLING_SUFFIX, SnapshotRecord, UploadState
from daemon.snapshots import Store
from storage_backends import BytesSource, FileSource, ObjectExists, Source, StorageBackend

_COPY_BYTES = 1 << 20
Progress = Callable[[int], None]


@dataclass(slots=True)
class UploadReport:
    """What a drain did: confirmed and failed hold (snapshot id, destination[, why and what to do])."""

    confirmed: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str, AgentkeepError]] = field(default_factory=list)

    def add(self, other: UploadReport) -> None:
        self.confirmed += other.confirmed
        self.failed += other.failed


def drain_outbox(
    store: Store,
    destinations: Iterable[Destination],
    *,
    only: str | None = None,
    patience_seconds: float = 0.0,
    should_stop: Callable[[], bool] = lambda: False,
) -> UploadReport:
    """Upload what waits for each destination, oldest first; `only` that snapshot if given.

    A destination that is unreachable is left alone for the rest of the call; a bundle that it refuses
    does not hold up the others. patience_seconds: how long to wait for another process that is uploading
    there. Idempotent. Raises nothing for what a destination does: that is in the report and in the catalog.
    """
    report = UploadReport()
    for destination in destinations:
        for record in store.catalog.waiting(destination.name):
            if should_stop():
                return report
            if only is not None and record.snapshot_id != only:
                continue
            try:
                with store.locked_destination(destination.name, timeout_seconds=patience_seconds):
                    _upload_unless_done(store, record.snapshot_id, destination)
            except AgentkeepError as exc:
                report.failed.append((record.snapshot_id, destination.name, exc))
                if isinstance(exc, StorageUnavailable | RefusedError | BusyError):
                    break
            else:
                report.confirmed.append((record.snapshot_id, destination.name))
    return report


def _upload_unless_done(store: Store, snapshot_id: str, destination: Destination) -> None:
    """Whoever held the destination before us may have uploaded this one."""
    record = store.catalog.find(snapshot_id)
    known = record.uploads.get(destination.name)
    if known is None or known.state != UploadState.CONFIRMED:
        upload(store, record, destination)


def upload(store: Store, record: SnapshotRecord, destination: Destination) -> None:
    """Bring one sealed bundle and its sibling to a destination and confirm it there; noted in the catalog.

    Idempotent: an identical object that is already there is success. Raises AgentkeepError.
    """
    catalog = store.catalog
    known = record.uploads.get(destination.name)
    try:
        path = store.path_of(record.key)
        source = _bundle_source(path, record)
        with durable.translating_os_errors("read", path), destination.opened() as backend:
            sibling = BytesSource(sibling_bytes(record.sha256, record.key.file_name))
            _put_proven(backend, record.key.sibling, sibling)
            _put_proven(
                backend,
                str(record.key),
                source,
                resume=known.resume_token if known else None,
                keep_token=lambda token: catalog.keep_resume_token(
                    record.snapshot_id, destination.name, token
                ),
            )
    except AgentkeepError as exc:
        passing = isinstance(exc, StorageUnavailable)
        state = UploadState.PENDING if passing else UploadState.FAILED
        catalog.note_upload(record.snapshot_id, destination.name, state, error=str(exc))
        raise
    catalog.note_upload(record.snapshot_id, destination.name, UploadState.CONFIRMED)


def _bundle_source(path: Path, record: SnapshotRecord) -> FileSource:
    if not path.is_file():
        raise SnapshotNotFound(
            f"the bundle {path} is gone before it was uploaded", hint="take a new snapshot of the agent"
        )
    return FileSource(path, record.size_bytes, record.sha256)


def _put_proven(
    backend: StorageBackend,
    key: str,
    source: Source,
    *,
    resume: str | None = None,
    keep_token: Callable[[str], None] | None = None,
) -> None:
    """Put, and know that what is stored under `key` now is `source`."""
    try:
        put = backend.put(key, source, resume=resume, on_resume_token=keep_token)
        proven = put.sha256
    except ObjectExists:
        proven = None
    info = backend.stat(key)
    stored = proven or info.sha256 or _read_back(backend, key)
    if (info.size_bytes, stored) != (source.size_bytes, source.sha256):
        raise IntegrityError(
            f"another object is stored under {key}: {info.size_bytes} bytes, SHA-256 {stored}",
            hint="nothing was overwritten; find out who put it there, then move it away",
        )


def _read_back(backend: StorageBackend, key: str) -> str:
    digest = hashlib.sha256()
    with backend.open(key) as stream:
        while data := stream.read(_COPY_BYTES):
            digest.update(data)
    return digest.hexdigest()


def export(bundle: Bundle, target: Path, *, progress: Progress | None = None) -> Path:
    """Fetch a bundle and its sibling, verified on the way, to `target`: a directory takes it under its own
    name, anything else is the file's name; parents are made. The path of the bundle.

    Raises SiblingMissing, SiblingMismatch, SnapshotNotFound, LocalWriteError, RefusedError (something
    else is there already), StorageUnavailable. Idempotent: a target that is already this bundle is success.
    """
    final = target / bundle.file_name if target.is_dir() else target
    expected = bundle.expected_sha256()
    try:
        sibling = sibling_bytes(expected, final.name)
    except ValueError as exc:
        raise UsageError(
            f"{final.name!r} cannot be a bundle's name", hint="use letters, digits, dot, dash, underscore"
        ) from exc
    temporary = final.with_name(f"{durable.TEMPORARY_PREFIX}{final.name}.partial")
    with (
        durable.made_directory(final.parent),
        durable.translating_os_errors("write", final),
        durable.claimed_temporary(temporary, what=f"the export to {final}") as out,
    ):
        sibling_path = final.with_name(final.name + SIBLING_SUFFIX)
        durable.discard_temporaries(sibling_path)
        is_there = final.exists()
        if is_there:
            _check_same(final, expected)
        else:
            _fetch(bundle, out, expected, progress)
        # The sibling first: whoever sees the bundle finds it.
        durable.write_file(sibling_path, sibling)
        if not is_there:
            _claim(temporary, final)
    return final


def _check_same(final: Path, expected: str) -> None:
    if final.is_file():
        with durable.translating_os_errors("read", final), final.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() == expected:
                return
    raise RefusedError(
        f"{final} exists and is something else", hint="choose another name, or move that file away first"
    )


def _fetch(bundle: Bundle, out: BinaryIO, expected: str, progress: Progress | None) -> None:
    with HashingReader(bundle.open()) as source:
        while data := source.read(_COPY_BYTES):
            out.write(data)
            if progress is not None:
                progress(source.size_bytes)
        actual = source.finish()
    if actual != expected:
        raise SiblingMismatch(
            f"{bundle.name} is not what its sibling says: SHA-256 {actual}, not {expected}",
            hint="nothing was kept; try again, then take another copy or snapshot",
        )
    durable.sync(out)


def _claim(temporary: Path, final: Path) -> None:
    """Give the final name without taking it from anybody who came first."""
    try:
        os.link(temporary, final)
    except FileExistsError as exc:
        raise RefusedError(f"{final} appeared meanwhile", hint="try again") from exc
    except OSError:  # no hard links on this file system
        temporary.replace(final)
    durable.fsync_directory(final.parent)
