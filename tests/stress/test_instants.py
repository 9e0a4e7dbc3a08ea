"""Every snapshot that says `point_in_time` shows one instant, whatever the agent does meanwhile.

A writer raises one counter store after store; snapshots are taken as fast as they come while it works; then
every bundle is read back. `make test` takes 25 snapshots of most kinds of agents, `make soak` 200: the
environment variable AGENTKEEP_STRESS_SNAPSHOTS says how many.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from daemon.model import AgentSpec, SnapshotRecord
from daemon.snapshots import Sealing, Store, take_snapshot
from tests.stress.agents import Killer, Shown, read_back, within_a_line, within_a_transaction, writing
from tests.stress.stores import CHATTER, DATABASES, MEMDIR, STORES, is_an_instant, make_bystanders

SNAPSHOTS = int(os.environ.get("AGENTKEEP_STRESS_SNAPSHOTS", "25"))
KILLS = 4
PATIENT = ("--busy-seconds=30",)
ROLLBACK = ("--journal-mode=delete", *PATIENT)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "ana"
    root.mkdir()
    return root


def take_many(
    root: Path, *, until: Callable[[], bool] = lambda: True, snapshots: int = SNAPSHOTS
) -> list[Shown]:
    """That many snapshots, and more `until` something has come about, each read back from its bundle."""
    store = Store(root.with_name("state"), lock_timeout_seconds=30.0)
    spec = AgentSpec("default", "ana", root, include=("**",), memdir=root / MEMDIR, exclude=("*.tmp",))
    records: dict[str, SnapshotRecord] = {}
    while len(records) < snapshots or not until():
        record = take_snapshot(store, spec, sealing=Sealing(compression_level=1))
        records[record.snapshot_id] = record
    return [
        read_back(store.path_of(record.key), root.with_name(f"shown-{number:04d}"))
        for number, record in enumerate(records.values())
    ]


def assert_instants(shown: list[Shown], *, at_least: float, stores: Sequence[str] = STORES) -> None:
    """Whatever says that it is an instant is one; the others name what moved; so many are of the former."""
    assert all(tuple(one.counters) == tuple(stores) for one in shown)
    instants = [one for one in shown if one.is_point_in_time]
    mixtures = [str(one) for one in instants if not is_an_instant(one.values)]
    assert not mixtures, "\n".join(mixtures)
    assert all(one.manifest.consistency.moved for one in shown if not one.is_point_in_time)
    # The agent went on writing all the time, and no snapshot shows an older state than the one before.
    steps = [one.steps for one in instants]
    assert steps == sorted(steps)
    assert len(instants) >= at_least * len(shown), f"{len(instants)} of {len(shown)} are instants"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0, 0, 0), True),
        ((8, 7, 7), True),
        ((8, 8, 7), True),
        ((7, 7, 8), False),
        ((8, 7, 8), False),
        ((9, 8, 7), False),
        ((9, 7, 7), False),
    ],
)
def test_a_mixture_is_told_from_an_instant(values: tuple[int, ...], expected: bool) -> None:
    assert is_an_instant(values) is expected


def test_a_wal_agent_is_shown_as_of_one_instant_and_is_never_refused(
    root: Path, record_property: Callable[[str, object], None]
) -> None:
    """Its busy timeout is zero: had a snapshot been in its way once, it would have ended with an error."""
    with writing(root) as said:
        shown = take_many(root)
    assert_instants(shown, at_least=0.5)
    assert said["steps"] >= shown[-1].steps
    record_property("longest_commit_ms", said["longest_commit_ms"])


def test_an_agent_that_never_rests_is_never_shown_as_a_mixture(root: Path) -> None:
    """It takes a step every millisecond or two, and the window is a long one: hardly a snapshot is of one
    instant, and those that are not have to say so."""
    make_bystanders(root)
    with writing(root, "--pause-ms=1"):
        shown = take_many(root, snapshots=SNAPSHOTS // 3)
    assert_instants(shown, at_least=0.0)


def test_databases_that_are_written_to_at_full_speed_are_never_shown_as_a_mixture(root: Path) -> None:
    """Thousands of commits in a second, and none between two that a snapshot shows: what quiet there is comes
    from SQLite's checkpoints."""
    with writing(root, "--only-databases", "--pause-ms=0", *PATIENT):
        shown = take_many(root)
    assert_instants(shown, at_least=0.0, stores=DATABASES)
    assert shown[-1].steps > len(shown)


def test_a_rollback_journal_agent_is_shown_as_of_one_instant_where_it_is_said_to_be(root: Path) -> None:
    """Readers and writers wait for each other without WAL, so the writer is a patient one."""
    with writing(root, *ROLLBACK) as said:
        shown = take_many(root)
    assert_instants(shown, at_least=0.1)
    assert said["steps"] >= shown[-1].steps


def test_a_log_that_grows_all_the_time_is_of_the_same_instant_as_the_rest(root: Path) -> None:
    with writing(root, "--chatter"):
        shown = take_many(root)
    assert_instants(shown, at_least=0.5)
    assert not [one for one in shown if CHATTER in one.manifest.consistency.moved]
    whole = [json.loads(line) for line in (root / CHATTER).read_bytes().splitlines()]
    for one in shown:
        if one.is_point_in_time:
            assert_chatter_of_that_instant(one, whole)


def assert_chatter_of_that_instant(shown: Shown, whole: list[dict[str, int]]) -> None:
    """The log ends neither before nor after the instant that all other stores are of."""
    content = (shown.files / CHATTER).read_bytes()
    assert content.endswith(b"\n")
    lines = [json.loads(line) for line in content.splitlines()]
    assert lines == whole[: len(lines)]
    # What a line calls done was done when it was written.
    assert lines[-1]["done"] <= shown.steps, f"the log is of a later moment than the rest: {shown}"
    # The line after the next was written when the next one, which is not in the snapshot, was there: after
    # the instant, so all that is in the snapshot had begun.
    if len(lines) + 1 < len(whole):
        begun = whole[len(lines) + 1]["begun"]
        assert begun >= shown.steps, f"the log is of an earlier moment than the rest: {shown}"


@pytest.mark.parametrize(
    ("options", "in_the_middle", "at_least"),
    [(PATIENT, within_a_line, 0.5), (ROLLBACK, within_a_transaction, 0.1)],
    ids=["wal", "rollback journal"],
)
def test_an_agent_that_is_killed_again_and_again_is_shown_as_of_one_instant(
    root: Path, options: tuple[str, ...], in_the_middle: Callable[[Path], bool], at_least: float
) -> None:
    """What it leaves half done is a line of its log, a WAL to be recovered, or a hot journal."""
    with Killer(root, "--dawdle", *options, in_the_middle=in_the_middle) as killer:
        shown = take_many(root, until=lambda: bool(killer.error) or killer.kills >= KILLS)
    assert killer.error is None
    assert killer.kills_in_the_middle > 0
    assert_instants(shown, at_least=at_least)
