"""Frames: independent, small, of known size, described by a true seek table; or refused."""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from daemon.bundle.frames import MAX_FRAME_CONTENT_BYTES, REGION_BYTES, FrameReader, FrameWriter
from daemon.bundle.reader import read_bundle
from daemon.errors import MalformedBundle, WrongArtifact
from tests.property.crafted import (
    CountingStream,
    Draft,
    Member,
    container,
    draft,
    frame,
    framed,
    seek_table,
    split_frames,
)
from tests.property.honest import Piece, Sealed, read, seal
from tests.property.sandbox import Sandbox

NOISE = os.urandom(4 * REGION_BYTES)  # does not compress
Frames = list[tuple[bytes, int]]


# --- writing --------------------------------------------------------------------------------------


def compressed(*writes: bytes, cuts: bool = False) -> bytes:
    sink = io.BytesIO()
    writer = FrameWriter(sink, level=3)
    for data in writes:
        writer.write(data)
        if cuts:
            writer.cut()
    writer.close()
    return sink.getvalue()


@pytest.mark.parametrize("size", [0, 1, REGION_BYTES - 1, REGION_BYTES, REGION_BYTES + 1, 2 * REGION_BYTES])
def test_a_frame_ends_where_it_is_full(size: int) -> None:
    sizes = [len(content) for _, content in split_frames(compressed(NOISE[:size]))]
    full, rest = divmod(size, REGION_BYTES)
    assert sizes == [REGION_BYTES] * full + [rest] * bool(rest)


def test_frames_are_the_same_however_the_bytes_arrive() -> None:
    content = NOISE[: REGION_BYTES + 5000]
    pieces = [content[start : start + 977] for start in range(0, len(content), 977)]
    assert compressed(*pieces) == compressed(content)


def test_a_cut_starts_a_frame_and_two_are_one() -> None:
    contents = [content for _, content in split_frames(compressed(b"one", b"", b"two", cuts=True))]
    assert contents == [b"one", b"two"]


def test_frames_stay_in_order_though_they_are_made_on_several_threads() -> None:
    content = b"".join(bytes([number % 251]) * REGION_BYTES for number in range(40))
    assert b"".join(inside for _, inside in split_frames(compressed(content))) == content


def test_every_frame_carries_a_checksum_of_its_content() -> None:
    frames = split_frames(compressed(NOISE, b"text" * 5000, bytes(100), b"x", cuts=True))
    assert len(frames) > 4
    assert all(data[4] & 0x04 for data, _ in frames)


def test_zstd_finds_no_fault_in_them(tmp_path: Path) -> None:
    path = tmp_path / "content.zst"
    path.write_bytes(compressed(NOISE, bytes(5 * REGION_BYTES), b"the end"))
    subprocess.run(["zstd", "-t", "-q", path], check=True)
    opened = subprocess.run(["zstd", "-dc", path], check=True, capture_output=True).stdout
    assert opened == NOISE + bytes(5 * REGION_BYTES) + b"the end"


def test_a_sink_that_fails_ends_the_writing_with_its_own_error() -> None:
    class Full:
        def write(self, data: bytes, /) -> int:
            raise OSError("no room")

    writer = FrameWriter(Full(), level=3)
    with pytest.raises(OSError, match="no room"):
        writer.write(NOISE * 4)
    writer.abandon()
    writer.abandon()


# --- regions of artifacts -------------------------------------------------------------------------


def frames_holding(sealed: Sealed, content: bytes) -> list[bytes]:
    """The frames that hold a part of `content` and nothing else, in order."""
    return [data for data, inside in split_frames(sealed.data) if len(inside) > 10_000 and inside in content]


def test_a_large_artifact_is_cut_into_regions_counted_from_its_own_start() -> None:
    log = NOISE[: 2 * REGION_BYTES + 100]
    contents = [content for _, content in split_frames(seal([Piece("files/log", log)]).data)]
    assert contents[1:-1] == [
        log[:REGION_BYTES],
        log[REGION_BYTES : 2 * REGION_BYTES],
        log[2 * REGION_BYTES :],
    ]


def test_small_artifacts_share_a_frame() -> None:
    assert len(split_frames(seal([Piece(f"files/{number}", b"x") for number in range(100)]).data)) == 1


def test_a_change_in_one_artifact_leaves_the_frames_of_the_next_one_alone() -> None:
    log = NOISE[2 * REGION_BYTES :]
    before = seal([Piece("files/a", b"short"), Piece("files/b", NOISE[:70_000]), Piece("files/log", log)])
    after = seal([Piece("files/a", b"longer" * 99), Piece("files/b", b""), Piece("files/log", log)])
    assert len(frames_holding(before, log)) == 2
    assert frames_holding(after, log) == frames_holding(before, log)


