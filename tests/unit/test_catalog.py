"""The catalog: at whatever moment a process died, what is listed is there, and what is latest is complete."""

from __future__ import annotations

import hashlib
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from daemon.catalog import Catalog
from daemon.durable import rename_into_place, write_file
from daemon.errors import LocalWriteError, SnapshotNotFound, UsageError
from daemon.model import (
    BundleKey,
    Consistency,
    Failure,
    SnapshotRecord,
    Upload,
    UploadState,
    new_snapshot_id,
)
from daemon.snapshots import Store

NOON_MS = 1_764_000_000_000
HOUR_MS = 3_600_000


def record(
    *,
    at_ms: int = NOON_MS,
    tenant: str = "default",
    agent_id: str = "ana",
    snapshot_id: str | None = None,
    complete: bool = True,
    data: bytes = b"the bundle",
) -> SnapshotRecord:
    return SnapshotRecord(
        key=BundleKey(tenant, agent_id, snapshot_id or new_snapshot_id(at_ms=at_ms), encrypted=False),
        created_at_ms=at_ms,
        label="before the move",
        complete=complete,
        consistency=Consistency(level="per_source", window_ms=12, attempts=5, moved=("db/x.sqlite",)),
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        content_bytes=99,
        failures=() if complete else (Failure(source="y.sqlite", reason="corrupt", hint="mend it"),),
    )


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "state" / "catalog.sqlite")


def sealed(catalog: Catalog, snapshot: SnapshotRecord, *destinations: str) -> SnapshotRecord:
    catalog.announce(snapshot, destinations)
    catalog.confirm_sealed(snapshot.snapshot_id)
    return snapshot


# --- what is there --------------------------------------------------------------------------------


def test_a_sealed_snapshot_is_listed_with_all_that_was_said_of_it(catalog: Catalog) -> None:
    for snapshot in (record(), record(at_ms=NOON_MS + 1, complete=False)):
        sealed(catalog, snapshot)
        assert catalog.find(snapshot.snapshot_id) == snapshot


def test_one_that_was_only_announced_is_nowhere_to_be_seen(catalog: Catalog) -> None:
    snapshot = record()
    catalog.announce(snapshot, ["offsite"])
    assert catalog.snapshots() == []
    assert catalog.latest("default", "ana") is None
    assert catalog.last_attempt_ms("default", "ana") is None
    assert catalog.waiting("offsite") == []
    with pytest.raises(SnapshotNotFound):
        catalog.find(snapshot.snapshot_id)


def test_they_are_listed_oldest_first_by_agent_and_tenant(catalog: Catalog) -> None:
    late = sealed(catalog, record(at_ms=NOON_MS + HOUR_MS))
    early = sealed(catalog, record(at_ms=NOON_MS))
    bob = sealed(catalog, record(at_ms=NOON_MS + 1, agent_id="bob"))
    other = sealed(catalog, record(at_ms=NOON_MS + 2, tenant="other"))
    assert catalog.snapshots() == [early, bob, other, late]
    assert catalog.snapshots(tenant="default", agent_id="ana") == [early, late]
    assert catalog.snapshots(agent_id="ana") == [early, other, late]
    assert catalog.snapshots(tenant="nobody") == []


def test_it_outlives_the_process_that_wrote_it(tmp_path: Path) -> None:
    snapshot = sealed(Catalog(tmp_path / "catalog.sqlite"), record())
    assert Catalog(tmp_path / "catalog.sqlite").snapshots() == [snapshot]


def test_it_is_private(tmp_path: Path) -> None:
    Catalog(tmp_path / "state" / "catalog.sqlite")
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "state" / "catalog.sqlite").stat().st_mode & 0o777 == 0o600


# --- latest ---------------------------------------------------------------------------------------


def test_latest_is_the_newest_complete_one_of_that_agent(catalog: Catalog) -> None:
    sealed(catalog, record(at_ms=NOON_MS))
    newest = sealed(catalog, record(at_ms=NOON_MS + HOUR_MS))
    sealed(catalog, record(at_ms=NOON_MS + 2 * HOUR_MS, complete=False))
    sealed(catalog, record(at_ms=NOON_MS + 3 * HOUR_MS, agent_id="bob"))
    sealed(catalog, record(at_ms=NOON_MS + 3 * HOUR_MS, tenant="other"))
    catalog.announce(record(at_ms=NOON_MS + 4 * HOUR_MS), [])
    assert catalog.latest("default", "ana") == newest


