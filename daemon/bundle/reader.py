"""Reading a bundle, trusting nothing: what comes out has passed the container's rules, every digest and
the seal, or an error is raised.

One pass, bounded memory. Members reach the caller's receivers before the manifest at the end has proven
them, so receivers write to scratch and nothing is used before `read_bundle` has returned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from pydantic import ValidationError

from daemon.bundle import tar
from daemon.bundle.encryption import decrypting
from daemon.bundle.frames import FrameReader, Sink
from daemon.bundle.seal import MAX_MANIFEST_BYTES, parse_json, seal_of
from daemon.errors import BrokenSeal, MalformedBundle, UnsupportedVersion, WrongArtifact
from daemon.model import (
    BUNDLE_FORMAT,
    FORMAT_VERSION,
    HEADER_NAME,
    MANIFEST_NAME,
    Header,
    Manifest,
    is_safe_member_name,
)

_MAX_HEADER_BYTES = 64 << 10
_COPY_BYTES = 1 << 20

Receive = Callable[[str, int], Sink | None]


@dataclass(frozen=True, slots=True)
class BundleContents:
    header: Header
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class _Member:
    size_bytes: int
    sha256: str


def read_bundle(
    stream: Any,
    *,
    encrypted: bool,
    identities: Sequence[Any] = (),
    on_header: Callable[[Header], None] | None = None,
    receive: Receive | None = None,
) -> BundleContents:
    """Read a bundle to its last byte and verify container, artifacts and seal.

    on_header is called before any artifact is looked at (it may raise, to refuse); receive is called
    for each artifact with its name and size and gives a sink for its bytes, or None to verify them only.
    Raises IntegrityError's classes.
    """
    with _plain(stream, encrypted=encrypted, identities=identities) as plain:
        frames = FrameReader(plain)
        try:
            contents = _read_members(frames, on_header, receive)
        finally:
            frames.close()
    return contents


@contextmanager
def _plain(stream: Any, *, encrypted: bool, identities: Sequence[Any]) -> Iterator[BinaryIO]:
    with ExitStack() as stack:
        yield stack.enter_context(decrypting(stream, identities)) if encrypted else stream


def _read_members(
    frames: FrameReader, on_header: Callable[[Header], None] | None, receive: Receive | None
) -> BundleContents:
    header = _read_header(frames)
    if on_header is not None:
        on_header(header)
    members: dict[str, _Member] = {}
    left_bytes = header.ceilings.total_bytes
    while True:
        entry = tar.read_entry(frames.read)
        if entry is None:
            raise MalformedBundle("the bundle has no manifest")
        if entry.name == MANIFEST_NAME:
            raw = _read_document(frames, entry, MAX_MANIFEST_BYTES)
            break
        left_bytes -= entry.size_bytes
        if len(members) >= header.ceilings.members or left_bytes < 0:
            raise MalformedBundle("the bundle holds more than its header allows")
        if not is_safe_member_name(entry.name) or entry.name in (HEADER_NAME, *members):
            raise MalformedBundle(f"a member has an unsafe or repeated name: {entry.name[:200]!r}")
        sink = receive(entry.name, entry.size_bytes) if receive is not None else None
        members[entry.name] = _read_member(frames, entry, sink)
    if tar.read_entry(frames.read) is not None:
        raise MalformedBundle("something follows the manifest")
    return BundleContents(header, _checked_manifest(raw, header, members))


def _read_header(frames: FrameReader) -> Header:
    entry = tar.read_entry(frames.read)
    if entry is None or entry.name != HEADER_NAME:
        raise MalformedBundle(f"the first member is not {HEADER_NAME}: this is no bundle of agentkeep")
    raw = parse_json(_read_document(frames, entry, _MAX_HEADER_BYTES), HEADER_NAME)
    if raw.get("format") != BUNDLE_FORMAT:
        raise MalformedBundle(f"{HEADER_NAME} does not say that this is a bundle of agentkeep")
    _check_version(raw.get("version"), HEADER_NAME)
    try:
        return Header.model_validate(raw)
    except ValidationError as exc:
        raise MalformedBundle(f"{HEADER_NAME} breaks the format's rules: {_first_problem(exc)}") from exc


def _check_version(version: object, what: str) -> None:
    if not isinstance(version, int) or version < 1:
        raise MalformedBundle(f"{what} does not say which version of the format it is of")
    if version > FORMAT_VERSION:
        raise UnsupportedVersion(
            f"the bundle is of format version {version}; this agentkeep reads up to {FORMAT_VERSION}",
            hint="use a newer agentkeep",
        )


def _read_document(frames: FrameReader, entry: tar.Entry, limit_bytes: int) -> bytes:
    if entry.size_bytes > limit_bytes:
        raise MalformedBundle(f"{entry.name} is larger than it may be")
    padded = entry.size_bytes + tar.padding_bytes(entry.size_bytes)
    data = frames.read(padded)
    if len(data) != padded:
        raise MalformedBundle(f"the bundle ends within {entry.name}: it is truncated")
    return data[: entry.size_bytes]


def _read_member(frames: FrameReader, entry: tar.Entry, sink: Sink | None) -> _Member:
    digest = hashlib.sha256()
    left = entry.size_bytes
    while left:
        data = frames.read(min(left, _COPY_BYTES))
        if not data:
            raise MalformedBundle(f"the bundle ends within {entry.name}: it is truncated")
        digest.update(data)
        if sink is not None:
            sink.write(data)
        left -= len(data)
    padding = tar.padding_bytes(entry.size_bytes)
    if frames.read(padding) != bytes(padding):
        raise MalformedBundle(f"the padding of {entry.name} is not empty")
    return _Member(entry.size_bytes, digest.hexdigest())


def _checked_manifest(data: bytes, header: Header, members: dict[str, _Member]) -> Manifest:
    raw = parse_json(data, MANIFEST_NAME)
    _check_version(raw.get("manifest_version"), MANIFEST_NAME)
    try:
        seal = seal_of(raw)
    except (ValueError, RecursionError) as exc:
        raise MalformedBundle(f"{MANIFEST_NAME} cannot be sealed: {exc}") from exc
    if raw.get("seal") != seal:
        raise BrokenSeal("the manifest's seal is broken: it was changed after it was sealed")
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as exc:
        raise MalformedBundle(f"{MANIFEST_NAME} breaks the format's rules: {_first_problem(exc)}") from exc
    for name in ("snapshot_id", "tenant", "agent_id"):
        if getattr(manifest, name) != getattr(header, name):
            raise MalformedBundle(f"header and manifest name a different {name}")
    _check_artifacts(manifest, members)
    return manifest


def _check_artifacts(manifest: Manifest, members: dict[str, _Member]) -> None:
    """Exactly the declared artifacts are there, each with its size and digest."""
    declared = {a.path_in_bundle: _Member(a.size_bytes, a.sha256) for a in manifest.artifacts}
    if len(declared) != len(manifest.artifacts):
        raise MalformedBundle("the manifest names an artifact twice")
    for name in sorted(declared.keys() | members.keys()):
        if name not in members:
            raise WrongArtifact(f"{name} is in the manifest and not in the bundle")
        if name not in declared:
            raise WrongArtifact(f"{name} is in the bundle and not in the manifest")
        if declared[name] != members[name]:
            raise WrongArtifact(f"{name} does not have the size or digest that the manifest names")


def _first_problem(exc: ValidationError) -> str:
    error = exc.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, error['loc']))}: {error['msg']}"
