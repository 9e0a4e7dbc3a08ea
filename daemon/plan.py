"""What a snapshot of an agent would capture, what not, and why, before one is taken.

Looks at the agent as a snapshot does: names, sizes, and the first bytes of files. Nothing is written, no
database and no repository is opened, no command is run; what only shows then is for `check` to find.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import nlargest
from operator import attrgetter

from daemon.capture.cut import require_root, with_memdir
from daemon.capture.scan import Scan, Scanner, spec_path
from daemon.model import AgentSpec, Failure, StateSource

DATABASE, MEMORY_FILE, FILE = "database", "memory file", "file"
_MOST_BIGGEST = 10


@dataclass(frozen=True, slots=True)
class Entry:
    path: str
    kind: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Total:
    count: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class StateEntry:
    """A state value; `where` is its file, its database or its command's program."""

    name: str
    kind: str
    where: str
    is_there: bool


@dataclass(frozen=True, slots=True)
class LeftOut:
    reason: str
    pattern: str
    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Paths are relative to the agent's root. What is in `failures` would make the snapshot incomplete.

    spec: the agent, its memdir found
    has_repository: whether the memdir is captured as a git repository
    biggest: the largest first, some; databases: all, by path
    """

    spec: AgentSpec
    has_repository: bool
    totals: dict[str, Total]
    symlinks: int
    databases: tuple[Entry, ...]
    biggest: tuple[Entry, ...]
    states: tuple[StateEntry, ...]
    left_out: tuple[LeftOut, ...]
    failures: tuple[Failure, ...]

    @property
    def size_bytes(self) -> int:
        return sum(total.size_bytes for total in self.totals.values())


def plan_snapshot(spec: AgentSpec) -> Plan:
    """Raises AgentNotFound if there is nothing where the agent should live."""
    require_root(spec)
    spec = with_memdir(spec)
    found = Scanner(spec).scan()
    entries = _entries(spec, found)
    states = tuple(_state_entry(spec, source) for source in spec.states)
    return Plan(
        spec=spec,
        has_repository=spec.memdir is not None and os.path.exists(spec.memdir / ".git"),  # noqa: PTH110
        totals={kind: _total(entries, kind) for kind in (DATABASE, MEMORY_FILE, FILE)},
        symlinks=len(found.symlinks),
        databases=tuple(entry for entry in entries if entry.kind == DATABASE),
        biggest=tuple(nlargest(_MOST_BIGGEST, entries, key=attrgetter("size_bytes"))),
        states=states,
        left_out=_left_out(found),
        failures=(*found.failures.values(), *found.suspects.values(), *_further(spec, entries)),
    )


def _entries(spec: AgentSpec, found: Scan) -> list[Entry]:
    memdir = spec.relative(spec.memdir) if spec.memdir is not None else None

    def kind_of(path: str) -> str:
        is_memory = memdir == "." or (memdir is not None and path.startswith(f"{memdir}/"))
        return MEMORY_FILE if is_memory else FILE

    databases = [Entry(path, DATABASE, signature.size_bytes) for path, signature in found.databases.items()]
    files = [Entry(path, kind_of(path), signature.size_bytes) for path, signature in found.files.items()]
    return sorted([*databases, *files], key=attrgetter("path"))


def _total(entries: list[Entry], kind: str) -> Total:
    sizes = [entry.size_bytes for entry in entries if entry.kind == kind]
    return Total(len(sizes), sum(sizes))


def _state_entry(spec: AgentSpec, source: StateSource) -> StateEntry:
    if source.command:
        return StateEntry(source.name, "command", source.command[0], is_there=True)
    kind, path = ("file", source.file) if source.file is not None else ("rows", source.sqlite)
    assert path is not None
    return StateEntry(source.name, kind, spec_path(spec, path), is_there=os.path.lexists(path))


def _left_out(found: Scan) -> tuple[LeftOut, ...]:
    return tuple(
        LeftOut(reason, pattern, count, tuple(sorted(found.examples[reason, pattern])))
        for (reason, pattern), count in sorted(found.excluded.items())
    )


def _unreadable(spec: AgentSpec, entries: list[Entry]) -> Iterator[Failure]:
    for entry in entries:
        path = spec.root / entry.path
        if not os.access(path, os.R_OK) and os.path.lexists(path):
            yield Failure(
                source=str(path),
                reason="cannot be read: Permission denied",
                hint="run agentkeep as the user who owns the agent's files, or exclude this one",
            )


def _unknown_programs(spec: AgentSpec) -> Iterator[Failure]:
    commands = {"before": spec.before, "after": spec.after}
    commands |= {f"state {source.name}": source.command for source in spec.states}
    for name, command in commands.items():
        # As it is found when it runs: relative to the root, if its name has a slash.
        program = command[0] if command and "/" not in command[0] else str(spec.root / (command or [""])[0])
        if command and shutil.which(program) is None:
            yield Failure(
                source=f"command {name!r}",
                reason=f"{command[0]} is no program that could be started",
                hint="mend it in the configuration, or install the program",
            )


def _further(spec: AgentSpec, entries: list[Entry]) -> list[Failure]:
    """What a snapshot would name besides what a scan does."""
    missing = [
        Failure(
            source=str(path),
            reason=f"nothing is there for the state value {source.name!r}",
            hint="mend the path in the configuration, or take the value out of it",
        )
        for source in spec.states
        if (path := source.file or source.sqlite) and not source.optional and not os.path.lexists(path)
    ]
    missing += [*_unreadable(spec, entries), *_unknown_programs(spec)]
    size_bytes = sum(entry.size_bytes for entry in entries)
    if spec.max_agent_bytes is None or size_bytes <= spec.max_agent_bytes:
        return missing
    too_large = Failure(
        source=str(spec.root),
        reason=f"has {size_bytes:,} bytes; max_agent_bytes allows {spec.max_agent_bytes:,}",
        hint="raise max_agent_bytes for this agent, or exclude something",
    )
    return [*missing, too_large]