def test_an_incomplete_one_is_never_latest_even_if_there_is_no_other(catalog: Catalog) -> None:
    sealed(catalog, record(complete=False))
    assert catalog.latest("default", "ana") is None


def test_an_incomplete_one_is_an_attempt_all_the_same(catalog: Catalog) -> None:
    assert catalog.last_attempt_ms("default", "ana") is None
    sealed(catalog, record(at_ms=NOON_MS))
    sealed(catalog, record(at_ms=NOON_MS + 5, complete=False))
    assert catalog.last_attempt_ms("default", "ana") == NOON_MS + 5
    assert catalog.last_attempt_ms("default", "bob") is None


def test_latest_at_a_time_is_the_newest_that_is_not_after_it(catalog: Catalog) -> None:
    first, second = (sealed(catalog, record(at_ms=NOON_MS + n * HOUR_MS)) for n in (0, 1))
    assert catalog.latest("default", "ana", not_after_ms=NOON_MS - 1) is None
    assert catalog.latest("default", "ana", not_after_ms=NOON_MS) == first
    assert catalog.latest("default", "ana", not_after_ms=NOON_MS + HOUR_MS - 1) == first
    assert catalog.latest("default", "ana", not_after_ms=NOON_MS + HOUR_MS) == second


def test_of_one_millisecond_the_greater_id_is_latest(catalog: Catalog) -> None:
    snapshots = [sealed(catalog, record()) for _ in range(5)]
    latest = catalog.latest("default", "ana")
    assert latest is not None
    assert latest.snapshot_id == max(snapshot.snapshot_id for snapshot in snapshots)


# --- finding by prefix ----------------------------------------------------------------------------

SIMILAR = [f"019ab1b5-7e00-7{digit}bc-8def-0123456789ab" for digit in "abcd"]


def test_a_prefix_is_enough_if_it_fits_one(catalog: Catalog) -> None:
    for snapshot_id in SIMILAR:
        sealed(catalog, record(snapshot_id=snapshot_id))
    assert catalog.find("019ab1b5-7e00-7c").snapshot_id == SIMILAR[2]
    assert catalog.find(SIMILAR[0]).snapshot_id == SIMILAR[0]


def test_a_prefix_that_fits_several_is_ambiguous_and_names_some(catalog: Catalog) -> None:
    for snapshot_id in SIMILAR:
        sealed(catalog, record(snapshot_id=snapshot_id))
    with pytest.raises(UsageError, match="ambiguous") as caught:
        catalog.find("019ab1b5-7e00-7")
    assert SIMILAR[0] in str(caught.value)
    assert caught.value.exit_code == 64


@pytest.mark.parametrize("prefix", ["0", "019ab1b5-7e00-7e", SIMILAR[0] + "0", "%", "_" * 36, "019AB1B5"])
def test_a_prefix_that_fits_none_is_not_found(prefix: str, catalog: Catalog) -> None:
    sealed(catalog, record(snapshot_id="119ab1b5-7e00-7abc-8def-0123456789ab"))
    with pytest.raises(SnapshotNotFound, match=prefix) as caught:
        catalog.find(prefix)
    assert caught.value.exit_code == 66


def test_nothing_is_no_prefix_even_if_there_is_only_one(catalog: Catalog) -> None:
    sealed(catalog, record())
    with pytest.raises(UsageError):
        catalog.find("")


# --- the outbox -----------------------------------------------------------------------------------


def test_a_sealed_snapshot_waits_for_each_of_its_destinations(catalog: Catalog) -> None:
    late = sealed(catalog, record(at_ms=NOON_MS + 1), "offsite")
    early = sealed(catalog, record(at_ms=NOON_MS), "offsite", "nas")
    sealed(catalog, record(at_ms=NOON_MS + 2))
    assert [waiting.snapshot_id for waiting in catalog.waiting("offsite")] == [
        early.snapshot_id,
        late.snapshot_id,
    ]
    assert [waiting.snapshot_id for waiting in catalog.waiting("nas")] == [early.snapshot_id]
    assert catalog.waiting("elsewhere") == []
    assert catalog.find(early.snapshot_id).uploads == {
        "nas": Upload(UploadState.PENDING),
        "offsite": Upload(UploadState.PENDING),
    }


def test_what_is_confirmed_waits_no_longer_and_what_failed_waits_still(catalog: Catalog) -> None:
    snapshot = sealed(catalog, record(), "offsite", "nas")
    catalog.note_upload(snapshot.snapshot_id, "offsite", UploadState.CONFIRMED)
    catalog.note_upload(snapshot.snapshot_id, "nas", UploadState.FAILED, error="forbidden")
    assert catalog.waiting("offsite") == []
    assert [waiting.snapshot_id for waiting in catalog.waiting("nas")] == [snapshot.snapshot_id]


