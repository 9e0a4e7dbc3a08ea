"""The writer's journal: what it was about to write, in order, kept outside the agent's root.

One JSON line each for `start` (the counters that a writer found), `intend` (before a step, with the
digests of what it will write) and `done` (after it). The intents, in order, are the agent's history:
between the effect of one and of the next lies one instant of the agent. Nothing here touches a store.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class Step:
    """One step of one round, as journalled. Times are wall-clock; `done_at_ms` is None if it never was."""

    round_number: int
    name: str
    digests: tuple[str, ...]
    intended_at_ms: int
    done_at_ms: int | None


@dataclass(frozen=True)
class Instant:
    """After `step` of `round_number` and before the next one; round 0 is before the first.

    The agent was like this at some time between the two limits; a limit that was not seen is None.
    """

    round_number: int
    step: str
    not_before_ms: int | None
    not_after_ms: int | None

    def __str__(self) -> str:
        return f"after step {self.step} of round {self.round_number}"


class JournalFile:
    """Appends to a journal, one write for each line."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def start(self, *, identity: dict[str, Any], counters: dict[str, int], refs: dict[str, str]) -> None:
        self._append(event="start", **identity, counters=counters, refs=refs)

    def intend(self, step: str, *, round_number: int, digests: list[str]) -> None:
        self._append(event="intend", round=round_number, step=step, digests=digests)

    def done(self, step: str, *, round_number: int) -> None:
        self._append(event="done", round=round_number, step=step)

    def close(self) -> None:
        os.close(self._descriptor)

    def _append(self, **entry: Any) -> None:
        line = json.dumps({**entry, "at_ms": time.time_ns() // 1_000_000}, separators=(",", ":"))
        os.write(self._descriptor, line.encode() + b"\n")


@dataclass(frozen=True)
class Journal:
    """A journal read back. `history` is every start and step in order; starts carry counters."""

    seed: int
    size_mb: float
    agent_id: str
    refs: dict[str, str]
    history: tuple[dict[str, int] | Step, ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises ValueError if no writer has begun it."""
        entries = list(_entries(path))
        first = next((entry for entry in entries if entry["event"] == "start"), None)
        if first is None:
            raise ValueError(f"{path}: no writer has begun this journal")
        return cls(
            seed=first["seed"],
            size_mb=first["size_mb"],
            agent_id=first["agent_id"],
            refs=first["refs"],
            history=tuple(_history(entries)),
        )

    @property
    def steps(self) -> Iterator[Step]:
        return (entry for entry in self.history if isinstance(entry, Step))

    @property
    def last_round(self) -> int:
        return max((step.round_number for step in self.steps), default=0)

    @property
    def slowest_step_ms(self) -> int:
        """The longest that the agent ever waited for one of its own writes."""
        return max(
            (s.done_at_ms - s.intended_at_ms for s in self.steps if s.done_at_ms is not None), default=0
        )

    def digests(self, step: str) -> dict[int, tuple[str, ...]]:
        """What each round wrote in `step`. A round written again (after a restore) wrote the same."""
        return {entry.round_number: entry.digests for entry in self.steps if entry.name == step}

    def instants(self) -> Iterator[tuple[dict[str, int], Instant]]:
        """Every instant of the agent, in order, with the counters of its stores."""
        counters: dict[str, int] = {}
        for position, entry in enumerate(self.history):
            following = self.history[position + 1] if position + 1 < len(self.history) else None
            not_after_ms = following.done_at_ms if isinstance(following, Step) else None
            if isinstance(entry, Step):
                counters = {**counters, entry.name: entry.round_number}
                yield counters, Instant(entry.round_number, entry.name, entry.intended_at_ms, not_after_ms)
            else:
                counters = dict(entry)
                yield counters, Instant(max(counters.values()), "start", None, not_after_ms)


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as journal:
        for line in journal:
            if line.endswith(b"\n"):  # else the writer is at this line right now
                yield json.loads(line)


def _history(entries: list[dict[str, Any]]) -> Iterator[dict[str, int] | Step]:
    for position, entry in enumerate(entries):
        if entry["event"] == "start":
            yield entry["counters"]
        elif entry["event"] == "intend":
            following = entries[position + 1] if position + 1 < len(entries) else {}
            yield Step(
                round_number=entry["round"],
                name=entry["step"],
                digests=tuple(entry["digests"]),
                intended_at_ms=entry["at_ms"],
                done_at_ms=following["at_ms"] if following.get("event") == "done" else None,
            )
