"""Whatever a user types names one bundle, or says why it does not; nothing is guessed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemon.bundle.sibling import MAX_SIBLING_BYTES
from daemon.errors import (
    AgentkeepError,
    ConfigError,
    SiblingMismatch,
    SiblingMissing,
    SnapshotNotFound,
    StorageUnavailable,
    UsageError,
)
from daemon.locate import Bundle, LocalBundle, Places, located
from daemon.model import BundleKey, SnapshotRecord, new_snapshot_id
from daemon.verify import read_manifest
from tests.property.honest import KeyPair
from tests.property.shelf import HOUR_MS, NOON_MS, Shelf, store_object

NOWHERE = Places(None, {}, ())


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


@pytest.fixture
def host_in_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Put this host into a time zone."""

    def put(zone: str) -> None:
        monkeypatch.setenv("TZ", zone)
        time.tzset()

    yield put
    monkeypatch.undo()
    time.tzset()


def found(name: str, places: Places, *, agent_id: str | None = None) -> tuple[str, str, str]:
    """What a name leads to: where, under which key, and the digest of its bytes."""
    with located(name, places, agent_id=agent_id, is_complete=is_complete) as bundle:
        where = "here" if isinstance(bundle, LocalBundle) else bundle.name.partition(": ")[0]
        with bundle.open() as stream:
            return where, str(bundle.key), hashlib.sha256(stream.read()).hexdigest()


def is_complete(bundle: Bundle) -> bool:
    return read_manifest(bundle).complete


def at(where: str, record: SnapshotRecord) -> tuple[str, str, str]:
    return where, str(record.key), record.sha256


# --- ids, prefixes, keys --------------------------------------------------------------------------


def test_an_id_a_prefix_of_it_and_a_key_lead_to_the_local_copy(shelf: Shelf) -> None:
    offsite = shelf.memory("offsite")
    record = shelf.put(at_ms=NOON_MS)
    shelf.put(at_ms=NOON_MS + 100 * HOUR_MS)
    shelf.upload(record, offsite)
    for name in (record.snapshot_id, record.snapshot_id[:13], str(record.key)):
        assert found(name, shelf.places) == at("here", record)


def test_what_is_no_longer_here_is_found_at_a_destination(shelf: Shelf) -> None:
    shelf.memory("empty")
    nas = shelf.directory("nas")
    record = shelf.put()
    shelf.upload(record, nas)
    shelf.forget_local(record)
    for name in (record.snapshot_id, record.snapshot_id[:13], str(record.key)):
        assert found(name, shelf.places) == at("nas", record)


def test_the_first_destination_that_has_it_is_taken(shelf: Shelf) -> None:
    one, two = shelf.memory("one"), shelf.memory("two")
    record = shelf.put()
    shelf.upload(record, two, one)
    assert found(str(record.key), shelf.elsewhere) == at("one", record)


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_a_whole_id_of_a_configured_agent_is_found_though_this_host_never_saw_it(
    encrypted: bool, shelf: Shelf, keys: KeyPair
) -> None:
    offsite = shelf.memory("offsite")
    shelf.agents = [("default", "ana"), ("other", "bob")]
    record = shelf.put(tenant="other", agent_id="bob", recipients=keys.recipients if encrypted else [])
    shelf.upload(record, offsite)
    assert found(record.snapshot_id, shelf.elsewhere) == at("offsite", record)


def test_a_prefix_alone_is_not_searched_for_elsewhere(shelf: Shelf) -> None:
    offsite = shelf.memory("offsite")
    record = shelf.put()
    shelf.upload(record, offsite)
    with pytest.raises(SnapshotNotFound, match=record.snapshot_id[:13]):
        found(record.snapshot_id[:13], shelf.elsewhere)


def test_a_destination_that_is_down_does_not_hide_what_the_next_one_has(shelf: Shelf) -> None:
    shelf.missing_directory("nas")
    offsite = shelf.memory("offsite")
    record = shelf.put()
    shelf.upload(record, offsite)
    for name in (record.snapshot_id, str(record.key)):
        assert found(name, shelf.elsewhere) == at("offsite", record)


