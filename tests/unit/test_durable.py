"""Under a final name a file is whole; locks hold across processes and die with their holder."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from daemon.durable import (
    TEMPORARY_PREFIX,
    claimed_temporary,
    create_private,
    file_lock,
    make_private_directory,
    rename_into_place,
    scratch_directory,
    sync_file_system,
    translating_os_errors,
    write_file,
)
from daemon.errors import BusyError, LocalWriteError


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@contextmanager
def another_process_holding(kind: str, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds one of the module's locks until it is killed."""
    program = f"""
import sys
from pathlib import Path
from daemon import durable
path = Path(sys.argv[1])
holding = {{
    "lock": lambda: durable.file_lock(path, what="it"),
    "temporary": lambda: durable.claimed_temporary(path, what="it"),
    "scratch": lambda: durable.scratch_directory(path.parent, path.name, what="it"),
}}[{kind!r}]
with holding() as held:
    if {kind!r} == "temporary":
        held.write(b"half of it"); held.flush()
    if {kind!r} == "scratch":
        (held / "sub").mkdir(); (held / "sub" / "file").write_text("left over")
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        try:
            yield process
        finally:
            process.kill()


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "may write"),
        (errno.EPERM, "may write"),
        (errno.EIO, ""),
    ],
    ids=lambda value: errno.errorcode.get(value, "") if isinstance(value, int) else "",
)
def test_an_error_of_writing_says_what_where_why_and_what_to_do(code: int, advice: str) -> None:
    with pytest.raises(LocalWriteError) as caught, translating_os_errors("write", Path("/x/y")):
        raise OSError(code, os.strerror(code))
    assert str(caught.value) == f"cannot write /x/y: {os.strerror(code)}"
    assert advice in caught.value.hint
    assert caught.value.exit_code == 73
    assert isinstance(caught.value.__cause__, OSError)


# --- directories ----------------------------------------------------------------------------------


def test_missing_parents_are_made_and_all_of_them_are_private(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c"
    assert make_private_directory(path) == path
    assert [mode_of(made) for made in (path, path.parent, path.parent.parent)] == [0o700] * 3


def test_making_a_directory_again_changes_nothing(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    path = make_private_directory(tmp_path / "a")
    (path / "file").write_text("x")
    make_private_directory(path)
    assert (path / "file").read_text() == "x"
    assert mode_of(tmp_path) == 0o755


@pytest.mark.parametrize("below", ["file", "file/below", "file/below/that", "x" * 300, "x" * 300 + "/below"])
def test_a_directory_that_cannot_be_made_is_an_error_of_ours(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LocalWriteError, match="cannot make the directory"):
        make_private_directory(tmp_path / below)


# --- files ----------------------------------------------------------------------------------------


def test_a_private_file_is_new_and_private(tmp_path: Path) -> None:
    with create_private(tmp_path / "x") as stream:
        stream.write(b"secret")
    assert mode_of(tmp_path / "x") == 0o600
    with pytest.raises(FileExistsError):
        create_private(tmp_path / "x")


def test_a_private_file_is_not_made_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        create_private(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


def test_a_small_file_is_written_whole_and_replaces_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_file(path, b"one")
    write_file(path, b"two", mode=0o640)
    assert path.read_bytes() == b"two"
    assert mode_of(path) == 0o640
    assert os.listdir(tmp_path) == ["x"]  # noqa: PTH208


def test_a_small_file_that_replaces_a_link_leaves_its_target_alone(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("untouched")
    (tmp_path / "x").symlink_to("target")
    write_file(tmp_path / "x", b"new")
    assert (tmp_path / "target").read_text() == "untouched"
    assert (tmp_path / "x").read_bytes() == b"new"
    assert not (tmp_path / "x").is_symlink()


def test_a_file_that_cannot_be_put_in_place_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "full").touch()
    with pytest.raises(LocalWriteError, match="cannot write"):
        write_file(tmp_path / "x", b"data")
    with pytest.raises(LocalWriteError):
        write_file(tmp_path / "missing" / "x", b"data")
    assert os.listdir(tmp_path) == ["x"]  # noqa: PTH208


def test_what_a_killed_process_left_does_not_keep_a_file_from_being_written(tmp_path: Path) -> None:
    """Its process id may be ours: in a container it mostly is."""
    name = f"{TEMPORARY_PREFIX}x.{os.getpid()}.{threading.get_native_id()}"
    (tmp_path / name).write_text("half")
    write_file(tmp_path / "x", b"data")
    assert (tmp_path / "x").read_bytes() == b"data"
    assert not (tmp_path / name).exists()


def test_threads_that_write_one_file_at_once_do_not_tear_it(tmp_path: Path) -> None:
    contents = [bytes([number]) * 200_000 for number in range(8)]
    with ThreadPoolExecutor(len(contents)) as pool:
        list(pool.map(lambda data: write_file(tmp_path / "x", data), contents))
    assert (tmp_path / "x").read_bytes() in contents
    assert os.listdir(tmp_path) == ["x"]  # noqa: PTH208


def test_renaming_replaces_a_file_and_an_empty_directory_and_no_full_one(tmp_path: Path) -> None:
    for name in ("new", "old"):
        (tmp_path / name).write_text(name)
    rename_into_place(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_text() == "new"

    for name in ("tree", "empty", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "x").touch()
    rename_into_place(tmp_path / "tree", tmp_path / "empty")
    with pytest.raises(OSError, match="not empty"):
        rename_into_place(tmp_path / "empty", tmp_path / "full")
    assert (tmp_path / "full" / "x").exists()


def test_a_whole_file_system_can_be_flushed(tmp_path: Path) -> None:
    sync_file_system(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_file_system(tmp_path / "missing")


# --- a temporary of a fixed name ------------------------------------------------------------------


def test_a_claimed_temporary_is_gone_afterwards_however_it_ends(tmp_path: Path) -> None:
    path = tmp_path / ".partial"
    with claimed_temporary(path, what="it") as stream:
        stream.write(b"x")
        assert mode_of(path) == 0o600
    assert not path.exists()
    with pytest.raises(KeyError), claimed_temporary(path, what="it"):
        raise KeyError
    assert not path.exists()


def test_a_claimed_temporary_may_get_its_final_name(tmp_path: Path) -> None:
    path = tmp_path / ".partial"
    with claimed_temporary(path, what="it") as stream:
        stream.write(b"whole")
        stream.flush()
        os.link(path, tmp_path / "final")
    assert (tmp_path / "final").read_bytes() == b"whole"


def test_what_a_killed_process_left_is_taken_over_and_emptied(tmp_path: Path) -> None:
    path = tmp_path / ".partial"
    with another_process_holding("temporary", path) as process:
        process.kill()
        process.wait()
    assert path.read_bytes() == b"half of it"
    with claimed_temporary(path, what="it") as stream:
        stream.write(b"new")
        stream.flush()
        assert path.read_bytes() == b"new"


def test_two_cannot_claim_one_temporary(tmp_path: Path) -> None:
    path = tmp_path / ".partial"
    with (
        another_process_holding("temporary", path),
        pytest.raises(BusyError, match="it is already being written"),
        claimed_temporary(path, what="it"),
    ):
        pass
    assert path.read_bytes() == b"half of it"


def test_a_temporary_is_not_claimed_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("untouched")
    (tmp_path / ".partial").symlink_to("target")
    with pytest.raises(OSError, match="symbolic links"), claimed_temporary(tmp_path / ".partial", what="it"):
        pass
    assert (tmp_path / "target").read_text() == "untouched"


# --- scratch --------------------------------------------------------------------------------------


def test_scratch_is_private_and_gone_afterwards_whatever_was_left_in_it(tmp_path: Path) -> None:
    with scratch_directory(tmp_path, "job", what="it") as scratch:
        assert mode_of(scratch) == 0o700
        assert scratch.name.startswith(TEMPORARY_PREFIX)
        (scratch / "deep").mkdir()
        (scratch / "deep" / "file").touch()
        (scratch / "deep").chmod(0o500)
    assert not scratch.exists()


def test_scratch_is_gone_when_its_job_fails(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), scratch_directory(tmp_path, "job", what="it") as scratch:
        (scratch / "missing").read_text()
    assert os.listdir(tmp_path) == []  # noqa: PTH208


def test_scratch_is_removed_without_following_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("untouched")
    with scratch_directory(tmp_path, "job", what="it") as scratch:
        (scratch / "link").symlink_to(outside)
        (scratch / "file").symlink_to(outside / "file")
    assert (outside / "file").read_text() == "untouched"


def test_what_a_killed_process_left_in_scratch_is_thrown_away(tmp_path: Path) -> None:
    with another_process_holding("scratch", tmp_path / "job") as process:
        process.kill()
        process.wait()
    assert (tmp_path / f"{TEMPORARY_PREFIX}job" / "sub" / "file").exists()
    with scratch_directory(tmp_path, "job", what="it") as scratch:
        assert list(scratch.iterdir()) == []


def test_two_cannot_work_in_one_scratch(tmp_path: Path) -> None:
    with (
        another_process_holding("scratch", tmp_path / "job"),
        pytest.raises(BusyError, match="it is already under way"),
        scratch_directory(tmp_path, "job", what="it"),
    ):
        pass
    assert (tmp_path / f"{TEMPORARY_PREFIX}job" / "sub" / "file").exists()


def test_scratch_is_not_a_link_to_elsewhere(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("untouched")
    (tmp_path / f"{TEMPORARY_PREFIX}job").symlink_to(outside)
    with pytest.raises(LocalWriteError), scratch_directory(tmp_path, "job", what="it"):
        pass
    assert (outside / "file").read_text() == "untouched"


# --- locks ----------------------------------------------------------------------------------------


def test_a_lock_is_held_once_and_let_go(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "x.lock"
    with file_lock(path, what="the agent"):
        with pytest.raises(BusyError, match="the agent is busy") as caught, file_lock(path, what="the agent"):
            pass
        assert caught.value.exit_code == 75
    with file_lock(path, what="the agent"):
        assert path.exists()
    assert path.exists(), "a lock file that goes away lets two hold the lock"


def test_a_lock_holds_across_processes_and_dies_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with another_process_holding("lock", path) as process:
        with pytest.raises(BusyError), file_lock(path, what="it"):
            pass
        process.kill()
        process.wait()
        with file_lock(path, what="it"):
            pass


def test_whoever_has_patience_gets_the_lock_when_it_is_let_go(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with another_process_holding("lock", path) as process:
        assert process.stdin is not None
        process.stdin.close()  # it lets go, some time from now
        with file_lock(path, what="it", timeout_seconds=60):
            pass


def test_a_lock_that_cannot_be_made_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    path.mkdir()
    with pytest.raises(LocalWriteError, match="cannot open the lock"), file_lock(path, what="it"):
        pass
