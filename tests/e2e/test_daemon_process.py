"""The daemon as init runs it: on schedule, through outages and restarts, until SIGTERM."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import Host, Running, freeze_when, leftovers, quoted, restless, wait_until
from tests.harness.sample_agent import RestoredPaths, prove, running_writer


@contextmanager
def daemon(host: Host, **options: Any) -> Iterator[Running]:
    with host.started("run", **options) as running:
        try:
            yield running
        except TimeoutError as exc:
            raise AssertionError(f"{exc}\n{running.output()}") from exc


def stop(running: Running, number: signal.Signals = signal.SIGTERM) -> None:
    running.send(number)
    done = running.wait()
    assert done.exit_code == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stdout == ""


def assert_every_bundle_is_whole(*places: Path) -> None:
    """By sha256sum's own judgement, and nothing unfinished lies beside them."""
    for place in places:
        for bundle in [*place.rglob("*.tar.zst")]:
            check = ["sha256sum", "--check", "--strict", "--quiet", f"{bundle.name}.sha256"]
            assert subprocess.run(check, cwd=bundle.parent, check=False).returncode == 0, bundle
    assert leftovers(*places) == []


def small_agent(host: Host, name: str = "ana") -> Path:
    root = host.home / name
    root.mkdir()
    (root / "note.md").write_text(f"I am {name}\n")
    return root


def agent_of_many_files(host: Host) -> Path:
    """Whose snapshot takes long enough to be met."""
    root = small_agent(host)
    for number in range(400):
        (root / f"{number}.md").write_text("a note\n")
    return root


def test_snapshots_arrive_on_schedule_while_the_agent_writes_and_sigterm_ends_it_cleanly(
    host: Host, sample: Path
) -> None:
    host.configure({"ana": f'root = {quoted(sample)}\nmemdir = "memory"\nschedule = "every 2s"'})
    with running_writer(sample, journal=host.home / "journal.jsonl", pause_ms=25.0) as writer:
        with daemon(host) as running:
            wait_until(lambda: len(host.bundles_at(host.offsite)) >= 3, "three bundles at the destination")
            stop(running)
        writer.stop()
    assert_every_bundle_is_whole(host.state, host.offsite)
    records = host.snapshots()
    assert [record["complete"] for record in records] == [True] * len(records)
    assert {host.state / r["key"] for r in records} == set(host.bundles_at(host.state))
    confirmed = [r for r in records if r["uploads"] == {"offsite": "confirmed"}]
    assert {host.offsite / r["key"] for r in confirmed} == set(host.bundles_at(host.offsite))
    of_one_instant = [r for r in records if r["consistency"]["level"] == "point_in_time"]
    assert of_one_instant
    host.agentkeep("restore", of_one_instant[-1]["snapshot_id"], "--to", host.home / "back")
    prove(RestoredPaths.restored(host.home / "back"), writer.journal)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_daemon_stops_on_a_signal(host: Host, number: signal.Signals) -> None:
    host.configure({"ana": f'root = {quoted(small_agent(host))}\nschedule = "daily 03:00"'})
    with daemon(host) as running:
        wait_until(lambda: "service.started" in running.output(), "the daemon to start")
        stop(running, number)
    assert host.snapshots() == []


def test_sigterm_in_the_middle_of_a_snapshot_finishes_it(host: Host) -> None:
    host.configure({"ana": f'root = {quoted(agent_of_many_files(host))}\nschedule = "every 1s"'})
    with daemon(host) as running:
        assert freeze_when(running, lambda: bool(leftovers(host.state / "scratch")), "a snapshot under way")
        before = host.snapshots()
        running.send(signal.SIGTERM)
        stop(running, signal.SIGCONT)
    after = host.snapshots()
    assert len(after) > len(before)
    assert {record["complete"] for record in after} == {True}
    assert_every_bundle_is_whole(host.state, host.offsite)
    host.agentkeep("upload")
    assert host.snapshots()[-1]["uploads"] == {"offsite": "confirmed"}


def test_a_restart_goes_on_from_the_catalog(host: Host) -> None:
    """Who was just backed up waits for the interval; who never was goes first."""
    agents = {
        name: f'root = {quoted(small_agent(host, name))}\nschedule = "every 1h"' for name in ("ana", "bob")
    }
    host.configure(agents, top="concurrency = 1")
    host.agentkeep("snapshot", "ana", "--no-upload")
    with daemon(host) as running:
        wait_until(lambda: len(host.bundles_at(host.offsite)) == 2, "what waited, and bob's first")
        stop(running)
    records = host.snapshots()
    assert [record["agent_id"] for record in records] == ["ana", "bob"]
    with daemon(host) as running:
        wait_until(lambda: "service.started" in running.output(), "the daemon to start")
        stop(running)
    assert [record["snapshot_id"] for record in host.snapshots()] == [r["snapshot_id"] for r in records]


def test_what_is_overdue_is_taken_at_once_after_a_restart(host: Host) -> None:
    root = small_agent(host)
    host.configure({"ana": f'root = {quoted(root)}\nschedule = "every 1s"'})
    first = host.document("snapshot")
    with restless(root), daemon(host) as running:
        wait_until(lambda: len(host.bundles_at(host.offsite)) >= 2, "the overdue one")
        stop(running)
    assert host.snapshots()[0]["snapshot_id"] == first["snapshot_id"]


