"""Any content comes back from a bundle, and no changed copy of a bundle is taken for it."""

from __future__ import annotations

import hashlib
import io
import os
from functools import cache

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.bundle.frames import REGION_BYTES, FrameReader, FrameWriter
from daemon.bundle.reader import read_bundle
from daemon.errors import IntegrityError
from daemon.model import ArtifactKind, to_member_name
from tests.property.crafted import container, draft, frame, framed, split_frames
from tests.property.honest import KeyPair, Piece, Sealed, contents_of, new_key_pair, read, seal

NOISE = os.urandom(3 * REGION_BYTES)
QUICK = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])


@cache
def keys() -> KeyPair:
    return new_key_pair()


SIZES = st.integers(0, 3000) | st.integers(-2, 2).map(lambda n: REGION_BYTES + n) | st.integers(0, len(NOISE))
PATHS = st.binary(min_size=1, max_size=60).filter(
    lambda raw: b"\0" not in raw and not {b"", b".", b".."} & set(raw.split(b"/"))
)


@st.composite
def pieces(draw: st.DrawFn) -> list[Piece]:
    paths = draw(st.lists(PATHS, max_size=8, unique=True))
    return [
        Piece(
            "files/" + to_member_name(os.fsdecode(path)),
            NOISE[start : start + size] if draw(st.booleans()) else bytes(size),
            draw(st.sampled_from(ArtifactKind)),
            draw(st.integers(0, 0o7777)),
            draw(st.none() | st.integers(-(1 << 62), 1 << 62)),
        )
        for path in paths
        for start, size in [(draw(st.integers(0, 1000)), draw(SIZES))]
    ]


