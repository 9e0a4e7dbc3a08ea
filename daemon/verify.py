"""What a bundle proves: each level is reported apart, and what was not checked says so.

sibling     the bytes at rest are those that the sibling names
container   frames, tar and names keep the format's rules
artifacts   exactly the artifacts that the manifest declares are there, each with its size and digest
seal        nothing in the manifest was changed after it was sealed
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from daemon.bundle.reader import read_bundle
from daemon.bundle.sibling import HashingReader
from daemon.errors import (
    BrokenSeal,
    IntegrityError,
    MalformedBundle,
    RefusedError,
    SiblingMismatch,
    UnsupportedVersion,
    WrongArtifact,
    WrongIdentity,
)
from daemon.locate import Bundle
from daemon.model import BundleKey, Manifest

Status = Literal["ok", "failed", "not checked"]
_INSIDE = ("container", "artifacts", "seal")


@dataclass(frozen=True, slots=True)
class Level:
    name: str
    status: Status
    detail: str = ""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """`is_sound`: nothing failed; whether all was checked is for the levels to say."""

    bundle: str
    size_bytes: int
    sha256: str
    levels: tuple[Level, ...]
    manifest: Manifest | None

    @property
    def is_sound(self) -> bool:
        return all(level.status != "failed" for level in self.levels)

    @property
    def is_fully_checked(self) -> bool:
        return all(level.status == "ok" for level in self.levels)


def verify(bundle: Bundle, *, identities: Sequence[Any] = ()) -> VerifyReport:
    """Read a bundle once, to its last byte, wherever it lies, without a copy.

    Raises SnapshotNotFound, WrongIdentity and what a destination raises; what is wrong with the bundle is
    in the report.
    """
    wrong_identity: WrongIdentity | None = None
    with HashingReader(bundle.open()) as stream:
        try:
            inner, manifest = _check_inside(bundle, stream, identities)
        except WrongIdentity as exc:
            wrong_identity = exc
            inner, manifest = _failed("container", exc), None
        sha256 = stream.finish()
        size_bytes = stream.size_bytes
    sibling = _check_sibling(bundle, sha256)
    if wrong_identity is not None and sibling.status == "ok":
        raise wrong_identity  # the bytes are as they were written: it is the identity that does not fit
    return VerifyReport(bundle.name, size_bytes, sha256, (sibling, *inner), manifest)


def read_manifest(bundle: Bundle, *, identities: Sequence[Any] = ()) -> Manifest:
    """The manifest, proven by reading the whole bundle. Raises IntegrityError's classes, RefusedError."""
    if bundle.is_encrypted and not identities:
        raise RefusedError(
            f"{bundle.name} is encrypted, and what is in it cannot be told without an identity",
            hint="give --identity FILE",
        )
    with HashingReader(bundle.open()) as stream:
        manifest = read_bundle(stream, encrypted=bundle.is_encrypted, identities=identities).manifest
        check_place(bundle.key, manifest)
        actual = stream.finish()
    expected = bundle.expected_sha256()
    if actual != expected:
        raise SiblingMismatch(f"{bundle.name} is not what its sibling says")
    return manifest


def check_place(key: BundleKey | None, manifest: Manifest) -> None:
    """A bundle under a key must be the one that the key names. Raises MalformedBundle."""
    if key is None:
        return
    said = (manifest.tenant, manifest.agent_id, manifest.snapshot_id)
    if said != (key.tenant, key.agent_id, key.snapshot_id):
        raise MalformedBundle(
            f"the bundle under {key} says that it is {said[2]} of agent {said[1]!r}, tenant {said[0]!r}",
            hint="somebody moved or swapped bundles: do not restore it as this agent",
        )


def _check_sibling(bundle: Bundle, actual: str) -> Level:
    try:
        expected = bundle.expected_sha256()
    except IntegrityError as exc:
        return Level("sibling", "failed", str(exc))
    if actual != expected:
        return Level("sibling", "failed", f"SHA-256 is {actual}, the sibling says {expected}")
    return Level("sibling", "ok", f"SHA-256 {actual}")


def _check_inside(
    bundle: Bundle, stream: HashingReader, identities: Sequence[Any]
) -> tuple[tuple[Level, ...], Manifest | None]:
    if bundle.is_encrypted and not identities:
        return tuple(Level(name, "not checked", "encrypted, and no identity given") for name in _INSIDE), None
    try:
        contents = read_bundle(stream, encrypted=bundle.is_encrypted, identities=identities)
        check_place(bundle.key, contents.manifest)
    except BrokenSeal as exc:
        return _failed("seal", exc), None
    except WrongArtifact as exc:
        return _failed("artifacts", exc), None
    except (MalformedBundle, UnsupportedVersion) as exc:
        return _failed("container", exc), None
    artifacts = contents.manifest.artifacts
    total_bytes = sum(artifact.size_bytes for artifact in artifacts)
    return (
        Level("container", "ok"),
        Level("artifacts", "ok", f"{len(artifacts)} artifacts, {total_bytes} bytes"),
        Level("seal", "ok", contents.manifest.seal),
    ), contents.manifest


def _failed(failed: str, exc: IntegrityError) -> tuple[Level, ...]:
    """All levels when one failed: those that are proven before it are, those after it were not reached."""
    order = ("container", "seal", "artifacts")
    levels = {name: Level(name, "not checked", f"the {failed} comes first") for name in order}
    levels |= {name: Level(name, "ok") for name in order[: order.index(failed)]}
    levels[failed] = Level(failed, "failed", str(exc))
    return tuple(levels[name] for name in _INSIDE)
