"""Staged copies of files that change meanwhile: each is one state of its file, or said to be none."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from daemon.capture.files import StagedFile, Staging, is_fresh, signatures, whole_lines_bytes
from daemon.capture.scan import Signature, open_quietly
from tests.e2e.commands import wait_until

LONG_AGO_NS = 1_700_000_000_000_000_000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "ana"
    root.mkdir()
    return root


@pytest.fixture
def staging(root: Path, tmp_path: Path) -> Staging:
    room = tmp_path / "staged"
    room.mkdir()
    return Staging(root, room)


def signature_of(path: Path) -> Signature:
    return Signature.of(path.lstat())


def stage(staging: Staging, root: Path, *names: str) -> None:
    staging.refresh(signatures(root, names))


def copy_of(staging: Staging, name: str) -> bytes:
    return staging.files[name].copy.read_bytes()


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as stream:
        stream.write(data)


def copies_in(staging: Staging) -> set[Path]:
    return {staged.copy for staged in staging.files.values()}


# --- refresh ----------------------------------------------------------------------------------------------


def test_a_copy_is_the_files_bytes_and_vanished_ones_are_dropped(
    root: Path, staging: Staging, tmp_path: Path
) -> None:
    expected = {"empty": b"", "note.md": b"a note", "big.bin": os.urandom(3_000_001)}
    for name, content in expected.items():
        (root / name).write_bytes(content)
    stage(staging, root, *expected)
    assert {name: copy_of(staging, name) for name in staging.files} == expected
    (root / "note.md").unlink()
    stage(staging, root, *expected)
    assert staging.files.keys() == {"empty", "big.bin"}
    assert set((tmp_path / "staged").iterdir()) == copies_in(staging)


def test_a_file_that_is_gone_by_the_time_it_is_copied_is_no_failure(root: Path, staging: Staging) -> None:
    (root / "note.md").write_bytes(b"a note")
    wanted = signatures(root, ["note.md"])
    (root / "note.md").unlink()
    staging.refresh(wanted)
    assert (staging.files, staging.failures) == ({}, {})


@pytest.mark.parametrize("becomes", ["link", "directory", "fifo"])
def test_what_is_no_file_any_more_is_never_followed_nor_waited_for(
    root: Path, staging: Staging, tmp_path: Path, becomes: str
) -> None:
    (tmp_path / "secret").write_bytes(b"not the agent's")
    path = root / "note.md"
    path.write_bytes(b"a note")
    wanted = signatures(root, ["note.md"])
    path.unlink()
    if becomes == "link":
        path.symlink_to(tmp_path / "secret")
    elif becomes == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    staging.refresh(wanted)
    assert b"not the agent's" not in b"".join(copy.read_bytes() for copy in copies_in(staging))
    assert not staging.is_current("note.md", wanted["note.md"])
    if becomes != "fifo":
        assert staging.failures["note.md"].reason.startswith("cannot be read: ")


def test_no_room_for_a_copy_is_our_error(root: Path, staging: Staging) -> None:
    """/dev/full takes writes as a full disk does."""
    (root / "note.md").write_bytes(b"a note")
    (staging._directory / "00000001").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space") as raised:
        stage(staging, root, "note.md")
    assert raised.value.errno == errno.ENOSPC
    (staging._directory / "00000002").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space"):
        staging.put("note.md", signature_of(root / "note.md"), b"a note")


def test_no_access_time_is_moved(root: Path, staging: Staging) -> None:
    names = ("note.md", "a.jsonl", "a.json")
    for name in names:
        (root / name).write_bytes(b'{"a": 1}\n')
        os.utime(root / name, ns=(1, LONG_AGO_NS))
    stage(staging, root, *names)
    append(root / "a.jsonl", b'{"b": 2}\n')
    os.utime(root / "a.jsonl", ns=(1, LONG_AGO_NS))
    assert staging.cut_log("a.jsonl", signature_of(root / "a.jsonl"))
    staging.settle(names)
    assert {(root / name).stat().st_atime_ns for name in names} == {1}
    (root / "note.md").read_bytes()
    assert (root / "note.md").stat().st_atime_ns > 1  # so this would have shown


def test_where_reflinks_are_not_to_be_had_bytes_are_copied(
    root: Path, staging: Staging, tmp_path: Path
) -> None:
    """From another file system there are never any."""
    other = Path("/dev/shm") / f"agentkeep-test-{os.getpid()}"
    content = os.urandom(2_500_000)
    other.write_bytes(content)
    try:
        assert other.stat().st_dev != tmp_path.stat().st_dev
        with (
            (tmp_path / "target").open("wb") as target,
            other.open("rb") as source,
            pytest.raises(OSError),
        ):
            fcntl.ioctl(target, 0x40049409, source.fileno())
        staging.update(signatures(root, [str(other)]))
        assert copy_of(staging, str(other)) == content
    finally:
        other.unlink()


# --- logs -------------------------------------------------------------------------------------------------


@pytest.fixture
def log(root: Path, staging: Staging) -> Path:
    log = root / "a.jsonl"
    log.write_bytes(b'{"a": 1}\n')
    stage(staging, root, "a.jsonl")
    return log


def test_a_log_that_grew_is_cut_where_it_was_then(log: Path, staging: Staging) -> None:
    append(log, b'{"b": 2}\n')
    then = signature_of(log)
    append(log, b'{"c": 3}\n')
    assert staging.cut_log("a.jsonl", then)
    assert copy_of(staging, "a.jsonl") == b'{"a": 1}\n{"b": 2}\n'
    assert staging.is_current("a.jsonl", then)


def test_a_log_that_did_not_grow_is_what_it_was(log: Path, staging: Staging) -> None:
    assert staging.cut_log("a.jsonl", signature_of(log))
    assert copy_of(staging, "a.jsonl") == b'{"a": 1}\n'


def test_a_log_may_grow_after_it_was_read_without_growing(log: Path, staging: Staging) -> None:
    then = signature_of(log)
    append(log, b'{"b": 2}\n')
    assert staging.cut_log("a.jsonl", then)
    assert copy_of(staging, "a.jsonl") == b'{"a": 1}\n'


def test_an_empty_log_that_grows_is_cut_like_any_other(root: Path, staging: Staging) -> None:
    log = root / "a.log"
    log.touch()
    stage(staging, root, "a.log")
    assert staging.cut_log("a.log", signature_of(log))
    append(log, b"first\n")
    assert staging.cut_log("a.log", signature_of(log))
    assert copy_of(staging, "a.log") == b"first\n"


def test_a_log_grows_by_much(log: Path, staging: Staging) -> None:
    more = os.urandom(5_000_000)
    append(log, more)
    assert staging.cut_log("a.jsonl", signature_of(log))
    assert copy_of(staging, "a.jsonl") == b'{"a": 1}\n' + more


def truncate(log: Path) -> None:
    log.write_bytes(b"")


def shorten(log: Path) -> None:
    os.truncate(log, 3)


def replace(log: Path) -> None:
    """As logrotate does: another file, longer, that begins as this one did."""
    log.with_name("new").write_bytes(b'{"a": 1}\n{"b": 2}\n')
    log.with_name("new").rename(log)


def rewrite(log: Path) -> None:
    log.write_bytes(b'{"z": 9}\n{"b": 2}\n')


def rewrite_in_place(log: Path) -> None:
    with log.open("r+b") as stream:
        stream.write(b'{"z": 9}\n{"b": 2}\n')


def rewrite_the_end_and_grow(log: Path) -> None:
    with log.open("r+b") as stream:
        stream.seek(6)
        stream.write(b'9}\n{"b": 2}\n')


@pytest.mark.parametrize(
    "change", [truncate, shorten, replace, rewrite, rewrite_in_place, rewrite_the_end_and_grow]
)
@pytest.mark.parametrize("when", ["before its length is read", "after"])
def test_a_log_that_did_anything_but_grow_has_no_cut_and_is_staged_anew(
    log: Path, root: Path, staging: Staging, change: Callable[[Path], None], when: str
) -> None:
    append(log, b'{"b": 2}\n')
    then = signature_of(log)
    change(log)
    if when == "before its length is read":
        then = signature_of(log)
    assert not staging.cut_log("a.jsonl", then)
    stage(staging, root, "a.jsonl")
    assert copy_of(staging, "a.jsonl") == log.read_bytes()


def test_a_log_of_the_same_length_that_was_rewritten_has_no_cut(log: Path, staging: Staging) -> None:
    log.write_bytes(b'{"z": 9}\n')
    os.utime(log, ns=(LONG_AGO_NS, LONG_AGO_NS))
    assert not staging.cut_log("a.jsonl", signature_of(log))


def test_a_long_log_that_was_rewritten_at_its_beginning_or_its_end_has_no_cut(
    root: Path, staging: Staging
) -> None:
    log = root / "a.log"
    for offset in (0, 65_000, 236_000, 299_999):
        log.write_bytes(b"x" * 300_000)
        stage(staging, root, "a.log")
        with log.open("r+b") as stream:
            stream.seek(offset)
            stream.write(b"y")
        append(log, b"more")
        assert not staging.cut_log("a.log", signature_of(log)), offset


def test_a_log_that_is_gone_has_no_cut(log: Path, staging: Staging) -> None:
    append(log, b'{"b": 2}\n')
    then = signature_of(log)
    log.unlink()
    assert not staging.cut_log("a.jsonl", then)


def test_a_log_that_was_never_staged_has_no_cut(root: Path, staging: Staging) -> None:
    (root / "a.log").write_bytes(b"a line\n")
    assert not staging.cut_log("a.log", signature_of(root / "a.log"))


def test_a_log_that_never_stops_growing_is_always_a_beginning_of_itself(root: Path, staging: Staging) -> None:
    log = root / "a.log"
    log.touch()
    script = (
        "import sys\n"
        "with open(sys.argv[1], 'ab', buffering=0) as log:\n"
        "    for number in range(100_000_000):\n"
        "        log.write(b'%08d\\n' % number)\n"
        "        if number == 10: print(flush=True)\n"
    )
    with writing(script, log):
        stage(staging, root, "a.log")
        for _ in range(20):
            then = signature_of(log)
            assert staging.cut_log("a.log", then)
            assert staging.files["a.log"].copy.stat().st_size == then.size_bytes
    copy = copy_of(staging, "a.log")
    # Its last line may be half there: a write over the end of a page is seen in two steps.
    lines = copy.splitlines()[:-1]
    assert lines == [b"%08d" % number for number in range(len(lines))]


@contextmanager
def writing(script: str, *argv: str | Path) -> Iterator[None]:
    """A process that writes for the time of the block, from its first line of output on."""
    command: list[str | Path] = [sys.executable, "-c", script, *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"\n"
        try:
            yield
        finally:
            writer.kill()


@pytest.mark.parametrize(
    ("written", "whole"),
    [
        (b'{"a": 1}\n{"b"', 9),
        (b'{"a": 1}\n{"b": 2}', 17),
        (b'{"a": 1}\n\n', 10),
        (b'{"a": "\xff', 0),
        (b"1\n2", 3),
        (b'{"a": 1}\n\0\0\0', 12),  # preallocated: no torn line
    ],
)
def test_a_line_that_is_half_written_is_cut_while_its_log_is_young(
    root: Path, staging: Staging, written: bytes, whole: int
) -> None:
    (root / "a.jsonl").write_bytes(written)
    stage(staging, root, "a.jsonl")
    staged = staging.files["a.jsonl"]
    assert whole_lines_bytes("a.jsonl", staged) == whole
    old = StagedFile(staged.copy, staged.signature, staged.staged_at_ns + 3600 * 10**9)
    assert whole_lines_bytes("a.jsonl", old) == len(written)  # nobody is going to end that line


# --- settle -----------------------------------------------------------------------------------------------

_REWRITE = """
import sys
path, how, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
generation = 0
while True:
    generation += 1
    with open(path, how) as stream:
        stream.write(b"%08d" % (generation % 10**8) * (size // 8))
    if generation == 3: print(flush=True)
"""


@pytest.mark.parametrize("how", ["r+b", "wb"], ids=["in-place", "truncated-first"])
@pytest.mark.parametrize("size_bytes", [8_000, 4_000_000])
def test_a_file_that_is_rewritten_without_pause_is_one_state_or_a_named_failure(
    root: Path, staging: Staging, monkeypatch: pytest.MonkeyPatch, how: str, size_bytes: int
) -> None:
    """Never a mixture, and never just left out."""
    monkeypatch.setattr("daemon.capture.files._SETTLE_SECONDS", 0.3)
    path = root / "big.bin"
    path.write_bytes(bytes(size_bytes))
    with writing(_REWRITE, path, how, str(size_bytes)):
        for _ in range(5):
            staging.settle(["big.bin"])
            assert ("big.bin" in staging.files) != ("big.bin" in staging.failures)
            if "big.bin" in staging.failures:
                assert "rewritten so steadily" in staging.failures["big.bin"].reason
                assert "before" in staging.failures["big.bin"].hint


def test_what_settles_is_one_state(root: Path, staging: Staging) -> None:
    """The writer pauses between its generations, so that there are states to be had."""
    script = _REWRITE.replace("    if generation == 3", "    time.sleep(0.05)\n    if generation == 3")
    path = root / "big.bin"
    path.write_bytes(bytes(800_000))
    with writing(script.replace("import sys", "import sys, time"), path, "r+b", "800000"):
        for _ in range(5):
            staging.settle(["big.bin"])
            assert staging.failures == {}
            copy = copy_of(staging, "big.bin")
            assert copy == copy[:8] * 100_000


def test_a_file_that_holds_still_settles_at_once(root: Path, staging: Staging) -> None:
    (root / "note.md").write_bytes(b"a note")
    staging.settle(["note.md", "not there"])
    assert (copy_of(staging, "note.md"), staging.failures) == (b"a note", {})
    assert staging.files.keys() == {"note.md"}


def test_a_file_that_cannot_be_read_any_more_is_named(root: Path, staging: Staging) -> None:
    (root / "note.md").symlink_to("elsewhere")
    staging.settle(["note.md"])
    assert staging.files == {}
    assert staging.failures["note.md"].reason.startswith("cannot be read: ")


def test_one_that_does_not_settle_keeps_no_other_from_it(
    root: Path, staging: Staging, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("daemon.capture.files._SETTLE_SECONDS", 0.2)
    names = ["a.bin", "b.md", "c.json"]
    for name in names:
        (root / name).write_bytes(b"[1]")
    with writing(_REWRITE, root / "a.bin", "r+b", "4000000"):
        staging.settle(names)
    assert {"b.md", "c.json"} <= staging.files.keys()
    assert set((tmp_path / "staged").iterdir()) == copies_in(staging)  # nothing is left of what was given up


# --- JSON that is half written ----------------------------------------------------------------------------


def test_json_that_is_written_in_two_steps_is_waited_for(root: Path, staging: Staging) -> None:
    path = root / "state.json"
    whole = json.dumps({"memories": list(range(2000))}).encode()
    path.write_bytes(whole[:5000])
    stage(staging, root, "state.json")
    assert staging.is_half_written("state.json")
    seen = threading.Event()

    def finish() -> None:
        wait_until(lambda: len(os.listdir(staging._directory)) > 0, "a first copy")  # noqa: PTH208
        append(path, whole[5000:])
        seen.set()

    thread = threading.Thread(target=finish)
    thread.start()
    staging.settle(["state.json"])
    thread.join()
    assert seen.is_set()
    assert json.loads(copy_of(staging, "state.json")) == json.loads(whole)
    assert not staging.is_half_written("state.json")


def test_json_that_was_only_truncated_yet_is_half_written(root: Path, staging: Staging) -> None:
    (root / "state.json").write_bytes(b"")
    stage(staging, root, "state.json")
    assert staging.is_half_written("state.json")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("settings.json", b'{\n  // a comment\n  "a": 1,\n}\n'),
        ("broken.json", b'{"a": '),
        ("empty.json", b""),
        ("deep.json", b"[" * 100_000),
    ],
)
def test_old_json_is_taken_as_it_is_whether_it_parses_or_not(
    root: Path, staging: Staging, name: str, content: bytes
) -> None:
    (root / name).write_bytes(content)
    stage(staging, root, name)
    staged = staging.files[name]
    assert staging.is_half_written(name)
    staging.files[name] = StagedFile(staged.copy, staged.signature, staged.staged_at_ns + 2 * 10**9 + 1)
    assert not staging.is_half_written(name)


def test_json_that_never_parses_is_kept_once_its_time_is_up(
    root: Path, staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It held still: that it is no JSON is its own business."""
    monkeypatch.setattr("daemon.capture.files._SETTLE_SECONDS", 0.05)
    (root / "settings.json").write_bytes(b"// a comment")
    staging.settle(["settings.json"])
    assert (copy_of(staging, "settings.json"), staging.failures) == (b"// a comment", {})


def test_only_json_is_asked_whether_it_parses(root: Path, staging: Staging) -> None:
    for name in ("a.jsonl", "a.json5", "a.md"):
        (root / name).write_bytes(b"{")
        stage(staging, root, name)
        assert not staging.is_half_written(name)
    assert not staging.is_half_written("never staged.json")


# --- what was read in the window --------------------------------------------------------------------------


def test_what_is_put_is_proven_however_young_it_is(root: Path, staging: Staging, tmp_path: Path) -> None:
    path = root / "cursor.json"
    path.write_bytes(b"1")
    stage(staging, root, "cursor.json")
    path.write_bytes(b"2")
    signature = signature_of(path)
    assert not staging.is_current("cursor.json", signature)
    staging.put("cursor.json", signature, b"2")
    assert staging.is_current("cursor.json", signature)
    assert copy_of(staging, "cursor.json") == b"2"
    staging.put("cursor.json", signature, b"not looked at: there is a copy of just this")
    assert copy_of(staging, "cursor.json") == b"2"
    assert set((tmp_path / "staged").iterdir()) == copies_in(staging)


def test_what_was_written_within_a_tick_of_the_clock_is_not_trusted(root: Path, staging: Staging) -> None:
    path = root / "note.md"
    path.write_bytes(b"1")
    signature = signature_of(path)
    for age_ns, is_trusted in ((0, False), (1_000_000, False), (20_000_000, True)):
        staged_at_ns = signature.ctime_ns + age_ns
        copy = staging._directory / "copy"
        copy.write_bytes(b"1")
        staging.files["note.md"] = StagedFile(copy, signature, staged_at_ns)
        assert staging.is_current("note.md", signature) == is_trusted


def test_an_mtime_from_the_future_makes_no_file_young_for_ever(root: Path) -> None:
    path = root / "note.md"
    path.write_bytes(b"1")
    os.utime(path, ns=(LONG_AGO_NS, 4_000_000_000_000_000_000))
    signature = signature_of(path)
    assert not is_fresh("note.md", signature, read_at_ns=signature.ctime_ns + 3_000_000_000)
    assert is_fresh("note.md", signature, read_at_ns=signature.ctime_ns)


# --- sparse files -----------------------------------------------------------------------------------------


def make_sparse(path: Path, size_bytes: int, *data: tuple[int, bytes]) -> None:
    with path.open("wb") as stream:
        stream.truncate(size_bytes)
        for offset, content in data:
            stream.seek(offset)
            stream.write(content)


def test_a_hole_of_a_tebibyte_stays_a_hole(root: Path, staging: Staging) -> None:
    size_bytes = 1 << 40
    make_sparse(root / "disk.img", size_bytes, (0, b"first"), (size_bytes // 2, b"middle"))
    stage(staging, root, "disk.img")
    copy = staging.files["disk.img"].copy
    assert (copy.stat().st_size, copy.stat().st_blocks <= 64) == (size_bytes, True)
    with copy.open("rb") as stream:
        assert stream.read(8) == b"first\0\0\0"
        stream.seek(size_bytes // 2)
        assert stream.read(8) == b"middle\0\0"


@pytest.mark.parametrize(
    "data",
    [(), ((0, b"x"),), ((4096, b"x" * 4096),), ((0, b"x"), (1_000_000, b"y" * 70_000)), ((9_999_999, b"z"),)],
    ids=["hole", "head", "page", "two", "tail"],
)
def test_a_sparse_file_is_copied_to_the_byte(
    root: Path, staging: Staging, data: tuple[tuple[int, bytes], ...]
) -> None:
    make_sparse(root / "disk.img", 10_000_000, *data)
    stage(staging, root, "disk.img")
    copy = staging.files["disk.img"].copy
    assert copy.read_bytes() == (root / "disk.img").read_bytes()
    assert copy.stat().st_blocks <= (root / "disk.img").stat().st_blocks + 8


def test_a_log_with_a_hole_in_what_it_grew_by_is_copied_to_the_byte(root: Path, staging: Staging) -> None:
    log = root / "a.log"
    log.write_bytes(b"a line\n")
    stage(staging, root, "a.log")
    with log.open("r+b") as stream:
        stream.seek(5_000_000)
        stream.write(b"after a hole\n")
        stream.truncate(6_000_000)
    assert staging.cut_log("a.log", signature_of(log))
    assert copy_of(staging, "a.log") == log.read_bytes()


def test_a_file_that_is_cut_short_while_it_is_copied_is_no_failure_of_its_own(
    root: Path, staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Truncated between looking for data and looking for its end: it moved, and is there to be read."""
    path = root / "disk.img"
    path.write_bytes(b"x" * 100_000)
    wanted = signatures(root, ["disk.img"])
    original = os.lseek

    def truncated_under_us(descriptor: int, offset: int, whence: int) -> int:
        if whence == os.SEEK_HOLE:
            os.truncate(path, 0)
        return original(descriptor, offset, whence)

    monkeypatch.setattr(os, "lseek", truncated_under_us)
    staging.update(wanted)
    assert staging.failures == {}
    assert not staging.is_current("disk.img", wanted["disk.img"])


def test_other_errors_of_reading_are_named(root: Path, staging: Staging) -> None:
    (root / "note.md").symlink_to("note.md")
    with pytest.raises(OSError), open_quietly(root / "note.md"):
        pass
    staging.update(signatures(root, ["note.md"]))
    assert os.strerror(errno.ELOOP) in staging.failures["note.md"].reason
