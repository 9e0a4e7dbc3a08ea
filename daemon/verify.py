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
from daemon.errors import IntegrityError, MalformedBundle, RefusedError, SiblingMismatch, UnsupportedVersion
from daemon.locate import Bundle
from daemon.model import BundleKey, Manifest

Status = Literal["ok", "failed", "not checked"]


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

    Raises SnapshotNotFound and what a destination raises; what is wrong with the bundle is in the report.
    """
    with HashingReader(bundle.open()) as stream:
        inner, manifest = _check_inside(bundle, stream, identities)
        sha256 = stream.finish()
        size_bytes = stream.size_bytes
    return VerifyReport(bundle.name, size_bytes, sha256, (_check_sibling(bundle, sha256), *inner), manifest)


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
    names = ("container", "artifacts", "seal")
    if bundle.is_encrypted and not identities:
        return tuple(Level(name, "not checked", "encrypted, and no identity given") for name in names), None
    try:
        contents = read_bundle(stream, encrypted=bundle.is_encrypted, identities=identities)
        check_place(bundle.key, contents.manifest)
    except (MalformedBundle, UnsupportedVersion) as exc:
        return (Level("container", "failed", str(exc)), *_unchecked(names[1:])), None
    artifacts = contents.manifest.artifacts
    total_bytes = sum(artifact.size_bytes for artifact in artifacts)
    return (
        Level("container", "ok"),
        Level("artifacts", "ok", f"{len(artifacts)} artifacts, {total_bytes} bytes"),
        Level("seal", "ok", contents.manifest.seal),
    ), contents.manifest


def _unchecked(names: Sequence[str]) -> tuple[Level, ...]:
    return tuple(Level(name, "not checked", "the bundle could not be read to its end") for name in names)