def test_a_change_in_one_region_leaves_the_other_regions_alone() -> None:
    log = NOISE[: 3 * REGION_BYTES]
    changed = log[:REGION_BYTES] + bytes([log[REGION_BYTES] ^ 1]) + log[REGION_BYTES + 1 :]
    before, after = (frames_holding(seal([Piece("files/log", data)]), data) for data in (log, changed))
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, True]


def test_the_same_content_makes_the_same_bundle() -> None:
    pieces = [Piece("files/log", NOISE), Piece("files/small", b"x"), Piece("files/zeros", bytes(3 << 20))]
    one, two = (seal(pieces, snapshot_id="019ab1b5-7e00-7abc-8def-0123456789ab") for _ in range(2))
    assert one.data == two.data


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 511, 4096, REGION_BYTES, REGION_BYTES + 1, 10 * REGION_BYTES])
def test_reading_in_any_size_gives_every_byte(size: int) -> None:
    content = NOISE[:200_000] if size < 4096 else NOISE
    reader = FrameReader(io.BytesIO(compressed(content, b"tail", cuts=True)))
    parts = []
    while part := reader.read(size):
        parts.append(part)
    assert b"".join(parts) == content + b"tail"
    assert all(len(part) == size for part in parts[:-1])
    reader.close()


def test_an_input_that_gives_a_byte_at_a_time_is_read_all_the_same() -> None:
    class Trickling(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size or 0, 1))

    reader = FrameReader(Trickling(compressed(b"content", b"tail", cuts=True)))
    assert reader.read(100) == b"contenttail"
    reader.close()


def test_regions_that_changed_places_are_noticed() -> None:
    frames = [(data, len(content)) for data, content in split_frames(seal([Piece("files/l", NOISE)]).data)]
    regions = [index for index, (_, size) in enumerate(frames) if size == REGION_BYTES]
    frames[regions[0]], frames[regions[1]] = frames[regions[1]], frames[regions[0]]
    with pytest.raises(WrongArtifact, match="files/l "):
        read(container(frames))


# --- frames that lie ------------------------------------------------------------------------------


def reframed(edit: Callable[[Frames], object]) -> bytes:
    """A sound bundle in frames of 1 KiB, edited, with a seek table that is true of the result."""
    frames = framed(draft().tar(), frame_bytes=1024)
    edit(frames)
    return container(frames)


def _first(change: Callable[[bytes], bytes]) -> Callable[[Frames], object]:
    """An edit of the first frame's bytes: 4 of magic, the descriptor, 2 of size, the first block."""

    def edit(frames: Frames) -> None:
        data, size = frames[0]
        assert data[4] == 0x64, "a single segment with a size of two bytes and a checksum"
        frames[0] = (change(data), size)

    return edit


def _claiming(content_bytes: int) -> Callable[[Frames], object]:
    def edit(frames: Frames) -> None:
        _first(lambda data: data[:5] + (content_bytes - 256).to_bytes(2, "little") + data[7:])(frames)
        frames[0] = (frames[0][0], content_bytes)

    return edit


def _without_size(frames: Frames) -> None:
    frames[0] = (frame(draft().tar()[:1024], with_size=False), 1024)


def _larger_than_allowed(frames: Frames) -> None:
    plain = draft({"files/zeros": bytes(MAX_FRAME_CONTENT_BYTES)}).tar()
    frames[:] = [(frame(plain), len(plain))]


