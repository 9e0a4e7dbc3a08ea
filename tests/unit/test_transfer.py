"""Upload puts the bundle last and overwrites nothing; export leaves a proven bundle or nothing at all."""

from __future__ import annotations

import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pytest

from daemon.destinations import Destination, translating_storage_errors
from daemon.errors import (
    AgentkeepError,
    BusyError,
    ConfigError,
    IntegrityError,
    LocalWriteError,
    RefusedError,
    SiblingMismatch,
    SiblingMissing,
    SnapshotNotFound,
    StorageUnavailable,
    UsageError,
)
from daemon.locate import LocalBundle, Places, located
from daemon.model import SnapshotRecord, UploadState
from daemon.transfer import drain_outbox, export, upload
from storage_backends import (
    ContainerNotFound,
    Corrupted,
    Forbidden,
    InvalidDestination,
    InvalidKey,
    ObjectNotFound,
    StorageError,
    StorageFull,
    Unavailable,
)
from tests.property.honest import Piece, Sealed, place, seal
from tests.property.shelf import HOUR_MS, NOON_MS, Shelf, backend_of, store_object, stored

NOISE = os.urandom(3 << 20)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


@pytest.fixture(params=["memory", "directory"])
def offsite(request: pytest.FixtureRequest, shelf: Shelf) -> Destination:
    return shelf.memory("offsite") if request.param == "memory" else shelf.directory("offsite")


def state_of(shelf: Shelf, record: SnapshotRecord, destination: str = "offsite") -> UploadState:
    return shelf.store.catalog.find(record.snapshot_id).uploads[destination].state


# --- upload ---------------------------------------------------------------------------------------


def test_bundle_and_sibling_arrive_as_they_are_and_are_confirmed(shelf: Shelf, offsite: Destination) -> None:
    record = shelf.put(to=[offsite])
    upload(shelf.store, record, offsite)
    path = shelf.store.path_of(record.key)
    assert stored(offsite) == {
        str(record.key): path.read_bytes(),
        record.key.sibling: path.with_name(path.name + ".sha256").read_bytes(),
    }
    assert state_of(shelf, record) == UploadState.CONFIRMED


def test_the_sibling_is_there_before_the_bundle(shelf: Shelf, offsite: Destination) -> None:
    record = shelf.put(data=NOISE)
    upload(shelf.store, record, offsite)
    backend = backend_of(offsite)
    sibling, bundle = backend.stat(record.key.sibling), backend.stat(str(record.key))
    assert sibling.modified_at < bundle.modified_at


def test_uploading_again_what_is_there_already_is_success(shelf: Shelf, offsite: Destination) -> None:
    record = shelf.put(to=[offsite])
    upload(shelf.store, record, offsite)
    before = stored(offsite)
    upload(shelf.store, record, offsite)
    assert stored(offsite) == before
    assert state_of(shelf, record) == UploadState.CONFIRMED


def test_an_upload_that_stopped_between_the_two_is_finished(shelf: Shelf, offsite: Destination) -> None:
    record = shelf.put(to=[offsite])
    path = shelf.store.path_of(record.key)
    store_object(offsite, record.key.sibling, path.with_name(path.name + ".sha256").read_bytes())
    upload(shelf.store, record, offsite)
    assert stored(offsite)[str(record.key)] == path.read_bytes()


@pytest.mark.parametrize("same_length", [True, False])
@pytest.mark.parametrize("which", ["bundle", "sibling"])
def test_another_object_under_the_name_is_an_error_and_stays(
    which: str, same_length: bool, shelf: Shelf, offsite: Destination
) -> None:
    record = shelf.put(to=[offsite])
    key = str(record.key) if which == "bundle" else record.key.sibling
    path = shelf.store.path_of(record.key)
    ours = path.read_bytes() if which == "bundle" else path.with_name(path.name + ".sha256").read_bytes()
    theirs = ours[:-1] + b"!" if same_length else b"theirs"
    store_object(offsite, key, theirs)

    with pytest.raises(IntegrityError, match="another object is stored") as caught:
        upload(shelf.store, record, offsite)

    assert caught.value.exit_code == 65
    assert stored(offsite)[key] == theirs
    assert (str(record.key) in stored(offsite)) == (which == "bundle")
    assert state_of(shelf, record) == UploadState.FAILED
    assert [waiting.snapshot_id for waiting in shelf.store.catalog.waiting("offsite")] == [record.snapshot_id]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:-1] + b"!"], ids=["cut", "flip"]
)
def test_a_bundle_that_rotted_on_this_disk_does_not_get_its_name_at_the_destination(
    damage: Callable[[bytes], bytes], shelf: Shelf, offsite: Destination
) -> None:
    record = shelf.put(to=[offsite])
    path = shelf.store.path_of(record.key)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(IntegrityError):
        upload(shelf.store, record, offsite)
    assert str(record.key) not in stored(offsite)
    assert state_of(shelf, record) == UploadState.FAILED


