"""The long-running process, run within the test: schedules, first runs, outbox, and its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from daemon.destinations import Destination
from daemon.errors import ExitCode
from daemon.locate import LocalBundle
from daemon.model import (
    AgentSpec,
    BundleKey,
    Consistency,
    SnapshotRecord,
    Upload,
    UploadState,
    new_snapshot_id,
)
from daemon.schedule import parse_schedule
from daemon.service import AgentJob, Service, trigger_of
from daemon.snapshots import Sealing, Store, take_snapshot
from daemon.telemetry.logs import log_to_stderr
from daemon.verify import read_manifest
from tests.e2e.commands import restless

LIMIT_SECONDS = 30.0


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A service takes over the signals of its process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state")


def agent_job(
    tmp_path: Path, name: str, *, schedule: str = "every 1h", to: Sequence[str] = ("offsite",)
) -> AgentJob:
    root = tmp_path / name
    root.mkdir(exist_ok=True)
    (root / "note.md").write_text(f"I am {name}\n")
    return AgentJob(AgentSpec("default", name, root, ("**",)), parse_schedule(schedule), tuple(to))


def destination(tmp_path: Path, name: str = "offsite", *, there: bool = True) -> Destination:
    if there:
        (tmp_path / name).mkdir(exist_ok=True)
    return Destination(name, (tmp_path / name).as_uri())


def service_of(
    store: Store, jobs: Sequence[AgentJob], destinations: Sequence[Destination], **options: Any
) -> Service:
    settings = {"sealing": Sealing(), "upload_interval_seconds": 0.05, "concurrency": 2, **options}
    return Service(store, jobs, {found.name: found for found in destinations}, **settings)


def run_until(
    service: Service, condition: Callable[[], bool], *, how: Callable[[], None] | None = None
) -> ExitCode:
    """Run a service in this thread until another has seen the condition come true, and ended it."""
    came_true = threading.Event()

    def watch() -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < deadline and not came_true.is_set():
            if condition():
                came_true.set()
            time.sleep(0.005)
        (how or service.stop)()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        exit_code = service.run()
    finally:
        watcher.join()
    assert came_true.is_set(), "the condition never came true"
    return exit_code


def uploads_of(store: Store) -> list[dict[str, UploadState]]:
    return [{name: up.state for name, up in record.uploads.items()} for record in store.catalog.snapshots()]


# --- triggers ---------------------------------------------------------------------------------------------


def test_an_interval_comes_again_after_that_interval() -> None:
    trigger = trigger_of(parse_schedule("every 15m", jitter_seconds=0))
    now = datetime(2026, 11, 1, 10, 0, tzinfo=UTC)
    assert trigger.get_next_fire_time(now, now) == now + timedelta(minutes=15)


def test_jitter_stays_within_what_the_schedule_allows() -> None:
    trigger = trigger_of(parse_schedule("every 1h", jitter_seconds=30))
    now = datetime(2026, 11, 1, 10, 0, tzinfo=UTC)
    due = now + timedelta(hours=1)
    times = {trigger.get_next_fire_time(now, now) for _ in range(50)}
    assert all(due - timedelta(seconds=30) <= moment <= due + timedelta(seconds=30) for moment in times)
    assert len(times) > 1


NEXT_TIMES = """
from datetime import UTC, datetime
from daemon.schedule import parse_schedule
from daemon.service import trigger_of
now = datetime(2026, 11, 1, 10, 0, tzinfo=UTC)  # a Sunday
for text in ("daily 03:00", "30 6 * * mon"):
    print(trigger_of(parse_schedule(text)).get_next_fire_time(None, now).astimezone(UTC).isoformat())