LYING_FRAMES: dict[str, Callable[[Frames], object]] = {
    "no content size": _without_size,
    "more content than a frame may have": _larger_than_allowed,
    "less content than it claims": _claiming(1025),
    "more content than it claims": _claiming(1023),
    "a claim of 64 KiB": _claiming(64 << 10),
    "a dictionary": _first(lambda data: data[:4] + b"\x65\x07" + data[5:]),
    "a reserved bit": _first(lambda data: data[:4] + b"\x6c" + data[5:]),
    "a window of 3.75 TiB": _first(lambda data: data[:4] + b"\x44\xff" + data[5:]),
    "a reserved block": _first(lambda data: data[:7] + bytes([data[7] | 6]) + data[8:]),
    "a block of 2 MiB": _first(lambda data: data[:9] + b"\xff" + data[10:]),
    "another checksum": _first(lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "an empty frame": lambda frames: frames.insert(1, (frame(b""), 0)),
    "a skippable frame": lambda frames: frames.insert(1, (b"\x50\x2a\x4d\x18\x04\0\0\0skip", 0)),
    "a frame of another format": lambda frames: frames.insert(1, (b"\x04\x22\x4d\x18\x64\x40\xa7", 0)),
    "a frame missing": lambda frames: frames.pop(1),
    "a frame twice": lambda frames: frames.insert(1, frames[0]),
    "no frames at all": lambda frames: frames.clear(),
}


def test_the_bundle_that_the_lying_ones_start_from_is_sound() -> None:
    _, received = read(reframed(lambda _: None))
    assert received == {"files/notes.txt": b"remember the milk\n"}


@pytest.mark.parametrize("edit", LYING_FRAMES.values(), ids=LYING_FRAMES.keys())
def test_frames_that_lie_are_refused(edit: Callable[[Frames], object], sandbox: Sandbox) -> None:
    sandbox.assert_refused(reframed(edit), MalformedBundle)


def test_blocks_without_end_are_refused_before_they_fill_the_memory() -> None:
    """A frame that never says `last`: each block of four bytes claims 128 KiB."""
    endless = frame(draft().tar()[:1024])[:7] + (1 << 1 | (128 << 10) << 3).to_bytes(3, "little") + b"\0"
    stream = CountingStream(endless + endless[7:] * 100_000)
    with pytest.raises(MalformedBundle):
        read_bundle(stream, encrypted=False)
    assert stream.read_bytes < 10_000


def tables(sizes: list[tuple[int, int]]) -> dict[str, bytes]:
    table = seek_table(sizes)
    return {
        "none": b"",
        "twice": table * 2,
        "of one frame less": seek_table(sizes[:-1]),
        "of one frame more": seek_table([*sizes, (9, 9)]),
        "with other compressed sizes": seek_table([(a + 1, b) for a, b in sizes]),
        "with other content sizes": seek_table([(a, b + 1) for a, b in sizes]),
        "that announces checksums": table[:-5] + b"\x80" + table[-4:],
        "with another magic": table[:-4] + b"\xb1\xea\x92\x8e",
        "with a count beyond": table[:-9] + b"\xff\xff\xff\xff" + table[-5:],
        "of another length": table[:4] + (len(table) - 9).to_bytes(4, "little") + table[8:],
        "cut in half": table[: len(table) // 2],
    }


@pytest.mark.parametrize("which", tables([(1, 1)]).keys())
def test_a_seek_table_that_is_not_true_is_refused(which: str, sandbox: Sandbox) -> None:
    frames = framed(draft().tar(), frame_bytes=1024)
    table = tables([(len(data), size) for data, size in frames])[which]
    sandbox.assert_refused(b"".join(data for data, _ in frames) + table, MalformedBundle)


# --- ceilings -------------------------------------------------------------------------------------


def bomb(bundle: Draft, *, content_bytes: int) -> bytes:
    """A member of zeros, in frames of 4 MiB that compress to nothing, between header and manifest."""
    zeros = bytes(MAX_FRAME_CONTENT_BYTES)
    bundle.members = [Member("files/bomb", claimed_bytes=content_bytes)]
    plain = bundle.tar()
    start = plain.index(b"manifest.json\0")
    frames = [(frame(zeros), len(zeros))] * (content_bytes // len(zeros))
    return container([*framed(plain[:start]), *frames, *framed(plain[start:])])


def test_more_than_the_header_allows_is_not_even_decompressed(sandbox: Sandbox) -> None:
    bundle = draft({})
    bundle.header["ceilings"] = {"members": 1, "total_bytes": 1 << 20}
    data = bomb(bundle, content_bytes=40 << 30)
    stream = CountingStream(data)
    with pytest.raises(MalformedBundle, match="more than its header allows"):
        read_bundle(stream, encrypted=False)
    assert stream.read_bytes < len(data) / 100
    sandbox.assert_refused(data, MalformedBundle)


def test_a_bomb_behind_the_end_of_the_tar_is_not_decompressed() -> None:
    zeros = bytes(MAX_FRAME_CONTENT_BYTES)
    data = container([*framed(draft().tar()), *[(frame(zeros), len(zeros))] * 10_000])
    stream = CountingStream(data)
    with pytest.raises(MalformedBundle):
        read_bundle(stream, encrypted=False)
    assert stream.read_bytes < len(data) / 100


@pytest.mark.parametrize(
    "ceilings",
    [{"members": 0, "total_bytes": 18}, {"members": 1, "total_bytes": 17}],
    ids=["one member too many", "one byte too many"],
)
def test_the_ceilings_of_the_header_hold(ceilings: dict[str, int], sandbox: Sandbox) -> None:
    bundle = draft()
    bundle.header["ceilings"] = ceilings
    sandbox.assert_refused(bundle.build(), MalformedBundle)