def test_every_try_is_counted_and_the_last_one_remembered(catalog: Catalog) -> None:
    snapshot = sealed(catalog, record(), "offsite")
    for error in ("timed out", "connection refused"):
        catalog.note_upload(snapshot.snapshot_id, "offsite", UploadState.PENDING, error=error)
    upload = catalog.find(snapshot.snapshot_id).uploads["offsite"]
    assert (upload.state, upload.attempts, upload.last_error) == (
        UploadState.PENDING,
        2,
        "connection refused",
    )
    assert upload.updated_at_ms > NOON_MS
    catalog.note_upload(snapshot.snapshot_id, "offsite", UploadState.CONFIRMED)
    upload = catalog.find(snapshot.snapshot_id).uploads["offsite"]
    assert (upload.state, upload.attempts, upload.last_error) == (UploadState.CONFIRMED, 3, None)


def test_a_resume_token_is_kept_until_the_upload_is_confirmed(catalog: Catalog) -> None:
    snapshot = sealed(catalog, record(), "offsite", "nas")
    catalog.keep_resume_token(snapshot.snapshot_id, "offsite", "part 7")
    catalog.note_upload(snapshot.snapshot_id, "offsite", UploadState.PENDING, error="timed out")
    uploads = catalog.find(snapshot.snapshot_id).uploads
    assert (uploads["offsite"].resume_token, uploads["nas"].resume_token) == ("part 7", None)
    catalog.note_upload(snapshot.snapshot_id, "offsite", UploadState.CONFIRMED)
    assert catalog.find(snapshot.snapshot_id).uploads["offsite"].resume_token is None


def test_an_upload_to_a_destination_that_came_later_is_noted_too(catalog: Catalog) -> None:
    snapshot = sealed(catalog, record())
    catalog.note_upload(snapshot.snapshot_id, "offsite", UploadState.CONFIRMED)
    upload = catalog.find(snapshot.snapshot_id).uploads["offsite"]
    assert (upload.state, upload.attempts) == (UploadState.CONFIRMED, 1)


def test_an_upload_of_what_nobody_announced_is_not_noted(catalog: Catalog) -> None:
    with pytest.raises(LocalWriteError):
        catalog.note_upload(new_snapshot_id(), "offsite", UploadState.CONFIRMED)


# --- crashes --------------------------------------------------------------------------------------

BUNDLE = b"the bundle"


def _nothing(store: Store, snapshot: SnapshotRecord) -> None:
    """It died before anything."""


def _announced(store: Store, snapshot: SnapshotRecord) -> None:
    store.catalog.announce(snapshot, ["offsite"])


def _with_sibling(store: Store, snapshot: SnapshotRecord) -> None:
    _announced(store, snapshot)
    path = store.path_of(snapshot.key)
    path.parent.mkdir(parents=True)
    write_file(path.with_name(path.name + ".sha256"), b"...")


def _in_place(store: Store, snapshot: SnapshotRecord) -> None:
    _with_sibling(store, snapshot)
    (store.scratch / "bundle").write_bytes(BUNDLE)
    rename_into_place(store.scratch / "bundle", store.path_of(snapshot.key))


def _confirmed(store: Store, snapshot: SnapshotRecord) -> None:
    _in_place(store, snapshot)
    store.catalog.confirm_sealed(snapshot.snapshot_id)


def _torn(store: Store, snapshot: SnapshotRecord) -> None:
    """What durable.py rules out, and a damaged disk does not."""
    _with_sibling(store, snapshot)
    store.path_of(snapshot.key).write_bytes(BUNDLE[:5])


@pytest.mark.parametrize(
    ("crash", "survives"),
    [
        (_nothing, False),
        (_announced, False),
        (_with_sibling, False),
        (_torn, False),
        (_in_place, True),
        (_confirmed, True),
    ],
)
def test_whatever_moment_it_died_there_is_a_whole_snapshot_or_none(
    crash: Callable[[Store, SnapshotRecord], None], survives: bool, tmp_path: Path
) -> None:
    store = Store(tmp_path / "state")
    before = sealed(store.catalog, record(at_ms=NOON_MS - HOUR_MS))
    snapshot = record(data=BUNDLE)
    crash(store, snapshot)

    again = Store(tmp_path / "state")
    with again.locked_agent("default", "ana"):
        pass

    expected = [before.snapshot_id, snapshot.snapshot_id] if survives else [before.snapshot_id]
    assert [found.snapshot_id for found in again.catalog.snapshots()] == expected
    latest = again.catalog.latest("default", "ana")
    assert latest is not None
    assert latest.snapshot_id == expected[-1]
    waiting = [found.snapshot_id for found in again.catalog.waiting("offsite")]
    assert waiting == ([snapshot.snapshot_id] if survives else [])
    path = again.path_of(snapshot.key)
    assert path.with_name(path.name + ".sha256").exists() == survives


