"""The story: an agent at work, a daemon that keeps it safe, a lost host, a recovery, and the proof.

Each chapter does one thing for real and says what came of it; whatever fails ends the story.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from demo.bucket import Destination, bundles
from demo.configuration import write_configuration
from demo.host import Daemon, DemoError, Host
from demo.narrator import Narrator, size
from tests.harness.sample_agent import (
    DATABASES,
    STEPS,
    Journal,
    Proof,
    ProofError,
    RestoredPaths,
    build,
    prove,
    running_writer,
)
from tests.harness.sample_agent.builder import GitCommandError, run_git
from tests.harness.sample_agent.process import RunningWriter

AGENT = "ana"
SIZE_MB = 20.0
SEED = 2026
SNAPSHOTS = 3
SCHEDULE = "every 4s"
_WRITER_PAUSE_MS = 30.0
_SNAPSHOTS_LIMIT = 8
_SNAPSHOTS_LIMIT_SECONDS = 90.0
_SHORT_ID_LENGTH = 13  # of a UUIDv7: its time, as good as unique among one agent's


@dataclass(frozen=True)
class Snapshot:
    """What the demo remembers of a snapshot once its host is gone: in real life, a line in a runbook."""

    snapshot_id: str
    url: str
    size_bytes: int


def tell(narrator: Narrator, *, directory: Path, destination: AbstractContextManager[Destination]) -> Proof:
    """Raises DemoError. Everything that is started here is stopped here; `directory` is the caller's."""
    narrator.title("agentkeep: an agent is lost and brought back")
    first_home = directory / "first-host"
    first_home.mkdir()
    root, journal = first_home / AGENT, directory / "journal.jsonl"
    with narrator.chapter("A sample agent"):
        _make_agent(narrator, root)
    with ExitStack() as running:
        with narrator.chapter("A place off the host"):
            place = running.enter_context(destination)
            narrator.say(place.name)
        host = Host(home=first_home, credentials=place.environment)
        with running_writer(root, journal=journal, pause_ms=_WRITER_PAUSE_MS) as writer:
            snapshot = _protect(narrator, host, place, root=root, writer=writer)
        with narrator.chapter("The host is lost"):
            _lose(narrator, first_home, journal=journal)
        second_home = directory / "second-host"
        second_home.mkdir()
        with narrator.chapter("Another host: an empty directory, no configuration, one bucket key"):
            restored = _recover(narrator, Host(second_home, place.environment), place, snapshot)
    with narrator.chapter("Is it what was written?"):
        return _examine(narrator, restored, journal=journal)


def _make_agent(narrator: Narrator, root: Path) -> None:
    build(root, seed=SEED, size_mb=SIZE_MB, agent_id=AGENT)
    total_bytes = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    commits = run_git(root / "memory", "rev-list", "--all", "--count").strip()
    narrator.say(
        f"{size(total_bytes)} of memory: {len(DATABASES)} SQLite databases in WAL mode, one with a full-text "
        f"index; a git repository with {commits} commits, a branch, a tag and uncommitted work; session "
        "logs; a cursor."
    )


def _protect(
    narrator: Narrator, host: Host, place: Destination, *, root: Path, writer: RunningWriter
) -> Snapshot:
    configuration = write_configuration(host.home, place, agent_id=AGENT, root=root, schedule=SCHEDULE)
    configured = ("--config", configuration.name)
    with narrator.chapter(f"The daemon takes a snapshot {SCHEDULE}, while the agent keeps writing"):
        narrator.command("agentkeep", *configured, "run")
        with host.daemon(*configured, "run") as daemon, narrator.waiting("snapshots are being taken"):
            _await_snapshots(daemon, host, place, configured=configured)
            daemon.stop()
        writer.stop()
        snapshots = _list_snapshots(host, configured)
        narrator.say("SIGTERM: the daemon has exited with 0. It had taken:")
        _show_snapshots(narrator, snapshots)
        _show_writer(narrator, writer)
    with narrator.chapter(f"What is at {place.url}"):
        _show_objects(narrator, place.objects())
    return _newest_sound(snapshots, place)


def _await_snapshots(daemon: Daemon, host: Host, place: Destination, *, configured: Sequence[str]) -> None:
    """Some bundles, at least one of them of one instant: a busy host may need more than a few tries."""
    for wanted in range(SNAPSHOTS, _SNAPSHOTS_LIMIT + 1):
        daemon.wait_until(
            partial(_has_bundles, place, wanted),
            what=f"{wanted} bundles at the destination",
            limit_seconds=_SNAPSHOTS_LIMIT_SECONDS,
        )
        if any(map(_is_sound, _list_snapshots(host, configured))):
            return


def _has_bundles(place: Destination, count: int) -> bool:
    return len(bundles(place)) >= count


def _list_snapshots(host: Host, configured: Sequence[str]) -> list[dict[str, Any]]:
    listed = host.agentkeep_json(*configured, "list", AGENT)["snapshots"]
    return sorted(listed, key=itemgetter("snapshot_id"))


