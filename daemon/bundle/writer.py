"""Writing a bundle: header, artifacts, manifest with seal, in one pass over the sources.

Memory is bounded by the frames in flight. What is written is not safe until the caller has fsynced and
renamed it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, BinaryIO, Protocol

from daemon.bundle import tar
from daemon.bundle.encryption import encrypting
from daemon.bundle.frames import REGION_BYTES, FrameWriter, Sink
from daemon.bundle.seal import MAX_MANIFEST_BYTES, seal_of
from daemon.errors import AgentkeepError, RefusedError
from daemon.model import (
    HEADER_NAME,
    MANIFEST_NAME,
    Artifact,
    ArtifactKind,
    Header,
    Manifest,
    mtime_text,
)


class ArtifactSource(Protocol):
    """What is put into a bundle: `open` gives exactly `size_bytes` bytes, or more that are not taken."""

    @property
    def path_in_bundle(self) -> str: ...
    @property
    def kind(self) -> ArtifactKind: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def mode(self) -> int: ...
    @property
    def mtime_ns(self) -> int | None: ...
    def open(self) -> BinaryIO: ...


def write_bundle(
    sink: Sink,
    *,
    header: Header,
    artifacts: Iterable[ArtifactSource],
    facts: dict[str, Any],
    recipients: list[Any],
    level: int,
) -> Manifest:
    """Write a whole bundle to `sink`, encrypted if there are recipients; the sealed manifest.

    facts: the manifest's fields besides ids, artifacts and seal. Raises OSError (reading a source,
    writing the sink) and AgentkeepError.
    """
    with ExitStack() as stack:
        plain: Sink = stack.enter_context(encrypting(sink, recipients)) if recipients else sink
        frames = FrameWriter(plain, level=level)
        stack.callback(frames.abandon)
        created_seconds = facts["created_at_ms"] // 1000
        _add_document(frames, HEADER_NAME, header.model_dump(mode="json"), created_seconds)
        written = tuple(_add_artifact(frames, source, created_seconds) for source in artifacts)
        if len({artifact.path_in_bundle for artifact in written}) != len(written):
            raise AgentkeepError("two artifacts have one name in the bundle, which no reader would take")
        manifest = _sealed(header, written, facts)
        _add_document(frames, MANIFEST_NAME, manifest.model_dump(mode="json"), created_seconds)
        frames.write(tar.END)
        frames.close()
    return manifest


def _sealed(header: Header, artifacts: tuple[Artifact, ...], facts: dict[str, Any]) -> Manifest:
    manifest = Manifest(
        snapshot_id=header.snapshot_id,
        agent_id=header.agent_id,
        tenant=header.tenant,
        artifacts=artifacts,
        seal="",
        **facts,
    )
    return manifest.model_copy(update={"seal": seal_of(manifest.model_dump(mode="json"))})


def _add_document(frames: FrameWriter, name: str, document: dict[str, Any], mtime_seconds: int) -> None:
    data = json.dumps(document, ensure_ascii=False, indent=1).encode() + b"\n"
    if len(data) > MAX_MANIFEST_BYTES:
        raise RefusedError(
            f"{name} would have {len(data) >> 20} MiB; no reader takes more than {MAX_MANIFEST_BYTES >> 20}",
            hint="leave out what need not be kept (`exclude`), or make several agents of it",
        )
    frames.write(tar.header(name, size_bytes=len(data), mode=0o600, mtime_seconds=mtime_seconds))
    frames.write(data + bytes(tar.padding_bytes(len(data))))


def _add_artifact(frames: FrameWriter, source: ArtifactSource, created_seconds: int) -> Artifact:
    mtime_ns = source.mtime_ns
    mtime_seconds = created_seconds if mtime_ns is None else min(max(mtime_ns // 1_000_000_000, 0), 1 << 36)
    frames.write(
        tar.header(
            source.path_in_bundle,
            size_bytes=source.size_bytes,
            mode=source.mode & 0o777,
            mtime_seconds=mtime_seconds,
        )
    )
    # A large artifact's regions are counted from its own start, each a frame of its own.
    is_large = source.size_bytes > REGION_BYTES
    if is_large:
        frames.cut()
    digest = hashlib.sha256()
    left = source.size_bytes
    with source.open() as stream:
        while left:
            data = stream.read(min(left, REGION_BYTES))
            if not data:
                raise AgentkeepError(f"{source.path_in_bundle} became shorter while it was bundled")
            digest.update(data)
            frames.write(data)
            left -= len(data)
    if is_large:
        frames.cut()
    frames.write(bytes(tar.padding_bytes(source.size_bytes)))
    return Artifact(
        path_in_bundle=source.path_in_bundle,
        kind=source.kind,
        size_bytes=source.size_bytes,
        sha256=digest.hexdigest(),
        mode=source.mode,
        mtime=None if mtime_ns is None else mtime_text(mtime_ns),
    )
