"""The story: an agent at work, a daemon that keeps it safe, a lost host, a recovery, and the proof.

Each chapter does one thing for real and says what came of it; whatever fails ends the story.
"""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
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
_WRITER_PAUSE_MS = 15.0
_SNAPSHOTS_LIMIT_SECONDS = 90.0


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
    with destination as place:
        host = Host(home=first_home, credentials=place.environment)
        with narrator.chapter("A place off the host"):
            narrator.say(f"{place.name}\nbundles will go to [bold]{place.url}[/]")
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
    command = ("--config", configuration.name, "run")
    with narrator.chapter(f"The daemon snapshots it, {SCHEDULE}, while it keeps writing"):
        narrator.command("agentkeep", *command)
        with host.daemon(*command) as daemon:
            _await_snapshots(daemon, place)
            narrator.say("SIGTERM")
            daemon.stop()
        writer.stop()
        snapshots = host.agentkeep_json("--config", configuration.name, "list", AGENT)["snapshots"]
        narrator.say("The daemon has finished its work and exited with 0. It took:")
        _show_snapshots(narrator, snapshots)
        _show_writer(narrator, writer)
    with narrator.chapter("What is in the bucket"):
        rows = [(key, size(size_bytes)) for key, size_bytes in sorted(place.objects().items())]
        narrator.table("key", "size", rows=rows, numbers=(1,))
    return _newest(snapshots, place)


def _await_snapshots(daemon: Daemon, place: Destination) -> None:
    daemon.wait_until(
        lambda: len(bundles(place)) >= SNAPSHOTS,
        what=f"{SNAPSHOTS} bundles at the destination",
        limit_seconds=_SNAPSHOTS_LIMIT_SECONDS,
    )


def _show_snapshots(narrator: Narrator, snapshots: list[dict[str, Any]]) -> None:
    rows = [
        (
            snapshot["snapshot_id"],
            _clock(snapshot["created_at_ms"]),
            "complete" if snapshot["complete"] else "in part",
            _consistency(snapshot["consistency"]),
            size(snapshot["size_bytes"]),
            ", ".join(f"{where}: {state}" for where, state in snapshot["uploads"].items()),
        )
        for snapshot in sorted(snapshots, key=lambda entry: entry["snapshot_id"])
    ]
    narrator.table("snapshot", "taken", "", "consistency", "bundle", "upload", rows=rows, numbers=(4,))


def _consistency(consistency: dict[str, Any]) -> str:
    level = consistency["level"].replace("_", " ")
    window_ms = consistency.get("window_ms")
    return level if window_ms is None else f"{level}, {window_ms:.1f} ms"


def _show_writer(narrator: Narrator, writer: RunningWriter) -> None:
    journal = Journal.read(writer.journal)
    narrator.say(
        f"Meanwhile the agent has written {journal.last_round} rounds to each of its stores; "
        f"the slowest of its writes took {journal.slowest_step_ms} ms."
    )


def _newest(snapshots: list[dict[str, Any]], place: Destination) -> Snapshot:
    """The newest that is one point in time and in the bucket. Raises DemoError."""
    keys = bundles(place)
    sound = [
        snapshot
        for snapshot in snapshots
        if snapshot["complete"]
        and snapshot["consistency"]["level"] == "point_in_time"
        and snapshot["snapshot_id"] in keys
    ]
    if not sound:
        raise DemoError("none of the snapshots is complete and one point in time", detail=str(snapshots))
    newest = max(sound, key=lambda snapshot: snapshot["snapshot_id"])
    snapshot_id = newest["snapshot_id"]
    return Snapshot(snapshot_id, f"{place.url}/{keys[snapshot_id]}", newest["size_bytes"])


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
    narrator.table(*STEPS, rows=[[str(proof.counters[step]) for step in STEPS]], numbers=range(len(STEPS)))
    not_before_ms, not_after_ms = proof.instant.not_before_ms, proof.instant.not_after_ms
    if not_before_ms is not None and not_after_ms is not None:
        narrator.say(
            f"The agent was exactly like this once: {proof.instant}, "
            f"between {_clock(not_before_ms)} and {_clock(not_after_ms)}."
        )
    return proof


def _clock(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000).astimezone().strftime("%H:%M:%S.%f")[:-3]