def test_after_a_kill_the_next_start_tidies_up_and_uploads_what_waited(host: Host) -> None:
    root = agent_of_many_files(host)
    host.configure({"ana": f'root = {quoted(root)}\nschedule = "every 1s"'})
    host.agentkeep("snapshot", "--no-upload")  # waits in the outbox
    waiting = {record["snapshot_id"] for record in host.snapshots()}
    host.offsite.rename(host.home / "away")  # so that nothing is confirmed before the kill
    with daemon(host) as running:
        assert freeze_when(running, lambda: bool(leftovers(host.state / "scratch")), "work under way")
        assert running.kill().exit_code == -signal.SIGKILL
    assert leftovers(host.state) != []
    (host.home / "away").rename(host.offsite)
    with restless(root), daemon(host) as running:
        wait_until(lambda: len(host.bundles_at(host.offsite)) >= 2, "what waited and a new one")
        stop(running)
    confirmed = {r["snapshot_id"] for r in host.snapshots() if r["uploads"] == {"offsite": "confirmed"}}
    assert waiting < confirmed
    assert_every_bundle_is_whole(host.state, host.offsite)


def test_a_destination_that_was_away_gets_all_that_waited(host: Host) -> None:
    root = small_agent(host)
    host.configure({"ana": f'root = {quoted(root)}\nschedule = "every 1s"'})
    host.offsite.rmdir()  # as when a share is not mounted
    with restless(root), daemon(host) as running:
        wait_until(lambda: len(host.bundles_at(host.state)) >= 3, "three bundles in the outbox")
        wait_until(lambda: "upload.failed" in running.output(), "the outage to be noticed")
        assert {r["uploads"]["offsite"] for r in host.snapshots()} == {"pending"}
        assert not host.offsite.exists()  # it is not made up on the root disk
        waited = host.bundles_at(host.state)
        host.offsite.mkdir()
        wait_until(lambda: len(host.bundles_at(host.offsite)) >= len(waited), "the outbox to drain")
        stop(running)
    assert {path.name for path in waited} <= {path.name for path in host.bundles_at(host.offsite)}
    assert_every_bundle_is_whole(host.state, host.offsite)


def test_one_dead_destination_holds_up_neither_another_nor_the_snapshots(host: Host) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # taken, and nobody listens
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        dead = f'url = "s3://backups/ana"\nendpoint_url = "{endpoint}"\nregion = "us-east-1"'
        dead += '\naccess_key_id = "nobody"\nsecret_access_key = "nothing"'
        alive = f"url = {quoted(host.offsite.as_uri())}"
        root = small_agent(host)
        host.configure(
            {"ana": f'root = {quoted(root)}\nschedule = "every 1s"'},
            destinations={"dead": dead, "alive": alive},
        )
        with restless(root), daemon(host) as running:
            wait_until(lambda: len(host.bundles_at(host.offsite)) >= 3, "three bundles where it works")
            stop(running)
    arrived = [r for r in host.snapshots() if r["uploads"]["alive"] == "confirmed"]
    assert len(arrived) >= 3
    assert {r["uploads"]["dead"] for r in arrived} == {"pending"}


def test_the_trouble_of_one_agent_does_not_end_the_protection_of_another(host: Host) -> None:
    gone, fine, broken = (small_agent(host, name) for name in ("gone", "fine", "broken"))
    (broken / "memory.sqlite").write_bytes(b"garbage" * 100)
    agents = {path.name: f'root = {quoted(path)}\nschedule = "every 1s"' for path in (gone, fine, broken)}
    host.configure(agents)
    (gone / "note.md").unlink()
    gone.rmdir()
    with restless(fine), daemon(host) as running:
        wait_until(
            lambda: len(host.bundles_at(host.offsite / "tenants/default/snapshots/fine")) >= 2, "two of fine"
        )
        wait_until(
            lambda: "snapshot.incomplete agent=default/broken" in running.output(), "the alarm of broken"
        )
        wait_until(lambda: "snapshot.failed agent=default/gone" in running.output(), "the alarm of gone")
        stop(running)
    complete = {record["agent_id"]: record["complete"] for record in host.snapshots()}
    assert complete == {"fine": True, "broken": False}


def test_the_log_says_what_happened_and_nothing_of_what_the_agent_knows(host: Host) -> None:
    root = small_agent(host)
    (root / "note.md").write_text("the treasure is under the old oak\n")
    (root / "memory.sqlite").write_bytes(b"the treasure is not in here" * 40)
    host.configure({"ana": f'root = {quoted(root)}\nschedule = "every 1h"'})
    with daemon(host) as running:
        wait_until(lambda: "upload.confirmed" in running.output(), "an upload")
        stop(running)
        log = running.output()
    (record,) = host.snapshots()
    lines = [line.split()[2] for line in log.splitlines()]
    assert lines[0] == "service.started"
    assert lines[-2:] == ["service.stopping", "service.stopped"]
    assert f"snapshot={record['snapshot_id']}" in log
    assert str(root / "memory.sqlite") in log
    assert "treasure" not in log
