"""A bundle gives back what was put in, real tools read it too, and no copy that differs is believed."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pytest

from daemon.bundle.frames import REGION_BYTES
from daemon.bundle.reader import read_bundle
from daemon.bundle.seal import MAX_MANIFEST_BYTES
from daemon.errors import (
    AgentkeepError,
    IntegrityError,
    MalformedBundle,
    RefusedError,
    UnsupportedVersion,
    WrongArtifact,
    WrongIdentity,
)
from daemon.locate import LocalBundle
from daemon.model import ArtifactKind, BundleKey, Failure, to_member_name
from daemon.verify import verify
from tests.property.crafted import (
    SNAPSHOT_ID,
    Draft,
    artifact_entry,
    container,
    draft,
    frame,
    seek_table,
    split_frames,
)
from tests.property.honest import KeyPair, Piece, Sealed, contents_of, new_key_pair, read, seal, write
from tests.property.sandbox import Sandbox

NOISE = os.urandom(4 * REGION_BYTES)  # does not compress

# --- round trips ----------------------------------------------------------------------------------

CONTENTS: dict[str, list[Piece]] = {
    "nothing at all": [],
    "one empty file": [Piece("files/empty", b"")],
    "every kind": [
        Piece(f"files/{kind.value}", b"x", kind, mtime_ns=None, mode=0o7777) for kind in ArtifactKind
    ],
    "many small": [Piece(f"files/{number:04d}", b"%d" % number * (number % 700)) for number in range(2000)],
    "several regions": [
        Piece("files/log", NOISE[: 3 * REGION_BYTES + 12_345]),
        Piece("files/zeros", bytes(2 * REGION_BYTES + 1)),
        Piece("files/last", b"z"),
    ],
    "boundaries of regions": [
        Piece(f"files/{size}", NOISE[:size])
        for size in (REGION_BYTES - 1, REGION_BYTES, REGION_BYTES + 1, 2 * REGION_BYTES, 511, 512, 513)
    ],
    "odd names": [
        Piece("files/" + to_member_name(os.fsdecode(path)), hashlib.sha256(path).digest())
        for path in (
            b"caf\xc3\xa9 \xe2\x98\x95/\xf0\x9f\xa7\xa0.txt",
            b"latin-1 caf\xe9",
            b"new\nline and\ttab",
            b"back\\slash and \\x41",
            b"  spaces  ",
            b"-rf",
            b"quote'\"$(x)`",
            b"e\xcc\x81 decomposed",
            b"/".join([b"d" * 200] * 15),
        )
    ],
    "times before and after everything": [
        Piece("files/old", b"o", mtime_ns=-5_000_000_001),
        Piece("files/new", b"n", mtime_ns=9_000_000_000 * 1_000_000_000),
    ],
}


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
@pytest.mark.parametrize("pieces", CONTENTS.values(), ids=CONTENTS.keys())
def test_what_was_put_in_comes_out(pieces: list[Piece], encrypted: bool, keys: KeyPair) -> None:
    sealed = seal(pieces, recipients=keys.recipients if encrypted else [], label="before the move")

    contents, received = read(sealed.data, identities=keys.identities if encrypted else [])

    assert list(received.items()) == list(contents_of(pieces).items())
    assert contents.manifest == sealed.manifest
    assert contents.manifest.label == "before the move"
    declared = [(a.path_in_bundle, a.kind, a.mode, a.size_bytes) for a in contents.manifest.artifacts]
    assert declared == [(p.path_in_bundle, p.kind, p.mode, p.size_bytes) for p in pieces]
    assert sealed.data.startswith(b"age-encryption.org/v1\n" if encrypted else b"\x28\xb5\x2f\xfd")


def test_failures_are_carried_by_an_incomplete_manifest() -> None:
    failure = Failure(source="x.sqlite", reason="corrupt", hint="mend it", kept_as=("opaque/x.sqlite",))
    pieces = [Piece("opaque/x.sqlite", b"?", ArtifactKind.OPAQUE)]
    manifest = read(seal(pieces, complete=False, failures=(failure,)).data)[0].manifest
    assert (manifest.complete, manifest.failures) == (False, (failure,))


def test_a_source_that_goes_on_growing_is_taken_as_long_as_it_was() -> None:
    class Growing(Piece):
        def open(self) -> BinaryIO:
            return io.BytesIO(self.data + b"appended since")

    assert read(seal([Growing("files/log", b"as it was\n")]).data)[1] == {"files/log": b"as it was\n"}


def test_a_source_that_shrank_is_an_error_and_not_a_shorter_file() -> None:
    class Shrunk(Piece):
        def open(self) -> BinaryIO:
            return io.BytesIO(self.data[:-1])

    with pytest.raises(AgentkeepError, match="files/log became shorter"):
        seal([Shrunk("files/log", b"as it was\n")])


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_a_full_disk_comes_out_as_what_it_is(encrypted: bool, keys: KeyPair) -> None:
    class FullDisk:
        room_bytes = 100_000

        def write(self, data: bytes, /) -> int:
            self.room_bytes -= len(data)
            if self.room_bytes < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return len(data)

    key = BundleKey("default", "ana", SNAPSHOT_ID, encrypted)
    with pytest.raises(OSError, match="No space left") as caught:
        write(FullDisk(), key, [Piece("files/noise", NOISE)], recipients=keys.recipients if encrypted else [])
    assert caught.value.errno == errno.ENOSPC


def test_a_manifest_that_no_reader_would_take_is_not_written() -> None:
    with pytest.raises(RefusedError, match="no reader takes more"):
        seal([], label="x" * MAX_MANIFEST_BYTES)


def test_the_caller_may_refuse_by_the_header_before_anything_is_received() -> None:
    class Enough(Exception): ...

    def refuse(_: object) -> None:
        raise Enough

    received: list[str] = []
    with pytest.raises(Enough):
        read_bundle(
            io.BytesIO(draft().build()),
            encrypted=False,
            on_header=refuse,
            receive=lambda name, _size_bytes: received.append(name),
        )
    assert received == []


# --- real tools -----------------------------------------------------------------------------------

FOR_TOOLS = [
    *CONTENTS["several regions"],
    *CONTENTS["odd names"],
    *CONTENTS["boundaries of regions"],
    *CONTENTS["times before and after everything"],
]


def run(*command: str | Path, stdin: bytes = b"", cwd: Path | None = None) -> bytes:
    done = subprocess.run(command, input=stdin, cwd=cwd, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_zstd_and_tar_list_what_was_put_in() -> None:
    plain = run("zstd", "-dc", stdin=seal(FOR_TOOLS).data)
    names = run("tar", "t", "--quoting-style=literal", stdin=plain).decode().splitlines()
    assert names == ["agentkeep.json", *(piece.path_in_bundle for piece in FOR_TOOLS), "manifest.json"]
    listing = run("tar", "tv", stdin=plain).decode().splitlines()
    sizes = [int(line.split()[2]) for line in listing]
    assert sizes[1:-1] == [piece.size_bytes for piece in FOR_TOOLS]


def test_zstd_and_tar_extract_what_was_put_in(tmp_path: Path) -> None:
    sealed = seal(FOR_TOOLS)
    run("tar", "x", stdin=run("zstd", "-dc", stdin=sealed.data), cwd=tmp_path)
    for piece in FOR_TOOLS:
        assert (tmp_path / piece.path_in_bundle).read_bytes() == piece.data
    assert json.loads((tmp_path / "manifest.json").read_bytes())["seal"] == sealed.manifest.seal
    assert json.loads((tmp_path / "agentkeep.json").read_bytes())["format"] == "agentkeep-bundle"


def test_age_opens_what_was_encrypted(keys: KeyPair, tmp_path: Path) -> None:
    identity = tmp_path / "identity"
    identity.write_text(keys.identity + "\n")
    sealed = seal(FOR_TOOLS, recipients=keys.recipients)
    opened = run("age", "-d", "-i", identity, stdin=sealed.data)
    assert read(opened)[1] == contents_of(FOR_TOOLS)


def test_what_age_encrypted_is_opened(keys: KeyPair) -> None:
    encrypted = run("age", "-r", keys.recipient, stdin=seal(FOR_TOOLS).data)
    assert read(encrypted, identities=keys.identities)[1] == contents_of(FOR_TOOLS)


def test_sha256sum_accepts_the_sibling(tmp_path: Path) -> None:
    bundle = seal([Piece("files/a", b"a")]).placed(tmp_path)
    run("sha256sum", "--check", "--strict", f"{bundle.path.name}.sha256", cwd=tmp_path)


# --- tampering ------------------------------------------------------------------------------------

SMALL = [Piece("files/a", b"remember the milk"), Piece("state/at.json", b'{"at": 7}', ArtifactKind.STATE)]


@dataclass(frozen=True)
class Untouched:
    """A small bundle, and the judgement on copies of it that differ."""

    sealed: Sealed
    keys: KeyPair | None

    @property
    def data(self) -> bytes:
        return self.sealed.data

    def is_refused(self, data: bytes) -> bool:
        """Whether reading refuses it; if not, it has to give what the honest one gives."""
        try:
            contents, received = read(data, identities=self.keys.identities if self.keys else [])
        except IntegrityError:
            return True
        assert contents.manifest == self.sealed.manifest
        assert received == contents_of(SMALL)
        return False


@pytest.fixture(scope="module", params=["plain", "encrypted"])
def untouched(request: pytest.FixtureRequest, keys: KeyPair) -> Untouched:
    encrypted = request.param == "encrypted"
    return Untouched(
        seal(SMALL, recipients=keys.recipients if encrypted else []), keys if encrypted else None
    )


def test_a_flip_of_any_byte_is_refused_or_changes_nothing(untouched: Untouched) -> None:
    """A few bits of zstd's frames mean nothing, which the sibling covers too; under age all do."""
    data = bytearray(untouched.data)
    survivors = 0
    for position in range(len(data)):
        for mask in (0xFF, 1 << position % 8):
            data[position] ^= mask
            survivors += not untouched.is_refused(bytes(data))
            data[position] ^= mask
    assert survivors <= (0 if untouched.keys else 24)


