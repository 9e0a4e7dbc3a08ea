"""The long-running process: snapshots on schedule, the outbox drained, a clean stop.

One job an agent, never two at once (the lock in the store also keeps the command line out); one drain of
the outbox at a time for each destination, so that a dead one holds up nobody else.

Crash model: everything that matters is on disk before it is acknowledged; a restart goes on from the
catalog: what is due is due by the last snapshot's time, what waits in the outbox waits still.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger

from daemon.destinations import Destination
from daemon.errors import AgentkeepError, BusyError, ExitCode, RefusedError, StorageUnavailable
from daemon.model import AgentSpec, SnapshotRecord
from daemon.schedule import Schedule
from daemon.snapshots import Sealing, Store, take_snapshot
from daemon.telemetry.logs import event
from daemon.transfer import drain_outbox

_MISFIRE_GRACE_SECONDS = None  # late is better than never: a run that was missed is made up once
_UPLOAD_GRACE_SECONDS = 30.0
_LONGEST_BACKOFF_SECONDS = 600.0
_SIGNAL_POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class AgentJob:
    spec: AgentSpec
    schedule: Schedule
    destinations: tuple[str, ...]


class Service:
    def __init__(
        self,
        store: Store,
        jobs: Sequence[AgentJob],
        destinations: Mapping[str, Destination],
        *,
        sealing: Sealing,
        upload_interval_seconds: float,
        concurrency: int,
    ) -> None:
        self._store = store
        self._jobs = jobs
        self._sealing = sealing
        self._stopping = threading.Event()
        self._uploaders = {
            name: _Uploader(store, destination, self._stopping, interval_seconds=upload_interval_seconds)
            for name, destination in destinations.items()
        }
        self._scheduler = BackgroundScheduler(
            executors={"default": ThreadPoolExecutor(concurrency)},
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": _MISFIRE_GRACE_SECONDS},
            timezone=UTC,
        )

    def run(self) -> ExitCode:
        """Work until SIGTERM or SIGINT; what is under way is finished first. For the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        for job in self._jobs:
            self._scheduler.add_job(
                self._snapshot,
                trigger_of(job.schedule),
                args=[job],
                id=f"snapshot {job.spec.tenant}/{job.spec.agent_id}",
                **self._first_run(job),
            )
        for uploader in self._uploaders.values():
            uploader.start()
        self._scheduler.start()
        event("service.started", fields={"agents": len(self._jobs), "destinations": len(self._uploaders)})
        # Looking up now and then, since a signal that another thread happens to take does not end a wait.
        while not self._stopping.wait(_SIGNAL_POLL_SECONDS):
            pass
        event("service.stopping")
        self._scheduler.shutdown(wait=True)
        for uploader in self._uploaders.values():
            uploader.wake()
        give_up_at = time.monotonic() + _UPLOAD_GRACE_SECONDS  # one grace for all of them
        for uploader in self._uploaders.values():
            uploader.finish(grace_seconds=max(1.0, give_up_at - time.monotonic()))
        event("service.stopped")
        return ExitCode.OK

    def stop(self) -> None:
        """Let `run` come to its end. Idempotent; safe from a signal handler and from any thread."""
        self._stopping.set()

    def _on_signal(self, _number: int, _frame: Any) -> None:
        self.stop()

    def _first_run(self, job: AgentJob) -> dict[str, datetime]:
        """An interval counts from the last snapshot, also one of before the restart; cron knows itself."""
        if job.schedule.every_seconds is None:
            return {}
        last_ms = self._store.catalog.last_attempt_ms(job.spec.tenant, job.spec.agent_id)
        now = datetime.now(UTC)
        if last_ms is None:
            return {"next_run_time": now}
        due = datetime.fromtimestamp(last_ms / 1000, UTC) + timedelta(seconds=job.schedule.every_seconds)
        # A last snapshot from the future is a clock that was wrong, then or now: do not wait for it.
        latest = now + timedelta(seconds=job.schedule.every_seconds)
        return {"next_run_time": min(max(now, due), latest)}

    def _snapshot(self, job: AgentJob) -> None:
        if self._stopping.is_set():
            return
        started = time.monotonic()
        agent = f"{job.spec.tenant}/{job.spec.agent_id}"
        try:
            record = take_snapshot(
                self._store,
                job.spec,
                sealing=self._sealing,
                destinations=job.destinations,
                created_by="schedule",
                unless_unchanged=True,
            )
        except AgentkeepError as exc:
            _log_failure("snapshot.failed", exc, agent=agent)
            return
        except Exception:  # noqa: BLE001  one agent's trouble must not end the protection of the others
            event("snapshot.failed", level=logging.ERROR, exc_info=True, fields={"agent": agent})
            return
        if record.unchanged_at_ms is not None:
            event("snapshot.unchanged", fields={"agent": agent, "snapshot": record.snapshot_id})
            return
        _log_snapshot(record, agent=agent, seconds=round(time.monotonic() - started, 2))
        for name in job.destinations:
            self._uploaders[name].wake()


