"""The tar inside a bundle: plain files under safe names, nothing else, and every number true."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from daemon.bundle.reader import read_bundle
from daemon.errors import MalformedBundle
from daemon.model import MAX_MEMBER_NAME_CHARS, to_member_name
from daemon.restore.unpack import unpack
from tests.property.crafted import (
    CountingStream,
    Draft,
    Member,
    container,
    draft,
    frame,
    framed,
    pax_record,
    raw_pax_header,
    to_json,
)
from tests.property.honest import Piece, read, seal
from tests.property.sandbox import Sandbox

# --- names ----------------------------------------------------------------------------------------

ODD_PATHS = [
    b"caf\xc3\xa9 \xe2\x98\x95/\xf0\x9f\xa7\xa0.txt",
    b"latin-1 caf\xe9",
    b"new\nline and\ttab",
    b"back\\slash and \\x41",
    b"  spaces  ",
    b"-rf",
    b"quote'\"$(x)`",
    b"e\xcc\x81 decomposed",
    b"\xff" * 255,
    b"/".join([b"d" * 200] * 15),
]


@pytest.mark.parametrize("path", ODD_PATHS, ids=lambda path: repr(path[:30]))
def test_an_odd_name_reaches_the_disk_as_it_was(path: bytes, tmp_path: Path) -> None:
    sealed = seal([Piece("files/" + to_member_name(os.fsdecode(path)), b"content")])
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    unpack(sealed.placed(tmp_path), scratch, identities=())

    found = [os.fsencode(found) for found in (scratch / "files").rglob("*") if found.is_file()]
    assert found == [os.fsencode(scratch / "files") + b"/" + path]


def test_the_longest_path_of_the_worst_bytes_has_room() -> None:
    path = os.fsdecode(b"/".join([b"\xff" * 255] * 16)[:4095])
    _, received = read(seal([Piece("memory_files/" + to_member_name(path), b"x")]).data)
    assert list(received.values()) == [b"x"]


HOSTILE_NAMES = [
    "../outside",
    "files/../../outside",
    "files/..",
    "..",
    ".",
    "files/./x",
    "./files/x",
    "files//x",
    "files/x/",
    "//outside",
    "files/new\nline",
    "files/\x7f",
    "files/nul\0byte",
    "files/back\\slash",
    "files/\\x41",
    "files/\\xZZ",
    "files/\\xc3\\xa9",
    "files/\\xc3\\xa9\\x0a",
    "files/\\x2e\\x2e/x",
    "files/" + "x" * MAX_MEMBER_NAME_CHARS,
    "agentkeep.json",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=lambda name: repr(name[:40]))
def test_a_name_that_could_become_no_path_of_ours_is_refused(name: str, sandbox: Sandbox) -> None:
    bundle = draft()
    bundle.declare(Member(name, b"hostile", pax={} if name.isprintable() else {"path": name}))
    sandbox.assert_refused(bundle.build(), MalformedBundle)


def test_an_absolute_name_is_refused(sandbox: Sandbox) -> None:
    planted = sandbox.root / "home" / "planted"
    bundle = draft()
    bundle.declare(Member(str(planted), b"hostile"))
    sandbox.assert_refused(bundle.build(), MalformedBundle)
    assert not planted.exists()


@pytest.mark.parametrize("name", ["escape/x", "memory_files/.git/hooks/post-checkout", "files"])
def test_a_name_outside_of_the_rooms_of_the_format_is_not_unpacked(name: str, sandbox: Sandbox) -> None:
    bundle = draft()
    bundle.declare(Member(name, b"hostile"))
    sandbox.assert_not_unpacked(bundle.build(), MalformedBundle)


def test_two_names_for_one_place_are_not_unpacked(sandbox: Sandbox) -> None:
    bundle = draft()
    bundle.declare(Member("files/notes.txt/below", b"a file as a directory"))
    sandbox.assert_not_unpacked(bundle.build(), MalformedBundle)


# --- types ----------------------------------------------------------------------------------------

HOSTILE_TYPES = {
    "a symbolic link": tarfile.SYMTYPE,
    "a hard link": tarfile.LNKTYPE,
    "a character device": tarfile.CHRTYPE,
    "a block device": tarfile.BLKTYPE,
    "a fifo": tarfile.FIFOTYPE,
    "a directory": tarfile.DIRTYPE,
    "a contiguous file": tarfile.CONTTYPE,
    "a sparse file": tarfile.GNUTYPE_SPARSE,
    "a global header": tarfile.XGLTYPE,
    "an extended header of Solaris": tarfile.SOLARIS_XHDTYPE,
    "an unknown type": b"Z",
}


@pytest.mark.parametrize("kind", HOSTILE_TYPES.values(), ids=HOSTILE_TYPES.keys())
def test_a_member_that_is_no_plain_file_is_refused(kind: bytes, sandbox: Sandbox) -> None:
    bundle = draft()
    bundle.declare(Member("files/thing", type=kind, linkname="../../../outside"))
    sandbox.assert_refused(bundle.build(), MalformedBundle)


def test_a_directory_dressed_as_a_file_is_refused(sandbox: Sandbox) -> None:
    bundle = draft()
    bundle.declare(Member("files/directory/", type=tarfile.AREGTYPE), name="files/directory")
    sandbox.assert_refused(bundle.build(), MalformedBundle)


def test_long_names_of_gnu_are_refused(sandbox: Sandbox) -> None:
    bundle = draft()
    bundle.declare(Member("files/" + "x" * 200, b"x", tar_format=tarfile.GNU_FORMAT))
    sandbox.assert_refused(bundle.build(), MalformedBundle)


# --- lies -----------------------------------------------------------------------------------------


def _pax(records: bytes, *, claimed_bytes: int | None = None) -> Callable[[Draft], object]:
    """A declared member behind an extended header of just these bytes."""

    def edit(bundle: Draft) -> None:
        member = Member("files/pax", b"content")
        plain = member.to_bytes()[:512]
        bundle.declare(member)
        member.raw = raw_pax_header(records, claimed_bytes=claimed_bytes) + plain

    return edit


def _header_block(change: Callable[[bytearray], object], *, true_checksum: bool) -> Callable[[Draft], object]:
    """The declared member's header, with a change and with or without the checksum that belongs to it."""

    def edit(bundle: Draft) -> None:
        block = bytearray(bundle.members[0].to_bytes()[:512])
        change(block)
        if true_checksum:
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
        bundle.members[0].raw = bytes(block)

    return edit


