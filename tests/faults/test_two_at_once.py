"""Two commands on the same thing: one waits, or is told that it is busy, and nothing is done twice."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.commands import Host, frozen, leftovers, quoted


@pytest.fixture
def agent(host: Host) -> Path:
    root = host.home / "ana"
    root.mkdir()
    for number in range(300):
        (root / f"{number}.md").write_text("a note\n")
    host.configure({"ana": f"root = {quoted(root)}"})
    return root


def test_a_second_snapshot_of_an_agent_is_told_that_it_is_busy(host: Host, agent: Path) -> None:
    host.configure({"ana": f"root = {quoted(agent)}"}, top="lock_timeout_seconds = 0")
    under_way = lambda: bool(leftovers(host.state / "scratch"))  # noqa: E731
    with frozen(
        lambda: host.started("--json", "snapshot", "--force"), under_way, "a snapshot under way"
    ) as first:
        before = host.snapshots()
        second = host.document("snapshot", expecting=75)
        assert second["error"]["kind"] == "BusyError"
        assert second["error"]["hint"]
        assert host.snapshots() == before
        first.send(signal.SIGCONT)
        done = first.wait()
    assert done.exit_code == 0
    assert [r["snapshot_id"] for r in host.snapshots()[len(before) :]] == [done.document["snapshot_id"]]
    assert leftovers(host.state, host.offsite) == []


def test_a_second_snapshot_waits_if_it_may(host: Host, agent: Path) -> None:
    host.configure({"ana": f"root = {quoted(agent)}"}, top="lock_timeout_seconds = 60")
    with host.started("snapshot", "--force") as first, host.started("snapshot", "--force") as second:
        assert (first.wait().exit_code, second.wait().exit_code) == (0, 0)
    assert [record["uploads"] for record in host.snapshots()] == [{"offsite": "confirmed"}] * 2
    assert leftovers(host.state, host.offsite) == []


@pytest.mark.usefixtures("agent")
def test_snapshots_that_begin_together_are_done_or_busy_and_nothing_else(host: Host) -> None:
    """On a host where nothing is there yet: not the state directory, not the catalog."""
    with ExitStack() as stack:
        running = [stack.enter_context(host.started("snapshot", "--force")) for _ in range(5)]
        outcomes = [command.wait() for command in running]
    assert {done.exit_code for done in outcomes} <= {0, 75}, [done.stderr for done in outcomes]
    done = [done for done in outcomes if done.exit_code == 0]
    assert len(done) == len(host.snapshots()) >= 1
    host.agentkeep("upload")
    assert [record["uploads"] for record in host.snapshots()] == [{"offsite": "confirmed"}] * len(done)
    assert leftovers(host.state, host.offsite) == []


def test_snapshots_of_different_agents_do_not_wait_for_each_other(host: Host) -> None:
    names = ("ana", "bob", "eve")
    for name in names:
        (host.home / name).mkdir()
        (host.home / name / "note.md").write_text(name)
    host.configure({name: f"root = {quoted(host.home / name)}" for name in names})
    with ExitStack() as stack:
        running = [stack.enter_context(host.started("snapshot", name, "--no-upload")) for name in names]
        assert [command.wait().exit_code for command in running] == [0, 0, 0]
    assert sorted(record["agent_id"] for record in host.snapshots()) == list(names)


@pytest.mark.usefixtures("agent")
def test_uploads_that_run_together_send_everything_once(host: Host) -> None:
    for _ in range(4):
        host.agentkeep("snapshot", "--force", "--no-upload")
    with ExitStack() as stack:
        running = [stack.enter_context(host.started("upload")) for _ in range(3)]
        outcomes = [command.wait() for command in running]
    assert {done.exit_code for done in outcomes} <= {0, 75}, [done.stderr for done in outcomes]
    host.agentkeep("upload")
    assert [record["uploads"] for record in host.snapshots()] == [{"offsite": "confirmed"}] * 4
    assert len(host.bundles_at(host.offsite)) == 4
    assert leftovers(host.offsite) == []


@pytest.mark.usefixtures("agent")
def test_a_snapshot_by_hand_beside_the_daemon_is_done_or_busy(host: Host) -> None:
    host.configure({"ana": f'root = {quoted(host.home / "ana")}\nschedule = "every 1s"'})
    with host.started("run") as daemon:
        outcomes = [host.agentkeep("snapshot", "--force", expecting=None).exit_code for _ in range(6)]
        daemon.send(signal.SIGTERM)
        assert daemon.wait().exit_code == 0
    assert set(outcomes) <= {0, 75}
    assert 0 in outcomes
    host.agentkeep("upload")
    records = host.snapshots()
    assert {r["key"].rpartition("/")[2] for r in records} == {p.name for p in host.bundles_at(host.offsite)}
    assert leftovers(host.state, host.offsite) == []


@pytest.mark.usefixtures("agent")
def test_restores_to_one_place_that_run_together_leave_one_whole(host: Host) -> None:
    host.agentkeep("snapshot")
    out = host.home / "out"
    with ExitStack() as stack:
        running = [
            stack.enter_context(host.started("restore", "latest", "--to", out / "back")) for _ in range(4)
        ]
        codes = sorted(command.wait().exit_code for command in running)
    assert codes[0] == 0
    assert set(codes[1:]) <= {73, 75, 77}
    assert [path.name for path in out.iterdir()] == ["back"]
    assert len(list((out / "back/files").iterdir())) == 300


@pytest.mark.usefixtures("agent")
def test_exports_to_one_name_that_run_together_leave_one_whole(host: Host) -> None:
    host.agentkeep("snapshot")
    out = host.home / "out"
    with ExitStack() as stack:
        running = [
            stack.enter_context(host.started("export", "latest", "--to", out / "copy")) for _ in range(4)
        ]
        codes = sorted(command.wait().exit_code for command in running)
    assert codes[0] == 0
    assert set(codes[1:]) <= {0, 75, 77}
    assert sorted(path.name for path in out.iterdir()) == ["copy", "copy.sha256"]
    host.agentkeep("verify", out / "copy")
