"""Files that a process has mapped to write to: found among what is really mapped, and said of a capture."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from daemon.capture import Capture, CutOptions, take_cut
from daemon.capture.mapped import mapped_for_writing
from daemon.capture.scan import Signature
from daemon.model import AgentSpec
from tests.unit.test_capture import contents

_MAP = """
import mmap, os, sys
how, path = sys.argv[1:]
kinds = {
    "shared": (mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
    "shared, executable": (mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC),
    "shared, only writable": (mmap.MAP_SHARED, mmap.PROT_WRITE),
    "shared, read-only": (mmap.MAP_SHARED, mmap.PROT_READ),
    "private": (mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE),
}
flags, protection = kinds[how]
descriptor = os.open(path, os.O_RDWR)
mapped = mmap.mmap(descriptor, 0, flags=flags, prot=protection)
os.close(descriptor)
print(flush=True)
for line in sys.stdin:
    if line.strip() == "unmap":
        mapped.close()
    else:
        mapped[0:1] = line[0:1].encode()
    print(flush=True)
"""


class Mapping:
    """A file, mapped by a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def tell(self, line: str) -> None:
        """Write the line's first byte through the map, or unmap it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        self._process.stdout.readline()


@contextmanager
def mapping(path: Path, how: str = "shared") -> Iterator[Mapping]:
    argv: list[str | Path] = [sys.executable, "-c", _MAP, how, path]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
        try:
            yield Mapping(process)
        finally:
            process.kill()


def signature_of(path: Path) -> Signature:
    return Signature.of(path.lstat())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "ana"
    root.mkdir()
    return root


@pytest.fixture
def store(root: Path) -> Path:
    store = root / "vectors.bin"
    store.write_bytes(b"0" * 10_000)
    return store


@pytest.mark.parametrize(
    ("how", "is_found"),
    [
        ("shared", True),
        ("shared, executable", True),
        ("shared, only writable", True),
        ("shared, read-only", False),
        ("private", False),
    ],
)
def test_only_what_is_written_to_for_others_is_found(store: Path, how: str, is_found: bool) -> None:
    with mapping(store, how):
        assert mapped_for_writing({"vectors.bin": signature_of(store)}) == (
            {"vectors.bin"} if is_found else set()
        )


def test_it_is_found_until_it_is_unmapped(store: Path) -> None:
    files = {"vectors.bin": signature_of(store)}
    assert mapped_for_writing(files) == set()
    with mapping(store) as mapped:
        assert mapped_for_writing(files) == {"vectors.bin"}
        mapped.tell("unmap")
        assert mapped_for_writing(files) == set()
    assert mapped_for_writing(files) == set()


def test_every_name_of_a_file_is_found(root: Path, store: Path) -> None:
    os.link(store, root / "another name")
    os.link(store, root / "unlisted")
    files = {name: signature_of(root / name) for name in ("vectors.bin", "another name")}
    with mapping(root / "unlisted"):
        assert mapped_for_writing(files) == {"vectors.bin", "another name"}


def test_another_file_of_the_same_inode_number_is_not_found(store: Path) -> None:
    there = signature_of(store)
    elsewhere = dataclasses.replace(there, device=there.device + 1)
    with mapping(store):
        assert mapped_for_writing({"other.bin": elsewhere, "rs.bin": elsewhere}) == set()


def test_it_is_found_where_stat_and_the_kernel_name_devices_differently(store: Path) -> None:
    """As of btrfs: stat gives the subvolume's device, the map that of the file system."""
    there = signature_of(store)
    elsewhere = dataclasses.replace(there, device=there.device + 1)
    with mapping(store):
        assert mapped_for_writing({"vectors.bin": elsewhere}) == {"vectors.bin"}
        assert mapped_for_writing({str(store): elsewhere}) == {str(store)}
        assert mapped_for_writing({"vectors.bin": dataclasses.replace(elsewhere, inode=1)}) == set()


@pytest.mark.parametrize(
    "name",
    [b"with space", b"new\nline", b"a rw-s b", b"latin1-\xe9", b"x (deleted)", b"00:00 0", b"\\012"],
    ids=repr,
)
def test_odd_names_confuse_nothing(root: Path, name: bytes) -> None:
    path = root / os.fsdecode(name)
    path.write_bytes(b"0" * 10_000)
    files = {os.fsdecode(name): signature_of(path)}
    with mapping(path, "shared, read-only"):
        assert mapped_for_writing(files) == set()
    with mapping(path):
        assert mapped_for_writing(files) == set(files)


def test_a_file_that_was_deleted_while_mapped_is_not_the_one_that_has_its_name_now(store: Path) -> None:
    with mapping(store):
        store.rename(store.with_name("kept, so that its inode is not used again"))
        store.write_bytes(b"0" * 10_000)
        assert mapped_for_writing({"vectors.bin": signature_of(store)}) == set()


def test_with_no_files_nothing_is_found(store: Path) -> None:
    with mapping(store):
        assert mapped_for_writing({}) == set()


# --- in a capture -----------------------------------------------------------------------------------------


def cut(root: Path, **fields: Any) -> Capture:
    scratch = root.with_name(f"scratch-{len(list(root.parent.iterdir()))}")
    scratch.mkdir()
    spec = AgentSpec("default", "ana", root, **{"include": ("**",), **fields})
    return take_cut(spec, scratch, options=CutOptions(attempts=2))


def test_a_capture_of_a_mapped_store_is_per_source_and_names_it(root: Path, store: Path) -> None:
    (root / "note.md").write_bytes(b"a note")
    with mapping(store) as mapped:
        mapped.tell("7")
        capture = cut(root)
        assert (capture.consistency.level, capture.consistency.moved) == ("per_source", ("vectors.bin",))
        assert (capture.failures, capture.fingerprint) == ([], None)
        assert contents(capture) == {"files/note.md": b"a note", "files/vectors.bin": b"7" + b"0" * 9_999}


def test_what_is_written_without_a_trace_is_in_the_next_capture(root: Path, store: Path) -> None:
    """The second write moves no mtime that anybody could go by."""
    with mapping(store) as mapped:
        for digit in "123":
            mapped.tell(digit)
            assert contents(cut(root))["files/vectors.bin"] == digit.encode() + b"0" * 9_999


def test_a_store_that_is_only_read_through_a_map_is_of_the_instant(root: Path, store: Path) -> None:
    with mapping(store, "shared, read-only"):
        capture = cut(root)
    assert (capture.consistency.level, capture.consistency.moved) == ("point_in_time", ())


def test_a_store_that_is_mapped_and_left_out_troubles_nobody(root: Path, store: Path) -> None:
    (root / "note.md").write_bytes(b"a note")
    with mapping(store):
        capture = cut(root, exclude=("vectors.bin",))
    assert (capture.consistency.level, list(contents(capture))) == ("point_in_time", ["files/note.md"])