@given(pieces(), st.booleans(), st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
@QUICK
def test_what_was_put_in_comes_out(content: list[Piece], encrypted: bool, label: str | None) -> None:
    sealed = seal(content, recipients=keys().recipients if encrypted else [], label=label)
    contents, received = read(sealed.data, identities=keys().identities if encrypted else [])
    assert list(received.items()) == list(contents_of(content).items())
    assert contents.manifest == sealed.manifest
    assert contents.manifest.label == label


@cache
def large(encrypted: bool) -> Sealed:
    content = [
        Piece("files/log", NOISE[: 2 * REGION_BYTES + 777]),
        Piece("files/text", b"remember the milk\n" * 40_000),
        Piece("state/at.json", b'{"at": 7}', ArtifactKind.STATE),
    ]
    return seal(content, recipients=keys().recipients if encrypted else [])


def assert_refused_or_the_same(data: bytes, *, encrypted: bool) -> None:
    """With the sibling nothing passes; without it, only what gives the very same content."""
    sealed = large(encrypted)
    assert hashlib.sha256(data).digest() != hashlib.sha256(sealed.data).digest()
    identities = keys().identities if encrypted else []
    digests: dict[str, object] = {}

    class Hashing:
        def __init__(self) -> None:
            self.digest = hashlib.sha256()

        def write(self, part: bytes, /) -> None:
            self.digest.update(part)

    def receive(name: str, _size_bytes: int) -> Hashing:
        digests[name] = sink = Hashing()
        return sink

    try:
        contents = read_bundle(io.BytesIO(data), encrypted=encrypted, identities=identities, receive=receive)
    except IntegrityError:
        return
    assert not encrypted
    assert contents.manifest == sealed.manifest
    assert len(digests) == len(sealed.manifest.artifacts)


@given(st.booleans(), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
@QUICK
def test_a_flip_of_any_byte_of_a_large_bundle_is_noticed(encrypted: bool, where: float, mask: int) -> None:
    data = bytearray(large(encrypted).data)
    data[int(where * len(data))] ^= mask
    assert_refused_or_the_same(bytes(data), encrypted=encrypted)


@given(st.booleans(), st.integers(1, 4000), st.integers(1, 255))
@QUICK
def test_a_flip_near_the_end_where_manifest_and_seek_table_are_is_noticed(
    encrypted: bool, from_end: int, mask: int
) -> None:
    data = bytearray(large(encrypted).data)
    data[-from_end] ^= mask
    assert_refused_or_the_same(bytes(data), encrypted=encrypted)


@given(st.booleans(), st.floats(0, 1, exclude_max=True))
@QUICK
def test_a_large_bundle_cut_anywhere_is_refused(encrypted: bool, where: float) -> None:
    data = large(encrypted).data
    cut = data[: int(where * len(data))]
    try:
        read(cut, identities=keys().identities if encrypted else [])
    except IntegrityError:
        return
    raise AssertionError("taken for whole")


@given(st.booleans(), st.floats(0, 1), st.binary(min_size=1, max_size=100))
@QUICK
def test_bytes_put_in_or_taken_out_are_noticed(encrypted: bool, where: float, extra: bytes) -> None:
    data = large(encrypted).data
    at = int(where * len(data))
    assert_refused_or_the_same(data[:at] + extra + data[at:], encrypted=encrypted)
    if data[at : at + len(extra)]:
        assert_refused_or_the_same(data[:at] + data[at + len(extra) :], encrypted=encrypted)


@given(st.data())
@QUICK
def test_frames_left_out_doubled_or_moved_are_noticed(data: st.DataObject) -> None:
    frames = [(compressed, len(content)) for compressed, content in split_frames(large(False).data)]
    order = data.draw(
        st.lists(st.integers(0, len(frames) - 1), max_size=len(frames) + 2).filter(
            lambda order: order != list(range(len(frames)))
        )
    )
    assert_refused_or_the_same(container([frames[index] for index in order]), encrypted=False)


@given(st.integers(0, 5000), st.integers(0, 7))
@settings(max_examples=150)
def test_a_flip_inside_of_the_tar_that_is_framed_anew_is_noticed(position: int, bit: int) -> None:
    """Against somebody who makes frames and seek table true again: digests, seal and the tar's own rules."""
    plain = bytearray(draft({"files/a": b"remember the milk", "files/b": bytes(600)}).tar())
    position %= len(plain)
    plain[position] ^= 1 << bit
    try:
        contents, received = read(container(framed(bytes(plain))))
    except IntegrityError:
        return
    # What remains is what nobody reads: owner, times and modes in headers whose checksum was made to fit.
    assert received == {"files/a": b"remember the milk", "files/b": bytes(600)}
    assert contents.manifest.agent_id == "ana"


@given(st.lists(st.binary(max_size=5000) | st.integers(0, 2_500_000).map(bytes), max_size=6), st.data())
@QUICK
def test_frames_give_back_what_was_written_however_it_is_cut_and_read(
    writes: list[bytes], data: st.DataObject
) -> None:
    sink = io.BytesIO()
    writer = FrameWriter(sink, level=1)
    for part in writes:
        writer.write(part)
        if data.draw(st.booleans()):
            writer.cut()
    writer.close()
    content = b"".join(writes)
    assert all(0 < len(inside) <= REGION_BYTES for _, inside in split_frames(sink.getvalue()))

    reader = FrameReader(io.BytesIO(sink.getvalue()))
    size = data.draw(st.integers(max(1, len(content) // 50), len(content) + 2))
    parts = []
    while part := reader.read(size):
        parts.append(part)
    assert b"".join(parts) == content


@given(st.binary(max_size=300))
@settings(max_examples=150)
def test_bytes_at_random_are_refused_and_nothing_else_is_raised(data: bytes) -> None:
    for prefix in (b"", b"\x28\xb5\x2f\xfd", b"\x28\xb5\x2f\xfd\x24", b"\x5e\x2a\x4d\x18"):
        try:
            read(prefix + data)
        except IntegrityError:
            continue
        raise AssertionError("taken for a bundle")


@given(st.binary(min_size=1, max_size=2000))
@settings(max_examples=100)
def test_a_tar_at_random_in_sound_frames_is_refused_and_nothing_else_is_raised(plain: bytes) -> None:
    for tar in (plain, draft().tar()[:1024] + plain, draft().tar()[:-1024] + plain):
        try:
            read(container([(frame(tar), len(tar))]))
        except IntegrityError:
            continue
        raise AssertionError("taken for a bundle")