class _Uploader:
    """Drains the outbox of one destination: when woken, and at an interval that grows while it fails."""

    def __init__(
        self, store: Store, destination: Destination, stopping: threading.Event, *, interval_seconds: float
    ) -> None:
        self._store = store
        self._destination = destination
        self._stopping = stopping
        self._interval_seconds = interval_seconds
        self._woken = threading.Event()
        # A daemon thread: an upload that outlasts the grace is cut off by our exit, and resumed next time.
        self._thread = threading.Thread(target=self._run, name=f"upload {destination.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        self._woken.set()

    def finish(self, *, grace_seconds: float) -> None:
        """Stop after the bundle that is on its way, or leave it after the grace."""
        self.wake()
        self._thread.join(grace_seconds)
        if self._thread.is_alive():
            event("upload.abandoned", level=logging.WARNING, fields={"destination": self._destination.name})

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            self._woken.clear()
            failures = 0 if self._drain() else failures + 1
            if failures:  # a new snapshot does not make a dead destination live
                backoff_seconds = self._interval_seconds * 2 ** min(failures - 1, 16)
                self._stopping.wait(min(backoff_seconds, _LONGEST_BACKOFF_SECONDS))
            else:
                self._woken.wait(self._interval_seconds)

    def _drain(self) -> bool:
        """Whether nothing failed."""
        name = self._destination.name
        try:
            report = drain_outbox(self._store, [self._destination], should_stop=self._stopping.is_set)
        except Exception:  # noqa: BLE001  the next interval tries again
            event("upload.failed", level=logging.ERROR, exc_info=True, fields={"destination": name})
            return False
        for snapshot_id, _ in report.confirmed:
            event("upload.confirmed", fields={"snapshot": snapshot_id, "destination": name})
        failed = [(snapshot_id, exc) for snapshot_id, _, exc in report.failed if not _is_busy(exc)]
        for snapshot_id, exc in failed:
            _log_failure("upload.failed", exc, snapshot=snapshot_id, destination=name)
        # One bundle that cannot be sent does not make the destination a dead one.
        return not any(isinstance(exc, StorageUnavailable | RefusedError) for _, exc in failed)


def _is_busy(exc: AgentkeepError) -> bool:
    """The command line is uploading there: what it leaves is ours at the next interval."""
    return isinstance(exc, BusyError)


def trigger_of(schedule: Schedule) -> IntervalTrigger | CronTrigger:
    jitter = schedule.jitter_seconds or None
    if schedule.every_seconds is not None:
        return IntervalTrigger(seconds=schedule.every_seconds, jitter=jitter, timezone=UTC)
    assert schedule.cron is not None
    trigger = CronTrigger.from_crontab(schedule.cron)  # in the host's time zone
    trigger.jitter = jitter
    return trigger


def _log_snapshot(record: SnapshotRecord, *, agent: str, seconds: float) -> None:
    event(
        "snapshot.sealed" if record.complete else "snapshot.incomplete",
        level=logging.INFO if record.complete else logging.ERROR,
        fields={
            "agent": agent,
            "snapshot": record.snapshot_id,
            "consistency": record.consistency.level,
            "window_ms": record.consistency.window_ms,
            **({"moved": ",".join(record.consistency.moved[:5])} if record.consistency.moved else {}),
            "bytes": record.size_bytes,
            "seconds": seconds,
        },
    )
    for failure in record.failures:
        fields = {"agent": agent, **failure.model_dump(include={"source", "reason", "hint"})}
        event("source.failed", level=logging.ERROR, fields=fields)


def _log_failure(name: str, exc: AgentkeepError, **fields: str) -> None:
    event(name, level=logging.ERROR, fields={**fields, "reason": exc, "hint": exc.hint})