"""


def test_times_of_day_and_cron_fields_are_those_of_the_host() -> None:
    """In a process of its own, since a time zone is asked for once."""
    said = subprocess.run(
        [sys.executable, "-c", NEXT_TIMES],
        env={**os.environ, "TZ": "Asia/Tokyo"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.splitlines() == ["2026-11-01T18:00:00+00:00", "2026-11-01T21:30:00+00:00"]


# --- when an agent goes first -----------------------------------------------------------------------------


def record_of(name: str, *, at: datetime, complete: bool = True) -> SnapshotRecord:
    created_at_ms = int(at.timestamp() * 1000)
    return SnapshotRecord(
        key=BundleKey("default", name, new_snapshot_id(at_ms=created_at_ms), encrypted=False),
        created_at_ms=created_at_ms,
        label=None,
        complete=complete,
        consistency=Consistency(level="point_in_time", window_ms=1, attempts=1),
        size_bytes=0,
        sha256="0" * 64,
        content_bytes=0,
    )


@pytest.mark.parametrize(
    ("last", "is_due"),
    [
        (None, True),
        (timedelta(hours=-2), True),
        (timedelta(minutes=-59), False),
        (timedelta(days=+400), False),  # a clock that was wrong: after an interval, and not in 400 days
    ],
    ids=["never", "overdue", "lately", "in the future"],
)
def test_who_is_due_goes_at_once_and_who_is_not_does_not(
    store: Store, tmp_path: Path, last: timedelta | None, *, is_due: bool
) -> None:
    """One thread for both: had `ana` been due, it would have come before `bob`, who always is."""
    jobs = [agent_job(tmp_path, "ana", to=()), agent_job(tmp_path, "bob", to=())]
    if last is not None:
        record = record_of("ana", at=datetime.now(UTC) + last)
        store.catalog.announce(record, [])
        store.catalog.confirm_sealed(record.snapshot_id)
    before = len(store.catalog.snapshots(agent_id="ana"))
    service = service_of(store, jobs, [], concurrency=1)
    run_until(service, lambda: bool(store.catalog.snapshots(agent_id="bob")))
    assert len(store.catalog.snapshots(agent_id="ana")) - before == int(is_due)


def test_a_schedule_by_the_clock_takes_nothing_at_the_start(store: Store, tmp_path: Path) -> None:
    jobs = [agent_job(tmp_path, "ana", schedule="0 0 29 2 *", to=()), agent_job(tmp_path, "bob", to=())]
    run_until(
        service_of(store, jobs, [], concurrency=1), lambda: bool(store.catalog.snapshots(agent_id="bob"))
    )
    assert store.catalog.snapshots(agent_id="ana") == []


def test_snapshots_say_that_the_schedule_made_them_and_go_on_coming(store: Store, tmp_path: Path) -> None:
    job = agent_job(tmp_path, "ana", schedule="every 1s", to=())
    with restless(job.spec.root):
        run_until(service_of(store, [job], []), lambda: len(store.catalog.snapshots()) >= 2)
    first, second = store.catalog.snapshots()[:2]
    assert timedelta(milliseconds=500) < second.created_at - first.created_at
    assert read_manifest(LocalBundle(store.path_of(first.key))).created_by == "schedule"


def test_an_agent_that_does_nothing_is_looked_at_and_no_bundle_is_written(
    store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = agent_job(tmp_path, "ana", schedule="every 1s", to=())
    log_to_stderr()

    def seen_again() -> bool:
        return any(record.unchanged_at_ms is not None for record in store.catalog.snapshots())

    run_until(service_of(store, [job], []), seen_again)
    # What was written within a tick of the clock before the first one proves nothing, so there may be two.
    assert len(store.catalog.snapshots()) <= 2
    *_, current = store.catalog.snapshots()
    assert current.current_at > current.created_at
    said = f"INFO snapshot.unchanged agent=default/ana snapshot={current.snapshot_id}"
    assert said in capfd.readouterr().err


# --- the outbox -------------------------------------------------------------------------------------------


def test_what_waited_before_the_start_is_sent(store: Store, tmp_path: Path) -> None:
    job = agent_job(tmp_path, "ana")
    for _ in range(3):
        take_snapshot(store, job.spec, sealing=Sealing(), destinations=["offsite"])
    service = service_of(store, [job], [destination(tmp_path)])
    run_until(service, lambda: uploads_of(store) == [{"offsite": UploadState.CONFIRMED}] * 3)
    assert len(list((tmp_path / "offsite").rglob("*.tar.zst"))) == 3


def test_a_new_snapshot_is_sent_without_waiting_for_the_interval(store: Store, tmp_path: Path) -> None:
    service = service_of(
        store, [agent_job(tmp_path, "ana")], [destination(tmp_path)], upload_interval_seconds=3600
    )
    run_until(service, lambda: uploads_of(store) == [{"offsite": UploadState.CONFIRMED}])


def test_a_destination_that_comes_back_is_sent_all_that_waited(store: Store, tmp_path: Path) -> None:
    job = agent_job(tmp_path, "ana")
    take_snapshot(store, job.spec, sealing=Sealing(), destinations=["offsite"])
    away = destination(tmp_path, there=False)

    def come_back_once_missed() -> bool:
        (upload,) = (record.uploads["offsite"] for record in store.catalog.snapshots())
        if upload.attempts >= 2:
            (tmp_path / "offsite").mkdir(exist_ok=True)
        return upload.state == UploadState.CONFIRMED

    run_until(service_of(store, [job], [away]), come_back_once_missed)


def test_each_agent_goes_to_its_own_destinations(store: Store, tmp_path: Path) -> None:
    jobs = [agent_job(tmp_path, "ana", to=("one",)), agent_job(tmp_path, "bob", to=("one", "two"))]
    service = service_of(store, jobs, [destination(tmp_path, "one"), destination(tmp_path, "two")])

    def all_confirmed() -> bool:
        states = uploads_of(store)
        return len(states) == 2 and all(s == UploadState.CONFIRMED for up in states for s in up.values())

    run_until(service, all_confirmed)
    arrived = {name: {p.parent.name for p in (tmp_path / name).rglob("*.tar.zst")} for name in ("one", "two")}
    assert arrived == {"one": {"ana", "bob"}, "two": {"bob"}}


def test_a_bundle_that_is_gone_does_not_hold_up_the_ones_after_it(store: Store, tmp_path: Path) -> None:
    job = agent_job(tmp_path, "ana")
    gone, fine = (take_snapshot(store, job.spec, sealing=Sealing(), destinations=["offsite"]) for _ in "ab")
    store.path_of(gone.key).unlink()
    states = {"offsite": UploadState.FAILED}, {"offsite": UploadState.CONFIRMED}
    run_until(service_of(store, [job], [destination(tmp_path)]), lambda: uploads_of(store) == list(states))
    error = store.catalog.find(gone.snapshot_id).uploads["offsite"]
    assert "gone before it was uploaded" in (error.last_error or "")
    assert isinstance(error, Upload)
    assert store.catalog.find(fine.snapshot_id).uploads["offsite"].last_error is None


# --- trouble and the end ----------------------------------------------------------------------------------


def test_an_agent_that_is_not_there_does_not_end_the_protection_of_the_others(
    store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    gone, fine = (
        agent_job(tmp_path, "gone", schedule="every 1s"),
        agent_job(tmp_path, "fine", schedule="every 1s"),
    )
    (gone.spec.root / "note.md").unlink()
    gone.spec.root.rmdir()
    log_to_stderr()
    service = service_of(store, [gone, fine], [destination(tmp_path)])
    with restless(fine.spec.root):
        run_until(service, lambda: len(store.catalog.snapshots(agent_id="fine")) >= 2)
    assert store.catalog.snapshots(agent_id="gone") == []
    logged = capfd.readouterr().err
    assert "ERROR snapshot.failed agent=default/gone" in logged
    assert "hint=" in logged


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_well(store: Store, tmp_path: Path, number: signal.Signals) -> None:
    service = service_of(store, [agent_job(tmp_path, "ana")], [destination(tmp_path)])
    exit_code = run_until(
        service,
        lambda: uploads_of(store) == [{"offsite": UploadState.CONFIRMED}],
        how=lambda: signal.raise_signal(number),
    )
    assert exit_code == ExitCode.OK
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("upload")] == []


def test_what_is_stopped_before_it_begins_takes_nothing(store: Store, tmp_path: Path) -> None:
    service = service_of(store, [agent_job(tmp_path, "ana")], [destination(tmp_path)])
    service.stop()
    service.stop()
    assert service.run() == ExitCode.OK
    assert store.catalog.snapshots() == []