def _field(offset: int, data: bytes) -> Callable[[bytearray], object]:
    def write(block: bytearray) -> None:
        block[offset : offset + len(data)] = data

    return write


def _claiming(size_bytes: int) -> Callable[[Draft], object]:
    return lambda bundle: setattr(bundle.members[0], "claimed_bytes", size_bytes)


def _stowaway(bundle: Draft) -> None:
    """A member that the header has room for and the manifest does not know."""
    bundle.declare(Member("files/stowaway", b"x"))
    bundle.manifest["artifacts"].pop()


def _dirty_padding(bundle: Draft) -> None:
    member = bundle.members[0]
    member.raw = member.to_bytes()[:512] + member.data + b"dirt" + bytes(508 - len(member.data))
    member.data = b""


LIES: dict[str, Callable[[Draft], object]] = {
    "a member twice": lambda b: b.members.append(b.members[0]),
    "a member twice, in the manifest too": lambda b: b.declare(b.members[0]),
    "a member that is not declared": _stowaway,
    "a member declared and not there": lambda b: b.members.clear(),
    "a member larger than it says": _claiming(3),
    "a member smaller than it says": _claiming(1000),
    "a member of an exabyte": _claiming(1 << 60),
    "a negative size": _header_block(_field(124, b"\xff" * 12), true_checksum=True),
    "a size that is no number": _header_block(_field(124, b"8888888888\0\0"), true_checksum=True),
    "a header that was changed": _header_block(_field(0, b"F"), true_checksum=False),
    "a name that is not UTF-8": _header_block(_field(0, b"files/\xff\0"), true_checksum=True),
    "dirt in the padding": _dirty_padding,
    "a member after the manifest": lambda b: b.tail.append(Member("files/late")),
    "a second manifest": lambda b: b.tail.append(Member("manifest.json", to_json(b.manifest))),
    "no end": lambda b: setattr(b, "end", b""),
    "half an end": lambda b: setattr(b, "end", bytes(512)),
    "dirt after the end": lambda b: setattr(b, "end", bytes(1024) + b"dirt"),
    "a third block of zeros": lambda b: setattr(b, "end", bytes(1536)),
    "an extended header of 65 KiB": _pax(pax_record(b"path", b"x" * (65 << 10))),
    "an extended header of 8 GiB": _pax(pax_record(b"path", b"x"), claimed_bytes=(8 << 30) - 1),
    "an empty extended header": _pax(b""),
    "an extended header that is not there": _pax(b"", claimed_bytes=10),
    "two paths": _pax(pax_record(b"path", b"files/pax") * 2),
    "a link's target": _pax(pax_record(b"linkpath", b"/etc/passwd")),
    "a sparse map": _pax(pax_record(b"GNU.sparse.name", b"files/pax")),
    "an owner": _pax(pax_record(b"uid", b"0")),
    "a comment": _pax(pax_record(b"comment", b"hello")),
    "a path that is not UTF-8": _pax(pax_record(b"path", b"files/\xff")),
    "a record without a newline": _pax(b"18 path=files/pax;"),
    "a record without a value": _pax(b"7 path\n"),
    "a record that ends too late": _pax(b"99 path=files/pax\n"),
    "a record that ends too early": _pax(b"5 path=files/pax\n"),
    "a record without a length": _pax(b"0 path=files/pax\n"),
    "a record with a length in words": _pax(b"ten path=files/pax\n"),
    "a negative size in a record": _pax(pax_record(b"size", b"-7")),
    "a fractional size in a record": _pax(pax_record(b"size", b"7.0")),
    "a size in digits of another script": _pax(pax_record(b"size", "٧".encode())),
    "a size of five thousand digits": _pax(pax_record(b"size", b"9" * 5000)),
    "a size in a record that is not the member's": _pax(pax_record(b"size", b"3")),
}