def test_a_destination_that_is_down_is_no_proof_that_there_is_nothing(shelf: Shelf) -> None:
    shelf.memory("offsite")
    shelf.missing_directory("nas")
    for name in (new_snapshot_id(), str(BundleKey("default", "ana", new_snapshot_id(), encrypted=False))):
        with pytest.raises(StorageUnavailable, match="nas"):
            found(name, shelf.places)


def test_an_unknown_id_and_an_unknown_key_are_not_found(shelf: Shelf) -> None:
    shelf.memory("offsite")
    unknown = new_snapshot_id()
    with pytest.raises(SnapshotNotFound, match=unknown) as caught:
        found(unknown, shelf.places)
    assert caught.value.exit_code == 66
    key = BundleKey("default", "ana", unknown, encrypted=False)
    with pytest.raises(SnapshotNotFound, match=r"looked at: this host, offsite"):
        found(str(key), shelf.places)
    with pytest.raises(SnapshotNotFound, match="nowhere"):
        found(str(key), NOWHERE)


def test_an_ambiguous_prefix_is_not_guessed_at(shelf: Shelf) -> None:
    for _ in range(2):
        shelf.put(at_ms=NOON_MS)
    with pytest.raises(UsageError, match="ambiguous"):
        found(shelf.store.catalog.snapshots()[0].snapshot_id[:13], shelf.places)


def test_an_empty_name_is_a_mistake_and_not_the_only_snapshot(shelf: Shelf) -> None:
    shelf.put()
    with pytest.raises(UsageError):
        found("", shelf.places)


def test_without_a_configuration_an_id_names_nothing() -> None:
    with pytest.raises(UsageError, match="without a configuration"):
        found(new_snapshot_id(), NOWHERE)


# --- latest ---------------------------------------------------------------------------------------


def test_latest_is_the_newest_complete_one(shelf: Shelf) -> None:
    shelf.put(at_ms=NOON_MS)
    newest = shelf.put(at_ms=NOON_MS + HOUR_MS)
    shelf.put(at_ms=NOON_MS + 2 * HOUR_MS, complete=False)
    assert found("latest", shelf.places) == at("here", newest)


@pytest.mark.parametrize(
    "moment",
    [
        "2025-11-24T16:00Z",
        "2025-11-24T16:00:00",
        "2025-11-24 16:59",
        "2025-11-24T17:59+01:00",
        "2025-11-24T16:00:00.000Z",
    ],
)
@pytest.mark.parametrize("zone", ["UTC", "XYZ+5"])
def test_latest_at_a_time_is_the_newest_that_is_not_after_it(
    zone: str, moment: str, shelf: Shelf, host_in_zone: Callable[[str], None]
) -> None:
    """A time without a zone is in UTC, as the times that `list` shows."""
    assert NOON_MS == 1_764_000_000_000, "which is 2025-11-24T16:00Z"
    host_in_zone(zone)
    before = shelf.put(at_ms=NOON_MS)
    shelf.put(at_ms=NOON_MS + HOUR_MS)
    assert found(f"latest@{moment}", shelf.places) == at("here", before)


def test_latest_at_a_day_is_as_of_its_first_moment(shelf: Shelf) -> None:
    shelf.put(at_ms=NOON_MS)
    before = shelf.put(at_ms=NOON_MS - 24 * HOUR_MS)
    assert found("latest@2025-11-24", shelf.places) == at("here", before)


def test_before_the_first_snapshot_there_is_no_latest(shelf: Shelf) -> None:
    shelf.put(at_ms=NOON_MS)
    with pytest.raises(SnapshotNotFound, match="2025-11-24T15:59:00Z"):
        found("latest@2025-11-24T15:59Z", shelf.places)


@pytest.mark.parametrize("moment", ["", "yesterday", "2025-13-01", "10:00", "2025-11-24T25:00Z"])
def test_a_time_that_is_none_is_a_mistake(moment: str, shelf: Shelf) -> None:
    shelf.put()
    with pytest.raises(UsageError, match="not a time"):
        found(f"latest@{moment}", shelf.places)


def test_an_incomplete_snapshot_is_not_latest_and_none_is_looked_for_elsewhere(shelf: Shelf) -> None:
    """Its host knows what it took; what lies at a destination is no newer."""
    shelf.missing_directory("nas")
    shelf.put(complete=False)
    with pytest.raises(SnapshotNotFound, match="no complete snapshot"):
        found("latest", shelf.places)