def test_a_flip_of_any_byte_is_caught_by_the_sibling(untouched: Untouched, tmp_path: Path) -> None:
    bundle = untouched.sealed.placed(tmp_path)
    data = bytearray(untouched.data)
    assert verify(bundle).levels[0].status == "ok"
    for position in range(len(data)):
        data[position] ^= 1 << position % 8
        bundle.path.write_bytes(data)
        report = verify(LocalBundle(bundle.path))
        assert not report.is_sound
        assert report.levels[0].status == "failed"
        data[position] ^= 1 << position % 8


def test_a_copy_cut_short_anywhere_is_refused(untouched: Untouched) -> None:
    for length in range(len(untouched.data)):
        assert untouched.is_refused(untouched.data[:length]), length


@pytest.mark.parametrize("garbage", [b"\0", b"\n", b"PK\x03\x04", bytes(70_000)], ids=len)
def test_bytes_after_the_end_are_refused(untouched: Untouched, garbage: bytes) -> None:
    assert untouched.is_refused(untouched.data + garbage)


APPENDED: dict[str, Callable[[], bytes]] = {
    "a frame": lambda: frame(b"more"),
    "a frame of zeros": lambda: frame(bytes(1024)),
    "a seek table": lambda: seek_table([]),
    "a whole bundle": lambda: seal(SMALL).data,
}


