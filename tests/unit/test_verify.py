"""Verify says of each level what it is, and of nothing that it was checked when it was not."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import pytest

from daemon.bundle.encryption import encrypting
from daemon.errors import (
    BrokenSeal,
    MalformedBundle,
    RefusedError,
    SiblingMismatch,
    SiblingMissing,
    SnapshotNotFound,
    WrongIdentity,
)
from daemon.locate import LocalBundle, located
from daemon.model import BundleKey
from daemon.verify import VerifyReport, read_manifest, verify
from tests.property.crafted import SNAPSHOT_ID, draft, seal_over
from tests.property.honest import KeyPair, Piece, new_key_pair, place, seal
from tests.property.shelf import Shelf

PIECES = [Piece("files/notes.txt", b"remember the milk\n"), Piece("files/more", b"x" * 5000)]


def levels(report: VerifyReport) -> dict[str, str]:
    return {level.name: level.status for level in report.levels}


def all_levels(sibling: str, container: str, artifacts: str, seal: str) -> dict[str, str]:
    return {"sibling": sibling, "container": container, "artifacts": artifacts, "seal": seal}


SOUND = all_levels("ok", "ok", "ok", "ok")


def sibling_path(bundle: LocalBundle) -> Path:
    return bundle.path.with_name(bundle.path.name + ".sha256")


# --- sound ----------------------------------------------------------------------------------------


def test_a_sound_bundle_is_proven_on_every_level(tmp_path: Path) -> None:
    sealed = seal(PIECES)
    report = verify(sealed.placed(tmp_path))
    assert levels(report) == SOUND
    assert report.is_sound
    assert report.is_fully_checked
    assert report.size_bytes == len(sealed.data)
    assert report.sha256 == hashlib.sha256(sealed.data).hexdigest()
    assert report.manifest == sealed.manifest
    details = {level.name: level.detail for level in report.levels}
    assert details["artifacts"] == "2 artifacts, 5018 bytes"
    assert details["seal"] == sealed.manifest.seal
    assert report.sha256 in details["sibling"]


def test_an_encrypted_bundle_without_an_identity_is_checked_as_far_as_it_goes(
    keys: KeyPair, tmp_path: Path
) -> None:
    report = verify(seal(PIECES, recipients=keys.recipients).placed(tmp_path))
    assert levels(report) == all_levels("ok", "not checked", "not checked", "not checked")
    assert report.is_sound
    assert not report.is_fully_checked
    assert report.manifest is None


def test_an_encrypted_bundle_with_its_identity_is_proven_on_every_level(
    keys: KeyPair, tmp_path: Path
) -> None:
    sealed = seal(PIECES, recipients=keys.recipients)
    report = verify(sealed.placed(tmp_path), identities=keys.identities)
    assert levels(report) == SOUND
    assert report.manifest == sealed.manifest
    assert report.sha256 == hashlib.sha256(sealed.data).hexdigest()


def test_an_incomplete_snapshot_is_sound_and_says_that_it_is_incomplete(tmp_path: Path) -> None:
    report = verify(seal(PIECES, complete=False).placed(tmp_path))
    assert report.is_sound
    assert report.manifest is not None
    assert not report.manifest.complete


def test_it_reads_at_a_destination_without_a_copy(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    offsite = shelf.directory("offsite")
    record = shelf.put()
    shelf.upload(record, offsite)
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    with located(str(record.key), shelf.elsewhere) as bundle:
        report = verify(bundle)
    assert levels(report) == SOUND
    assert report.bundle == f"offsite: {record.key}"
    after = sorted(path for path in tmp_path.rglob("*") if path.is_file() and "new-host" not in str(path))
    assert after == before


def test_a_bundle_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(SnapshotNotFound):
        verify(LocalBundle(tmp_path / "missing.tar.zst"))


# --- not sound ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sibling", "detail"),
    [
        (None, "has no .sha256 sibling"),
        (b"garbage", "is not in its form"),
        (b"0" * 64 + b"  bundle.tar.zst\n", "the sibling says 0000"),
    ],
    ids=["missing", "malformed", "another"],
)
def test_what_is_wrong_with_the_sibling_is_said_and_the_rest_is_proven_all_the_same(
    sibling: bytes | None, detail: str, tmp_path: Path
) -> None:
    bundle = place(tmp_path, seal(PIECES).data)
    sibling_path(bundle).unlink()
    if sibling is not None:
        sibling_path(bundle).write_bytes(sibling)
    report = verify(bundle)
    assert levels(report) == all_levels("failed", "ok", "ok", "ok")
    assert detail in report.levels[0].detail
    assert not report.is_sound


def test_a_broken_container_is_told_from_a_broken_seal_and_from_a_wrong_artifact(tmp_path: Path) -> None:
    cut = seal(PIECES).data[:-1]
    unsealed = draft()
    unsealed.manifest["seal"] = seal_over(unsealed.manifest)
    unsealed.manifest["label"] = "changed"
    unsealed.reseal = False
    swapped = draft()
    swapped.members[0].data = b"remember the MILK\n"

    expected = {
        cut: all_levels("ok", "failed", "not checked", "not checked"),
        unsealed.build(): all_levels("ok", "ok", "not checked", "failed"),
        swapped.build(): all_levels("ok", "ok", "failed", "ok"),
    }
    for number, (data, result) in enumerate(expected.items()):
        report = verify(place(tmp_path, data, name=f"{number}.tar.zst"))
        assert levels(report) == result
        assert not report.is_sound
        assert report.manifest is None
        assert all(level.detail for level in report.levels if level.status != "ok")


def test_a_newer_version_is_said_to_be_one(tmp_path: Path) -> None:
    newer = draft()
    newer.header["version"] = 2
    report = verify(place(tmp_path, newer.build()))
    assert levels(report) == all_levels("ok", "failed", "not checked", "not checked")
    assert "version 2" in report.levels[1].detail


def test_a_bundle_under_the_key_of_another_is_not_sound(tmp_path: Path) -> None:
    path = place(tmp_path, draft().build()).path
    assert verify(LocalBundle(path, BundleKey("default", "ana", SNAPSHOT_ID, encrypted=False))).is_sound
    for key in (
        BundleKey("evil", "ana", SNAPSHOT_ID, encrypted=False),
        BundleKey("default", "bob", SNAPSHOT_ID, encrypted=False),
        BundleKey("default", "ana", SNAPSHOT_ID[:-1] + "0", encrypted=False),
    ):
        report = verify(LocalBundle(path, key))
        assert levels(report)["container"] == "failed"
        assert f"under {key} says that it is" in report.levels[1].detail
        with pytest.raises(MalformedBundle, match="says that it is"):
            read_manifest(LocalBundle(path, key))


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_the_digest_is_that_of_all_bytes_though_the_first_are_wrong(
    encrypted: bool, keys: KeyPair, tmp_path: Path
) -> None:
    """Also where another thread was still decrypting when it became clear that they are."""
    data = b"no frame" + seal([Piece("files/noise", os.urandom(6 << 20))]).data
    if encrypted:
        sink = io.BytesIO()
        with encrypting(sink, keys.recipients) as stream:
            stream.write(data)
        data = sink.getvalue()
    bundle = place(tmp_path, data)
    for _ in range(5):
        report = verify(bundle, identities=keys.identities)
        assert levels(report) == all_levels("ok", "failed", "not checked", "not checked")
        assert report.size_bytes == len(data)


def test_another_identity_is_told_from_a_damaged_bundle(keys: KeyPair, tmp_path: Path) -> None:
    sealed = seal(PIECES, recipients=keys.recipients)
    bundle = sealed.placed(tmp_path)
    with pytest.raises(WrongIdentity):
        verify(bundle, identities=new_key_pair().identities)

    damaged = bytearray(sealed.data)
    damaged[sealed.data.index(b"-> X25519 ") + 10] ^= 1
    bundle.path.write_bytes(damaged)
    report = verify(bundle, identities=keys.identities)
    assert levels(report)["sibling"] == "failed"
    assert levels(report)["container"] == "failed"


# --- the manifest ---------------------------------------------------------------------------------


def test_a_manifest_is_given_away_only_when_all_is_proven(tmp_path: Path) -> None:
    sealed = seal(PIECES)
    bundle = sealed.placed(tmp_path)
    assert read_manifest(bundle) == sealed.manifest

    sibling = sibling_path(bundle).read_bytes()
    sibling_path(bundle).write_bytes(b"0" * 64 + sibling[64:])
    with pytest.raises(SiblingMismatch):
        read_manifest(bundle)
    sibling_path(bundle).unlink()
    with pytest.raises(SiblingMissing):
        read_manifest(bundle)


def test_a_manifest_with_a_broken_seal_is_not_given_away(tmp_path: Path) -> None:
    changed = draft()
    changed.reseal = False
    changed.manifest["seal"] = "sha256:" + "0" * 64
    with pytest.raises(BrokenSeal):
        read_manifest(place(tmp_path, changed.build()))


def test_an_encrypted_manifest_needs_an_identity(keys: KeyPair, tmp_path: Path) -> None:
    sealed = seal(PIECES, recipients=keys.recipients)
    bundle = sealed.placed(tmp_path)
    with pytest.raises(RefusedError, match="encrypted") as caught:
        read_manifest(bundle)
    assert "--identity" in caught.value.hint
    with pytest.raises(WrongIdentity):
        read_manifest(bundle, identities=new_key_pair().identities)
    assert read_manifest(bundle, identities=keys.identities) == sealed.manifest