def test_of_several_agents_one_has_to_be_named(shelf: Shelf) -> None:
    shelf.agents = [("default", "ana"), ("default", "bob")]
    shelf.put()
    bob = shelf.put(agent_id="bob")
    assert found("latest", shelf.places, agent_id="bob") == at("here", bob)
    with pytest.raises(UsageError, match="which agent"):
        found("latest", shelf.places)


def test_without_agents_there_is_no_latest(shelf: Shelf) -> None:
    shelf.agents = []
    for places in (NOWHERE, shelf.places):
        with pytest.raises(UsageError, match="needs a configuration"):
            found("latest", places)


def test_on_a_new_host_latest_is_the_newest_complete_one_at_any_destination(shelf: Shelf) -> None:
    one, two = shelf.memory("one"), shelf.directory("two")
    old, older, newest, incomplete, bobs = (
        shelf.put(at_ms=NOON_MS + 2 * HOUR_MS),
        shelf.put(at_ms=NOON_MS),
        shelf.put(at_ms=NOON_MS + 3 * HOUR_MS),
        shelf.put(at_ms=NOON_MS + 4 * HOUR_MS, complete=False),
        shelf.put(at_ms=NOON_MS + 9 * HOUR_MS, agent_id="bob"),
    )
    shelf.upload(old, one, two)
    shelf.upload(older, one)
    shelf.upload(newest, two)
    shelf.upload(incomplete, one, two)
    shelf.upload(bobs, one, two)
    assert found("latest", shelf.elsewhere) == at("two", newest)
    assert found("latest@2025-11-24T18:30Z", shelf.elsewhere) == at("one", old)
    with pytest.raises(SnapshotNotFound):
        found("latest@2025-11-24T15:00Z", shelf.elsewhere)


def test_on_a_new_host_latest_is_not_guessed_while_a_destination_is_down(shelf: Shelf) -> None:
    offsite = shelf.memory("offsite")
    shelf.missing_directory("nas")
    shelf.upload(shelf.put(), offsite)
    with pytest.raises(StorageUnavailable, match="nas"):
        found("latest", shelf.elsewhere)


def test_strange_objects_in_a_bucket_do_not_stand_in_the_way_of_latest(shelf: Shelf) -> None:
    offsite = shelf.memory("offsite")
    record = shelf.put()
    shelf.upload(record, offsite)
    prefix = "tenants/default/snapshots/ana/"
    for name in ("zzz.tar.zst", "README", "ffffffff-ffff-7fff-bfff-ffffffffffff.tar.zst"):
        store_object(offsite, prefix + name, b"x")
    assert found("latest", shelf.elsewhere) == at("offsite", record)
    assert found("latest@2100-01-01", shelf.elsewhere) == at("offsite", record)


# --- URLs -----------------------------------------------------------------------------------------


def test_a_url_needs_no_configuration(shelf: Shelf) -> None:
    record = shelf.put()
    for destination in (shelf.memory("offsite"), shelf.directory("nas")):
        shelf.upload(record, destination)
        assert found(f"{destination.url}/{record.key}", NOWHERE) == at(destination.url, record)


def test_a_url_s_prefix_may_be_called_like_the_beginning_of_a_key(shelf: Shelf) -> None:
    (shelf.root / "tenants").mkdir()
    destination = shelf.directory("tenants/default")
    record = shelf.put()
    shelf.upload(record, destination)
    assert found(f"{destination.url}/{record.key}", NOWHERE) == at(destination.url, record)


@pytest.mark.parametrize(
    "url",
    [
        "memory://x",
        "memory://x/tenants/default/snapshots/ana/",
        "memory://x/tenants/default/snapshots/ana/latest.tar.zst",
        "memory://x/snapshots/ana/019ab1b5-7e00-7abc-8def-0123456789ab.tar.zst",
        "memory://x/tenants/default/snapshots/ana/019ab1b5-7e00-7abc-8def-0123456789ab.tar.zst.sha256",
        "memory://tenants/default/snapshots/ana/019ab1b5-7e00-7abc-8def-0123456789ab.tar.zst",
    ],
)
def test_a_url_that_does_not_end_in_a_key_is_a_mistake(url: str) -> None:
    with pytest.raises(UsageError, match="bundle's key"):
        found(url, NOWHERE)