@pytest.mark.parametrize("appended", APPENDED.values(), ids=APPENDED.keys())
def test_what_is_appended_is_refused(appended: Callable[[], bytes]) -> None:
    with pytest.raises(MalformedBundle):
        read(seal(SMALL).data + appended())


@pytest.mark.parametrize("content", [b"more", bytes(512), bytes(1024)], ids=len)
def test_an_appended_frame_is_refused_even_if_the_seek_table_knows_of_it(content: bytes) -> None:
    frames = [(data, len(inside)) for data, inside in split_frames(seal(SMALL).data)]
    with pytest.raises(MalformedBundle):
        read(container([*frames, (frame(content), len(content))]))


def test_another_identity_does_not_open_it(keys: KeyPair) -> None:
    with pytest.raises(WrongIdentity):
        read(seal(SMALL, recipients=keys.recipients).data, identities=new_key_pair().identities)


def test_an_encrypted_bundle_is_no_plain_one_and_a_plain_one_no_encrypted_one(keys: KeyPair) -> None:
    with pytest.raises(MalformedBundle):
        read(seal(SMALL, recipients=keys.recipients).data)
    with pytest.raises(MalformedBundle):
        read(seal(SMALL).data, identities=keys.identities)


# --- documents that lie ---------------------------------------------------------------------------


def header(**fields: object) -> Callable[[Draft], object]:
    return lambda bundle: bundle.header.update(fields)


def manifest(**fields: object) -> Callable[[Draft], object]:
    return lambda bundle: bundle.manifest.update(fields)


def artifact(**fields: object) -> Callable[[Draft], object]:
    return lambda bundle: bundle.manifest["artifacts"][0].update(fields)


def one_more(entry: dict[str, object]) -> Callable[[Draft], object]:
    return lambda bundle: bundle.manifest["artifacts"].append(entry)


