"""The `file` backend against kills, full disks, strangers in its directory and shares that are gone."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

import storage_backends
from storage_backends import (
    BytesSource,
    ContainerNotFound,
    Forbidden,
    ObjectNotFound,
    StorageBackend,
    StorageError,
    StorageFull,
    Unavailable,
    open_backend,
)
from storage_backends.conformance import FailingSource, keys, noise, read
from storage_backends.filesystem import incoming as incoming_files

ROOT = Path(storage_backends.__file__).parents[1]

_PUT_AND_HANG = """
import io, sys, time
from storage_backends import BytesSource, open_backend

class Hanging(io.BytesIO):
    def read(self, size=-1):
        if self.tell():
            print("hanging", flush=True)
            time.sleep(600)
        return super().read(1000)

class Source(BytesSource):
    def open(self, offset=0):
        return Hanging(self.data)

open_backend(sys.argv[1], {}).put("a/b", Source(bytes(5000)))
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    base = tmp_path / "base"
    base.mkdir()
    return base


@pytest.fixture
def backend(base: Path) -> StorageBackend:
    return open_backend(base.as_uri(), {})


@pytest.fixture
def hanging_put(base: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of a put."""
    command = [sys.executable, "-c", _PUT_AND_HANG, base.as_uri()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "hanging\n"
        yield process
        process.kill()


def incoming(base: Path) -> list[Path]:
    return list((base / ".incoming").iterdir())


def test_sigkill_during_a_put_leaves_nothing_under_the_key(
    base: Path, backend: StorageBackend, hanging_put: subprocess.Popen[str]
) -> None:
    hanging_put.send_signal(signal.SIGKILL)
    hanging_put.wait()
    assert keys(backend) == []
    with pytest.raises(ObjectNotFound):
        backend.stat("a/b")
    assert len(incoming(base)) == 1
    backend.put("a/b", BytesSource(b"again"))
    assert incoming(base) == []
    assert read(backend, "a/b") == b"again"


def test_the_file_of_a_living_writer_is_left_alone(
    base: Path, backend: StorageBackend, hanging_put: subprocess.Popen[str]
) -> None:
    [unfinished] = incoming(base)
    backend.put("c", BytesSource(b"1"))
    assert incoming(base) == [unfinished]
    assert keys(backend) == ["c"]


def test_the_file_of_another_host_is_left_alone_for_a_day(base: Path, backend: StorageBackend) -> None:
    backend.probe()
    recent, old = (base / ".incoming" / f"{'0' * 12}-{name}" for name in ("recent", "old"))
    for path in (recent, old):
        path.write_bytes(b"x")
    day_ago = time.time() - incoming_files.FOREIGN_STALE_SECONDS - 60
    os.utime(old, (day_ago, day_ago))
    backend.put("c", BytesSource(b"1"))
    assert incoming(base) == [recent]


def test_strangers_among_the_unfinished_do_no_harm(base: Path, backend: StorageBackend) -> None:
    backend.probe()
    (base / ".incoming" / "link").symlink_to("/etc/passwd")
    (base / ".incoming" / "directory").mkdir()
    os.mkfifo(base / ".incoming" / "fifo")
    backend.put("c", BytesSource(b"1"))
    assert keys(backend) == ["c"]


def test_a_finished_object_survives_the_cleaning_of_its_second_name(
    base: Path, backend: StorageBackend
) -> None:
    """Death between link(2) and unlink(2)."""
    backend.put("a", BytesSource(b"kept"))
    mark = incoming_files._host_mark()
    os.link(base / "a", base / ".incoming" / f"{mark}-dead")
    open_backend(base.as_uri(), {}).put("b", BytesSource(b"1"))
    assert incoming(base) == []
    assert read(backend, "a") == b"kept"


def test_a_missing_base_is_never_made(tmp_path: Path) -> None:
    base = tmp_path / "share" / "agents"
    backend = open_backend(base.as_uri(), {})
    for call in (
        backend.probe,
        lambda: backend.put("a", BytesSource(b"")),
        lambda: backend.open("a"),
        lambda: backend.stat("a"),
        lambda: keys(backend),
        lambda: backend.delete("a"),
    ):
        with pytest.raises(ContainerNotFound, match="mounted"):
            call()
    assert not base.parent.exists()


def test_a_base_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"")
    with pytest.raises(ContainerNotFound):
        open_backend((tmp_path / "base").as_uri(), {}).probe()


def test_links_are_not_followed_out_of_the_base(base: Path, backend: StorageBackend, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (base / "door").symlink_to(outside)
    (base / "key").symlink_to(outside / "secret")
    (base / "gone").symlink_to(outside / "gone")
    assert keys(backend) == []
    assert keys(backend, "door/") == []
    for key in ("door/secret", "key", "gone"):
        with pytest.raises(ObjectNotFound):
            backend.open(key)
        with pytest.raises(ObjectNotFound):
            backend.stat(key)
        with pytest.raises(StorageError):
            backend.put(key, BytesSource(b"mine"))
        backend.delete(key)
    backend.put("door.d/new", BytesSource(b"1"))
    assert sorted(path.name for path in outside.iterdir()) == ["secret"]
    assert (outside / "secret").read_bytes() == b"secret"
    assert (base / "key").is_symlink()


def test_what_is_no_regular_file_is_no_object(base: Path, backend: StorageBackend) -> None:
    os.mkfifo(base / "fifo")
    (base / "with space").write_bytes(b"")
    (base / ".hidden").write_bytes(b"")
    assert keys(backend) == []
    with pytest.raises(ObjectNotFound):
        backend.open("fifo")


def test_modes_are_the_owners_alone(base: Path, backend: StorageBackend) -> None:
    backend.put("a/b/c", BytesSource(b"1"))
    modes = {path.relative_to(base).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in base.rglob("*")}
    assert modes == {"a": 0o700, "a/b": 0o700, "a/b/c": 0o600, ".incoming": 0o700}


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.ENOSPC, StorageFull),
        (errno.EDQUOT, StorageFull),
        (errno.EACCES, Forbidden),
        (errno.EROFS, Forbidden),
        (errno.EIO, Unavailable),
        (errno.ESTALE, Unavailable),
        (errno.EFBIG, StorageError),
    ],
)
@pytest.mark.parametrize("call", ["write", "fsync", "link", "mkdir"])
def test_what_the_system_says(
    base: Path,
    backend: StorageBackend,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    code: int,
    error: type[StorageError],
) -> None:
    backend.probe()

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(StorageError, match=os.strerror(code)) as caught:
            backend.put("a/b", BytesSource(b"1"))
    assert type(caught.value) is error
    assert keys(backend) == []
    assert incoming(base) == []


def test_the_sources_own_error_is_not_taken_for_the_storages(backend: StorageBackend) -> None:
    with pytest.raises(OSError, match="on fire") as caught:
        backend.put("a", FailingSource(noise(5_000_000), fails_at=4_000_000))
    assert not isinstance(caught.value, StorageError)


def test_bytes_are_synced_before_the_name_and_the_directories_too(
    base: Path, backend: StorageBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_fsync, real_link = os.fsync, os.link

    def fsync(fd: int) -> None:
        path = str(Path(f"/proc/self/fd/{fd}").readlink())
        events.append("fsync " + path.removeprefix(str(base)).partition("-")[0])
        real_fsync(fd)

    def link(*args: str, **kwargs: int) -> None:
        events.append("link")
        real_link(*args, **kwargs)

    backend.probe()
    mark = incoming_files._host_mark()
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    backend.put("x/y/z", BytesSource(b"1"))
    assert events[-3:] == [f"fsync /.incoming/{mark}", "link", "fsync /x/y"]
    assert {"fsync ", "fsync /x"} <= set(events[:-3])


def test_a_lost_answer_of_nfs_to_link_is_a_success(
    backend: StorageBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_link = os.link

    def link(*args: str, **kwargs: int) -> None:
        real_link(*args, **kwargs)
        raise FileExistsError(errno.EEXIST, "repeated request")

    monkeypatch.setattr(os, "link", link)
    backend.put("a", BytesSource(b"1"))
    assert read(backend, "a") == b"1"


def test_a_file_system_that_can_neither_link_nor_rename_safely_is_refused(
    backend: StorageBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Libc:
        def __init__(self, *_args: object, **_kwargs: object) -> None:
            """Without renameat2."""

    def link(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(incoming_files.ctypes, "CDLL", Libc)
    with pytest.raises(StorageError, match="hard links"):
        backend.probe()
    with pytest.raises(StorageError, match="hard links"):
        backend.put("a", BytesSource(b"1"))
    assert keys(backend) == []


def test_an_object_that_shrinks_while_it_is_read_is_no_end(base: Path, backend: StorageBackend) -> None:
    backend.put("a", BytesSource(noise(1_000_000)))
    stream: BinaryIO = backend.open("a")
    with stream:
        stream.read(10)
        os.truncate(base / "a", 500_000)
        with pytest.raises(Unavailable, match="before it should"):
            stream.read()


def test_an_object_can_be_read_to_its_end_after_its_deletion(backend: StorageBackend) -> None:
    data = noise(1_000_000)
    backend.put("a", BytesSource(data))
    with backend.open("a") as stream:
        backend.delete("a")
        assert stream.read() == data


def test_putters_and_cleaners_do_not_disturb_each_other(base: Path) -> None:
    """Every backend cleans at its first put."""
    failures: list[BaseException] = []

    def put(name: int) -> None:
        try:
            for number in range(10):
                open_backend(base.as_uri(), {}).put(f"t{name}/{number}", BytesSource(b"x" * 1000))
        except BaseException as exc:  # noqa: BLE001 - reported below
            failures.append(exc)

    threads = [threading.Thread(target=put, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(keys(open_backend(base.as_uri(), {}))) == 80
    assert incoming(base) == []


def test_nothing_stays_open(backend: StorageBackend) -> None:
    backend.put("a/b", BytesSource(b"1"))
    before = open_descriptors()
    for number in range(20):
        backend.put(f"a/{number}", BytesSource(b"1"))
        backend.open("a/b").close()
        backend.stat("a/b")
        backend.delete(f"a/{number}")
        keys(backend)
        with pytest.raises(ObjectNotFound):
            backend.open("a/x/y")
    assert open_descriptors() == before


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