KEY = "tenants/default/snapshots/ana/019ab1b5-7e00-7abc-8def-0123456789ab.tar.zst"


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("memory://nothing-is-here", SnapshotNotFound),
        ("file:///nonexistent/share", StorageUnavailable),
        ("ftp://host", ConfigError),
        ("file://relative", ConfigError),
    ],
)
def test_a_url_that_leads_nowhere_says_why(base: str, expected: type[AgentkeepError]) -> None:
    with pytest.raises(expected):
        found(f"{base}/{KEY}", NOWHERE)


# --- paths ----------------------------------------------------------------------------------------


def test_a_path_names_a_file_of_any_name(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "copy of it"
    path.write_bytes(b"whatever")
    monkeypatch.chdir(tmp_path)
    for name in (str(path), "./copy of it"):
        with located(name, NOWHERE) as bundle, bundle.open() as stream:
            assert stream.read() == b"whatever"
            assert bundle.key is None
            assert bundle.file_name == "copy of it"
            assert bundle.size_bytes() == 8


@pytest.mark.parametrize("name", ["./missing", "missing.tar.zst", "/nonexistent/x", ".", "./", "/"])
def test_a_path_that_is_no_file_is_not_found(name: str) -> None:
    with pytest.raises(SnapshotNotFound, match="no such file"):
        found(name, NOWHERE)


def test_a_sibling_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "x.tar.zst.sha256").write_text("...")
    with pytest.raises(UsageError, match="sibling"):
        found(str(tmp_path / "x.tar.zst.sha256"), NOWHERE)


def test_a_file_is_known_as_encrypted_by_its_first_bytes_and_not_by_its_name(tmp_path: Path) -> None:
    for name, data, encrypted in (
        ("a.tar.zst", b"age-encryption.org/v1\n...", True),
        ("b.tar.zst.age", b"\x28\xb5\x2f\xfd", False),
        ("c.tar.zst", b"", False),
    ):
        (tmp_path / name).write_bytes(data)
        assert LocalBundle(tmp_path / name).is_encrypted == encrypted


# --- siblings -------------------------------------------------------------------------------------


def test_a_bundle_s_digest_is_what_its_sibling_says(shelf: Shelf) -> None:
    offsite = shelf.memory("offsite")
    record = shelf.put()
    shelf.upload(record, offsite)
    for places in (shelf.places, shelf.elsewhere):
        with located(str(record.key), places) as bundle:
            assert bundle.expected_sha256() == record.sha256


def test_a_missing_sibling_is_named_as_missing(shelf: Shelf) -> None:
    offsite = shelf.memory("offsite")
    record = shelf.put()
    store_object(offsite, str(record.key), b"a bundle on its own")
    path = shelf.store.path_of(record.key)
    path.with_name(path.name + ".sha256").unlink()
    for places in (shelf.places, shelf.elsewhere):
        with located(str(record.key), places) as bundle, pytest.raises(SiblingMissing) as caught:
            bundle.expected_sha256()
        assert caught.value.exit_code == 65


def test_a_sibling_that_cannot_be_read_is_as_good_as_missing(tmp_path: Path) -> None:
    (tmp_path / "x.tar.zst").touch()
    (tmp_path / "x.tar.zst.sha256").mkdir()
    with pytest.raises(SiblingMissing, match="cannot read"):
        LocalBundle(tmp_path / "x.tar.zst").expected_sha256()


@pytest.mark.parametrize("extra_bytes", [1, MAX_SIBLING_BYTES, 10 << 20])
def test_a_sibling_with_more_behind_it_is_not_read_as_if_it_had_not(extra_bytes: int, shelf: Shelf) -> None:
    offsite = shelf.memory("offsite")
    record = shelf.put()
    path = shelf.store.path_of(record.key)
    sibling = path.with_name(path.name + ".sha256")
    sibling.write_bytes(sibling.read_bytes() + b"\n" * extra_bytes)
    store_object(offsite, str(record.key), path.read_bytes())
    store_object(offsite, record.key.sibling, sibling.read_bytes())
    for places in (shelf.places, shelf.elsewhere):
        with located(str(record.key), places) as bundle, pytest.raises(SiblingMismatch):
            bundle.expected_sha256()