def _show_snapshots(narrator: Narrator, snapshots: list[dict[str, Any]]) -> None:
    rows = [
        (
            snapshot["snapshot_id"][:_SHORT_ID_LENGTH],
            _clock(snapshot["created_at_ms"]),
            _what_it_shows(snapshot),
            f"{snapshot['consistency']['window_ms']} ms",
            size(snapshot["size_bytes"]),
            ", ".join(snapshot["uploads"].values()),
        )
        for snapshot in snapshots
    ]
    headings = ("snapshot", "taken at", "shows", "window", "bundle", "upload")
    narrator.table(*headings, rows=rows, numbers=(3, 4))


def _what_it_shows(snapshot: dict[str, Any]) -> str:
    if not snapshot["complete"]:
        return "a part of the agent"
    return "one instant" if _is_one_instant(snapshot["consistency"]) else "each source by itself"


def _show_writer(narrator: Narrator, writer: RunningWriter) -> None:
    journal = Journal.read(writer.journal)
    narrator.say(
        f"Meanwhile the agent has written {journal.last_round} rounds to each of its stores; "
        f"the slowest of its writes took {journal.slowest_step_ms} ms."
    )


def _show_objects(narrator: Narrator, objects: dict[str, int]) -> None:
    for directory, keys in groupby(sorted(objects), key=lambda key: key.rpartition("/")[0]):
        narrator.say(f"{directory}/")
        rows = [(key.rpartition("/")[2], size(objects[key])) for key in keys]
        narrator.table("", "", rows=rows, numbers=(1,))


def _is_one_instant(consistency: dict[str, Any]) -> bool:
    return bool(consistency["level"] == "point_in_time")


def _is_sound(snapshot: dict[str, Any]) -> bool:
    return bool(snapshot["complete"]) and _is_one_instant(snapshot["consistency"])


def _newest_sound(snapshots: list[dict[str, Any]], place: Destination) -> Snapshot:
    """The newest that is of one instant and at the destination. Raises DemoError."""
    keys = bundles(place)
    sound = [entry for entry in snapshots if _is_sound(entry) and entry["snapshot_id"] in keys]
    if not sound:
        said = "\n".join(f"{entry['snapshot_id']}: {entry['consistency']}" for entry in snapshots)
        raise DemoError("none of the snapshots is complete and of one instant", detail=said)
    snapshot_id = sound[-1]["snapshot_id"]
    return Snapshot(snapshot_id, f"{place.url}/{keys[snapshot_id]}", sound[-1]["size_bytes"])


def _lose(narrator: Narrator, home: Path, *, journal: Path) -> None:
    shutil.rmtree(home)
    narrator.say(
        "Deleted: the agent's directory, agentkeep's state, its configuration. Left: the bucket, and this "
        f"demo's own record of what the agent wrote ({size(journal.stat().st_size)}), to compare with."
    )


def _recover(narrator: Narrator, host: Host, place: Destination, snapshot: Snapshot) -> Path:
    arguments = ["restore", snapshot.url, "--to", AGENT]
    if place.endpoint_url is not None:
        arguments += ["--endpoint-url", place.endpoint_url]
    narrator.command("agentkeep", *arguments)
    host.agentkeep(*arguments, "--yes")
    restored = host.home / AGENT
    restored_bytes = sum(path.stat().st_size for path in restored.rglob("*") if path.is_file())
    parts = ", ".join(sorted(f"{path.name}/" for path in restored.iterdir() if path.is_dir()))
    narrator.say(f"{size(snapshot.size_bytes)} fetched, {size(restored_bytes)} restored: {parts}")
    return restored


def _examine(narrator: Narrator, restored: Path, *, journal: Path) -> Proof:
    try:
        run_git(restored / "memdir", "fsck", "--full", "--strict")
        narrator.say("git fsck --full --strict has nothing to say against the repository.")
        proof = prove(RestoredPaths.restored(restored), journal)
    except (ProofError, GitCommandError) as exc:
        raise DemoError(f"{type(exc).__name__}: {exc}") from exc
    narrator.say(
        f"{proof.total_rows_checked:,} rows, {proof.log_lines_checked:,} log lines and "
        f"{proof.objects_checked:,} git objects are each as they were written."
    )
    narrator.say("The last round that each store has, in the order in which a round writes to them:")
    narrator.table("", "", rows=_rounds(proof))
    not_before_ms, not_after_ms = proof.instant.not_before_ms, proof.instant.not_after_ms
    if not_before_ms is not None and not_after_ms is not None:
        narrator.say(
            f"The agent was exactly like this once: {proof.instant}, "
            f"between {_clock(not_before_ms)} and {_clock(not_after_ms)}."
        )
    return proof


def _rounds(proof: Proof) -> list[tuple[str, str]]:
    by_round = groupby(STEPS, key=lambda step: proof.counters[step])
    return [(f"round {round_number}", ", ".join(steps)) for round_number, steps in by_round]


def _clock(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000).astimezone().strftime("%H:%M:%S.%f")[:-3]