def test_what_another_agent_announced_is_left_alone(tmp_path: Path) -> None:
    """It may be at it right now: only its own lock tells."""
    store = Store(tmp_path / "state")
    theirs = record(agent_id="bob")
    store.catalog.announce(theirs, [])
    with store.locked_agent("default", "ana"):
        pass
    store.catalog.confirm_sealed(theirs.snapshot_id)
    assert store.catalog.snapshots() == [theirs]


def test_an_announcement_that_fails_leaves_nothing_of_it(catalog: Catalog) -> None:
    snapshot = record()
    with pytest.raises(LocalWriteError):
        catalog.announce(snapshot, ["offsite", "offsite"])
    sealed(catalog, snapshot, "offsite")
    assert catalog.find(snapshot.snapshot_id).uploads == {"offsite": Upload(UploadState.PENDING)}


# --- the file itself ------------------------------------------------------------------------------


def test_a_damaged_catalog_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    path.write_bytes(b"this is no database, and it is long enough to be seen as none" * 20)
    with pytest.raises(LocalWriteError, match="cannot be used") as caught:
        Catalog(path)
    assert "bundles are not touched" in caught.value.hint
    assert path.read_bytes().startswith(b"this is no database")


def test_a_catalog_of_a_newer_agentkeep_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    Catalog(path)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(LocalWriteError, match="newer agentkeep"):
        Catalog(path)


def test_a_directory_in_its_place_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "catalog.sqlite").mkdir()
    with pytest.raises(LocalWriteError):
        Catalog(tmp_path / "catalog.sqlite")


# --- several processes ----------------------------------------------------------------------------

_WRITER = """
import sys
from pathlib import Path
from daemon.catalog import Catalog
from daemon.model import *

path, tenant, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
catalog = Catalog(path)
for number in range(count):
    key = BundleKey(tenant, "ana", new_snapshot_id(), encrypted=False)
    cut = Consistency(level="point_in_time", window_ms=1, attempts=1)
    catalog.announce(SnapshotRecord(key, number, None, True, cut, 1, "0" * 64, 1), ["offsite"])
    catalog.confirm_sealed(key.snapshot_id)
    catalog.note_upload(key.snapshot_id, "offsite", UploadState.CONFIRMED)
    assert catalog.latest(tenant, "ana").created_at_ms == number
"""


def test_processes_that_make_and_write_it_at_once_lose_nothing(tmp_path: Path) -> None:
    path, count = tmp_path / "catalog.sqlite", 10
    tenants = ["one", "two", "three", "four"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path), tenant, str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for tenant in tenants
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    for process in processes:
        process.communicate(b"go\n")
    assert [process.returncode for process in processes] == [0] * len(tenants)
    catalog = Catalog(path)
    for tenant in tenants:
        assert [found.created_at_ms for found in catalog.snapshots(tenant=tenant)] == list(range(count))
    assert catalog.waiting("offsite") == []


def test_a_catalog_of_the_first_version_becomes_one_of_today_and_keeps_what_it_knew(
    catalog: Catalog, tmp_path: Path
) -> None:
    known = catalog.find(sealed(catalog, record(), "offsite").snapshot_id)
    path = tmp_path / "state" / "catalog.sqlite"
    with sqlite3.connect(path) as db:
        for column in ("fingerprint", "unchanged_at_ms"):
            db.execute(f"ALTER TABLE snapshots DROP COLUMN {column}")
        db.execute("PRAGMA user_version = 1")
    upgraded = Catalog(path)
    (found,) = upgraded.snapshots()
    assert (found.key, found.uploads) == (known.key, known.uploads)
    assert (found.fingerprint, found.unchanged_at_ms) == (None, None)
    upgraded.note_unchanged(found.snapshot_id, at_ms=NOON_MS + HOUR_MS)
    (found,) = upgraded.snapshots()
    assert found.unchanged_at_ms == NOON_MS + HOUR_MS
    assert upgraded.last_attempt_ms("default", "ana") == NOON_MS + HOUR_MS
    assert upgraded.latest("default", "ana", not_after_ms=NOON_MS) == found