LIES: dict[str, Callable[[Draft], object]] = {
    "header: another format": header(format="agentkeep-bundel"),
    "header: no format": lambda bundle: bundle.header.pop("format"),
    "header: no version": lambda bundle: bundle.header.pop("version"),
    "header: version zero": header(version=0),
    "header: a version of text": header(version="1"),
    "header: a version that is true": header(version=True),
    "header: a tenant that climbs": header(tenant="../x"),
    "header: an agent in capitals": header(agent_id="Ana"),
    "header: an id that is none": header(snapshot_id="latest"),
    "header: an id after the last of all dates": header(snapshot_id="ffffffff-ffff-7fff-bfff-ffffffffffff"),
    "header: a ceiling below zero": header(ceilings={"members": 1, "total_bytes": -1}),
    "header: no ceilings": lambda bundle: bundle.header.pop("ceilings"),
    "manifest: no version": lambda bundle: bundle.manifest.pop("manifest_version"),
    "manifest: version zero": manifest(manifest_version=0),
    "manifest: another tenant": manifest(tenant="evil"),
    "manifest: another agent": manifest(agent_id="bob"),
    "manifest: another id": manifest(snapshot_id=SNAPSHOT_ID[:-1] + "0"),
    "manifest: no artifacts": lambda bundle: bundle.manifest.pop("artifacts"),
    "manifest: complete, with failures": manifest(failures=[{"source": "x.sqlite", "reason": "corrupt"}]),
    "manifest: complete in words": manifest(complete="true"),
    "manifest: one artifact twice": one_more(artifact_entry("files/notes.txt", b"remember the milk\n")),
    "manifest: one artifact more": one_more(artifact_entry("files/x", b"")),
    "manifest: an artifact that climbs": one_more(artifact_entry("../x", b"")),
    "manifest: a memdir that climbs": manifest(memdir="../memory"),
    "manifest: a memdir elsewhere": manifest(memdir="/etc"),
    "manifest: a directory that climbs": manifest(directories=[{"path": "files/../../x", "mode": 0o700}]),
    "manifest: a link that climbs": manifest(symlinks=[{"path": "../x", "target_b64": "eA=="}]),
    "manifest: a link that is no base64": manifest(symlinks=[{"path": "files/x", "target_b64": "x"}]),
    "manifest: a link in another base64": manifest(symlinks=[{"path": "files/x", "target_b64": "eB=="}]),
    "manifest: a link to nothing": manifest(symlinks=[{"path": "files/x", "target_b64": ""}]),
    "manifest: a link with a NUL": manifest(symlinks=[{"path": "files/x", "target_b64": "eAB5"}]),
    "manifest: a link without end": manifest(symlinks=[{"path": "files/x", "target_b64": "eHh4" * 2000}]),
    "manifest: raw bytes kept above": manifest(
        complete=False, failures=[{"source": "x", "reason": "r", "kept_as": ["../x"]}]
    ),
    "manifest: a consistency of its own": manifest(
        consistency={"level": "perfect", "window_ms": 0, "attempts": 1}
    ),
    "artifact: a size below zero": artifact(size_bytes=-1),
    "artifact: a digest in capitals": artifact(sha256="A" * 64),
    "artifact: a mode of too many bits": artifact(mode=0o10000),
    "artifact: an unknown kind": artifact(kind="device"),
    "artifact: a time that is none": artifact(mtime="now"),
}


@pytest.mark.parametrize("edit", LIES.values(), ids=LIES.keys())
def test_a_document_that_lies_is_refused_though_it_is_sealed(
    edit: Callable[[Draft], object], sandbox: Sandbox
) -> None:
    bundle = draft()
    edit(bundle)
    sandbox.assert_refused(bundle.build(), MalformedBundle)


@pytest.mark.parametrize(
    "fields", [{"size_bytes": 17}, {"size_bytes": 19}, {"sha256": "0" * 64}], ids=["short", "long", "other"]
)
def test_an_artifact_that_is_not_the_one_declared_is_refused_by_name(
    fields: dict[str, object], sandbox: Sandbox
) -> None:
    bundle = draft()
    artifact(**fields)(bundle)
    error = sandbox.assert_refused(bundle.build(), WrongArtifact)
    assert "files/notes.txt" in str(error)


@pytest.mark.parametrize(("document", "field"), [("header", "version"), ("manifest", "manifest_version")])
def test_a_newer_version_is_refused_by_name_whatever_else_it_says(
    document: str, field: str, sandbox: Sandbox
) -> None:
    bundle = draft()
    getattr(bundle, document).clear()
    getattr(bundle, document).update({field: 2, "format": "agentkeep-bundle", "new": ["things"]})
    error = sandbox.assert_refused(bundle.build(), UnsupportedVersion)
    assert "version 2" in str(error)
    assert "newer agentkeep" in error.hint