def test_a_bundle_that_is_gone_is_named(shelf: Shelf, offsite: Destination) -> None:
    record = shelf.put(to=[offsite])
    shelf.forget_local(record)
    with pytest.raises(SnapshotNotFound, match=record.snapshot_id):
        upload(shelf.store, record, offsite)
    assert stored(offsite) == {}
    assert state_of(shelf, record) == UploadState.FAILED


def test_a_destination_that_is_down_leaves_the_upload_pending(shelf: Shelf) -> None:
    down = shelf.missing_directory("offsite")
    record = shelf.put(to=[down])
    with pytest.raises(StorageUnavailable) as caught:
        upload(shelf.store, record, down)
    assert caught.value.exit_code == 69
    assert state_of(shelf, record) == UploadState.PENDING
    assert "offsite" in str(shelf.store.catalog.find(record.snapshot_id).uploads["offsite"].last_error)


# --- the outbox -----------------------------------------------------------------------------------


def test_draining_sends_what_waits_oldest_first_and_then_nothing(shelf: Shelf, offsite: Destination) -> None:
    late, early, unasked = (
        shelf.put(at_ms=NOON_MS + HOUR_MS, to=[offsite]),
        shelf.put(at_ms=NOON_MS, to=[offsite]),
        shelf.put(at_ms=NOON_MS - HOUR_MS),
    )
    report = drain_outbox(shelf.store, [offsite])
    assert report.confirmed == [(early.snapshot_id, "offsite"), (late.snapshot_id, "offsite")]
    assert report.failed == []
    assert str(unasked.key) not in stored(offsite)
    assert drain_outbox(shelf.store, [offsite]).confirmed == []


def test_one_snapshot_alone_can_be_sent(shelf: Shelf, offsite: Destination) -> None:
    first, second = (shelf.put(at_ms=NOON_MS + hour * HOUR_MS, to=[offsite]) for hour in (0, 1))
    report = drain_outbox(shelf.store, [offsite], only=second.snapshot_id)
    assert report.confirmed == [(second.snapshot_id, "offsite")]
    assert state_of(shelf, first) == UploadState.PENDING


def test_a_dead_destination_holds_up_no_other(shelf: Shelf) -> None:
    down, nas = shelf.missing_directory("down"), shelf.directory("nas")
    records = [shelf.put(at_ms=NOON_MS + hour * HOUR_MS, to=[down, nas]) for hour in (0, 1)]
    report = drain_outbox(shelf.store, [down, nas])
    assert report.confirmed == [(record.snapshot_id, "nas") for record in records]
    assert [(snapshot, name) for snapshot, name, _ in report.failed] == [(records[0].snapshot_id, "down")]
    assert len(shelf.store.catalog.waiting("down")) == 2


def test_a_bundle_that_is_refused_holds_up_no_other(shelf: Shelf, offsite: Destination) -> None:
    stuck, gone, fine = (shelf.put(at_ms=NOON_MS + hour * HOUR_MS, to=[offsite]) for hour in range(3))
    store_object(offsite, str(stuck.key), b"theirs")
    shelf.forget_local(gone)
    report = drain_outbox(shelf.store, [offsite])
    assert report.confirmed == [(fine.snapshot_id, "offsite")]
    assert [(snapshot, type(error)) for snapshot, _, error in report.failed] == [
        (stuck.snapshot_id, IntegrityError),
        (gone.snapshot_id, SnapshotNotFound),
    ]