def test_what_the_lies_start_from_is_sound() -> None:
    bundle = draft()
    _pax(pax_record(b"path", b"files/pax") + pax_record(b"size", b"7") + pax_record(b"mtime", b"1.5"))(bundle)
    _header_block(lambda _: None, true_checksum=True)(bundle)
    _, received = read(bundle.build())
    assert received == {"files/notes.txt": b"remember the milk\n", "files/pax": b"content"}


@pytest.mark.parametrize("edit", LIES.values(), ids=LIES.keys())
def test_a_tar_that_lies_is_refused(edit: Callable[[Draft], object], sandbox: Sandbox) -> None:
    bundle = draft()
    edit(bundle)
    sandbox.assert_refused(bundle.build(), MalformedBundle)


def test_an_extended_header_of_a_gigabyte_is_not_even_decompressed() -> None:
    bundle = draft()
    plain = bundle.tar()
    start = plain.index(b"files/notes.txt\0")
    claim = raw_pax_header(b"", claimed_bytes=1 << 30)
    zeros = bytes(4 << 20)
    frames = [*framed(plain[:start] + claim), *[(frame(zeros), len(zeros))] * 256]
    stream = CountingStream(container(frames))
    with pytest.raises(MalformedBundle, match="larger than it may be"):
        read_bundle(stream, encrypted=False)
    assert stream.read_bytes < len(stream.getvalue()) / 10


def test_extended_headers_in_a_row_are_refused(sandbox: Sandbox) -> None:
    bundle = draft()
    header = raw_pax_header(pax_record(b"path", b"files/notes.txt"))
    bundle.members[0].raw = header + header + bundle.members[0].to_bytes()[:512]
    sandbox.assert_refused(bundle.build(), MalformedBundle)


def test_an_extended_header_with_nothing_behind_it_is_refused(sandbox: Sandbox) -> None:
    bundle = draft()
    bundle.end = raw_pax_header(pax_record(b"path", b"files/x")) + bytes(1024)
    sandbox.assert_refused(bundle.build(), MalformedBundle)


@pytest.mark.parametrize("first", [[], ["manifest.json"], ["files/notes.txt", "agentkeep.json"]])
def test_the_header_comes_first_or_it_is_no_bundle(first: list[str], sandbox: Sandbox) -> None:
    members = b"".join(Member(name, b"{}").to_bytes() for name in first)
    sandbox.assert_refused(container(framed(members + bytes(1024))), MalformedBundle)


def test_a_bundle_without_a_manifest_is_refused(sandbox: Sandbox) -> None:
    header = Member("agentkeep.json", to_json(draft({}).header)).to_bytes()
    sandbox.assert_refused(container(framed(header + bytes(1024))), MalformedBundle)


def test_a_manifest_of_a_gigabyte_is_refused_before_it_is_read(sandbox: Sandbox) -> None:
    bundle = draft()
    plain = bundle.tar()
    start = plain.index(b"manifest.json\0")
    manifest = Member("manifest.json", b"{}", claimed_bytes=1 << 30)
    sandbox.assert_refused(container(framed(plain[:start] + manifest.to_bytes())), MalformedBundle)
    with pytest.raises(MalformedBundle, match="larger than it may be"):
        read(container(framed(plain[:start] + manifest.to_bytes())))