def test_draining_stops_between_two_bundles_when_it_is_told_to(shelf: Shelf, offsite: Destination) -> None:
    records = [shelf.put(at_ms=NOON_MS + hour * HOUR_MS, to=[offsite]) for hour in range(3)]
    report = drain_outbox(
        shelf.store, [offsite], should_stop=lambda: state_of(shelf, records[0]) == UploadState.CONFIRMED
    )
    assert report.confirmed == [(records[0].snapshot_id, "offsite")]
    assert report.failed == []


def test_two_do_not_send_to_one_destination_at_once(shelf: Shelf, offsite: Destination) -> None:
    record = shelf.put(to=[offsite])
    with shelf.store.locked_destination("offsite", timeout_seconds=0):
        report = drain_outbox(shelf.store, [offsite])
    assert [type(error) for _, _, error in report.failed] == [BusyError]
    assert stored(offsite) == {}
    assert state_of(shelf, record) == UploadState.PENDING


def test_what_another_process_sent_meanwhile_is_not_sent_again(shelf: Shelf, offsite: Destination) -> None:
    record = shelf.put(to=[offsite])

    def another_process() -> bool:
        upload(shelf.store, record, offsite)
        return False

    report = drain_outbox(shelf.store, [offsite], should_stop=another_process)
    assert report.confirmed == [(record.snapshot_id, "offsite")]
    assert shelf.store.catalog.find(record.snapshot_id).uploads["offsite"].attempts == 1


STORAGE_ERRORS: list[tuple[type[StorageError], type[AgentkeepError], int]] = [
    (ObjectNotFound, SnapshotNotFound, 66),
    (InvalidKey, SnapshotNotFound, 66),
    (Forbidden, RefusedError, 77),
    (ContainerNotFound, StorageUnavailable, 69),
    (StorageFull, StorageUnavailable, 69),
    (Unavailable, StorageUnavailable, 69),
    (StorageError, StorageUnavailable, 69),
    (Corrupted, IntegrityError, 65),
    (InvalidDestination, ConfigError, 78),
]


@pytest.mark.parametrize(("theirs", "ours", "exit_code"), STORAGE_ERRORS)
def test_what_a_backend_raises_is_told_as_one_of_ours(
    theirs: type[StorageError], ours: type[AgentkeepError], exit_code: int
) -> None:
    with pytest.raises(AgentkeepError) as caught, translating_storage_errors("offsite"):
        raise theirs("what happened")
    assert type(caught.value) is ours
    assert caught.value.exit_code == exit_code
    assert str(caught.value) == "offsite: what happened"
    assert isinstance(caught.value.__cause__, theirs)


# --- export: where to -----------------------------------------------------------------------------


@pytest.fixture
def sealed() -> Sealed:
    return seal([Piece("files/noise", NOISE)])


@pytest.fixture
def bundle(sealed: Sealed, tmp_path: Path) -> LocalBundle:
    (tmp_path / "shelf").mkdir()
    return sealed.placed(tmp_path / "shelf")


def files_below(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def check_with_sha256sum(path: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "--quiet", path.name + ".sha256"]
    subprocess.run(command, cwd=path.parent, check=True)


def test_a_directory_takes_it_under_its_own_name(bundle: LocalBundle, sealed: Sealed, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    path = export(bundle, out)
    assert path == out / sealed.key.file_name
    assert path.read_bytes() == sealed.data
    assert files_below(out) == [path.name, path.name + ".sha256"]
    check_with_sha256sum(path)


@pytest.mark.parametrize("target", ["renamed.tar.zst", "a/b/c/renamed", "no-suffix"])
def test_anything_else_is_its_name_and_parents_are_made(
    target: str, bundle: LocalBundle, sealed: Sealed, tmp_path: Path
) -> None:
    path = export(bundle, tmp_path / "out" / target)
    assert path == tmp_path / "out" / target
    assert path.read_bytes() == sealed.data
    assert files_below(path.parent) == [path.name, path.name + ".sha256"]
    check_with_sha256sum(path)


def test_a_link_to_a_directory_is_one(bundle: LocalBundle, sealed: Sealed, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    export(bundle, tmp_path / "link")
    assert (tmp_path / "real" / sealed.key.file_name).read_bytes() == sealed.data


def test_it_comes_from_a_destination_as_from_here(shelf: Shelf, offsite: Destination, tmp_path: Path) -> None:
    record = shelf.put(data=NOISE)
    shelf.upload(record, offsite)
    told: list[int] = []
    with located(f"{offsite.url}/{record.key}", Places(None, {}, ())) as remote:
        path = export(remote, tmp_path / "out" / "copy.tar.zst", progress=told.append)
    assert path.read_bytes() == shelf.store.path_of(record.key).read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    assert told == sorted(told)
    assert told[-1] == record.size_bytes
    check_with_sha256sum(path)


@pytest.mark.parametrize("name", ["two words", "café.tar.zst", "new\nline", "back\\slash"])
def test_a_name_that_its_sibling_could_not_hold_is_a_mistake(
    name: str, bundle: LocalBundle, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="cannot be a bundle's name"):
        export(bundle, tmp_path / "out" / name)
    assert not (tmp_path / "out").exists()


def test_exporting_again_changes_nothing_and_brings_the_sibling_back(
    bundle: LocalBundle, tmp_path: Path
) -> None:
    path = export(bundle, tmp_path / "out" / "copy")
    before = path.stat()
    path.with_name("copy.sha256").unlink()
    assert export(bundle, path) == path
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    check_with_sha256sum(path)


# --- export: what goes wrong ----------------------------------------------------------------------


def test_something_else_that_is_there_already_stays(bundle: LocalBundle, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    target.write_text("mine")
    with pytest.raises(RefusedError, match="something else") as caught:
        export(bundle, target)
    assert caught.value.exit_code == 77
    assert target.read_text() == "mine"
    assert not target.with_name("copy.sha256").exists()


def test_a_directory_or_a_link_in_its_place_stays(
    bundle: LocalBundle, sealed: Sealed, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / sealed.key.file_name / "inside").mkdir(parents=True)
    with pytest.raises(RefusedError):
        export(bundle, out)
    (out / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RefusedError):
        export(bundle, out / "link")
    assert (out / "link").is_symlink()
    assert not (tmp_path / "nowhere").exists()


def test_whoever_takes_the_name_meanwhile_keeps_it(bundle: LocalBundle, tmp_path: Path) -> None:
    target = tmp_path / "copy"

    def take_it(_: int) -> None:
        target.write_text("theirs")

    with pytest.raises(RefusedError, match="appeared meanwhile"):
        export(bundle, target, progress=take_it)
    assert target.read_text() == "theirs"


def test_a_parent_that_is_a_file_is_an_error_of_writing(bundle: LocalBundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LocalWriteError) as caught:
        export(bundle, tmp_path / "file" / "below" / "copy")
    assert caught.value.exit_code == 73


@contextmanager
def files_no_larger_than(size_bytes: int) -> Iterator[None]:
    """A full disk, as far as one file is concerned."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@dataclass(slots=True)
class Breaking(LocalBundle):
    """A bundle whose line goes dead in the middle."""

    def open(self) -> BinaryIO:
        class Stream(io.BytesIO):
            def read(self, size: int | None = -1, /) -> bytes:
                if self.tell() > 1 << 20:
                    raise StorageUnavailable("the line went dead")
                return super().read(size)

        return Stream(self.path.read_bytes())


def _unlink(bundle: LocalBundle) -> LocalBundle:
    bundle.path.unlink()
    return bundle


def _without_sibling(bundle: LocalBundle) -> LocalBundle:
    bundle.path.with_name(bundle.path.name + ".sha256").unlink()
    return bundle


def _with_another_sibling(bundle: LocalBundle) -> LocalBundle:
    path = bundle.path.with_name(bundle.path.name + ".sha256")
    path.write_text("0" * 64 + path.read_text()[64:])
    return bundle


def _with_a_sibling_of_another_form(bundle: LocalBundle) -> LocalBundle:
    path = bundle.path.with_name(bundle.path.name + ".sha256")
    path.write_text(path.read_text().replace("  ", " *"))
    return bundle


def _flipped(bundle: LocalBundle) -> LocalBundle:
    data = bytearray(bundle.path.read_bytes())
    data[-1] ^= 1
    bundle.path.write_bytes(data)
    return bundle


def _cut(bundle: LocalBundle) -> LocalBundle:
    bundle.path.write_bytes(bundle.path.read_bytes()[:-1])
    return bundle


def _lengthened(bundle: LocalBundle) -> LocalBundle:
    bundle.path.write_bytes(bundle.path.read_bytes() + b"\0")
    return bundle


FAULTS: list[tuple[Callable[[LocalBundle], LocalBundle], type[AgentkeepError], int]] = [
    (_unlink, SnapshotNotFound, 66),
    (_without_sibling, SiblingMissing, 65),
    (_with_another_sibling, SiblingMismatch, 65),
    (_with_a_sibling_of_another_form, SiblingMismatch, 65),
    (_flipped, SiblingMismatch, 65),
    (_cut, SiblingMismatch, 65),
    (_lengthened, SiblingMismatch, 65),
    (lambda bundle: Breaking(bundle.path), StorageUnavailable, 69),
]


@pytest.mark.parametrize(
    ("fault", "expected", "exit_code"),
    FAULTS,
    ids=["gone", "no sibling", "other sibling", "odd sibling", "flipped", "cut", "longer", "dead line"],
)
@pytest.mark.parametrize("to_directory", [True, False], ids=["to a directory", "to a name"])
def test_each_fault_has_its_error_and_leaves_nothing(
    fault: Callable[[LocalBundle], LocalBundle],
    expected: type[AgentkeepError],
    exit_code: int,
    to_directory: bool,
    bundle: LocalBundle,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(expected) as caught:
        export(fault(bundle), out if to_directory else out / "copy")
    assert type(caught.value) is expected
    assert caught.value.exit_code == exit_code
    assert files_below(out) == []


@pytest.mark.parametrize("room_bytes", [0, 10, 1 << 20, (3 << 20) - 1])
def test_a_full_disk_leaves_nothing(room_bytes: int, bundle: LocalBundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with files_no_larger_than(room_bytes), pytest.raises(LocalWriteError) as caught:
        export(bundle, out)
    assert caught.value.exit_code == 73
    assert files_below(out) == []
    export(bundle, out)
    assert len(files_below(out)) == 2


def test_two_exports_to_one_name_do_not_mix(bundle: LocalBundle, sealed: Sealed, tmp_path: Path) -> None:
    target = tmp_path / "out" / "copy"
    errors: list[AgentkeepError] = []

    def export_too(_: int) -> None:
        with pytest.raises(BusyError) as caught:
            export(bundle, target)
        errors.append(caught.value)

    export(bundle, target, progress=export_too)
    assert errors
    assert errors[0].exit_code == 75
    assert target.read_bytes() == sealed.data
    assert files_below(target.parent) == ["copy", "copy.sha256"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from daemon.locate import LocalBundle
from daemon.transfer import export
die = lambda _: os.kill(os.getpid(), signal.SIGKILL)
export(LocalBundle(Path(sys.argv[1])), Path(sys.argv[2]), progress=die)
"""


def test_an_export_that_was_killed_leaves_no_final_name_and_is_made_good_by_the_next(
    bundle: LocalBundle, sealed: Sealed, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    killed = subprocess.run([sys.executable, "-c", _KILLED, bundle.path, out / "copy"], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = files_below(out)
    assert left
    assert not {"copy", "copy.sha256"} & set(left)

    export(bundle, out / "copy")
    assert files_below(out) == ["copy", "copy.sha256"]
    assert (out / "copy").read_bytes() == sealed.data


def test_an_empty_bundle_is_exported_like_any_other(tmp_path: Path) -> None:
    """Whether it is one is for verify to say: export promises what the sibling promises."""
    (tmp_path / "shelf").mkdir()
    path = export(place(tmp_path / "shelf", b""), tmp_path / "copy")
    assert path.read_bytes() == b""
    check_with_sha256sum(path)
