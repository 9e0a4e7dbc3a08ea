"""Proves that what came back is one instant of what the agent wrote.

Reads the restored stores and the journal; changes no byte of either (databases are judged as copies,
because SQLite writes beside what it reads). Knows nothing of how the stores were backed up.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tests.harness.sample_agent import content, layout, prove_database, prove_memdir
from tests.harness.sample_agent.journal import Instant, Journal
from tests.harness.sample_agent.layout import RestoredPaths, Sizes
from tests.harness.sample_agent.verdicts import ChangedContent, MissingContent, NotOneInstant, TornTransaction


@dataclass(frozen=True)
class Proof:
    """What was shown: the counter of every store, how much was compared, and which instant it is."""

    counters: dict[str, int]
    rows_checked: dict[str, int]
    log_lines_checked: int
    objects_checked: int
    instant: Instant

    @property
    def total_rows_checked(self) -> int:
        return sum(self.rows_checked.values())


def prove(restored: RestoredPaths, journal: Journal | Path, *, scratch: Path | None = None) -> Proof:
    """Raises ProofError. `scratch` needs room for the largest database; default: the system's."""
    written = Journal.read(journal) if isinstance(journal, Path) else journal
    _check_identity(restored, written)
    counters: dict[str, int] = {}
    rows_checked: dict[str, int] = {}
    newest_dream_run: dict[str, Any] = {}
    log_line_count, counters["session_log"] = _check_logs(restored, written)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="proof-") as directory:
        for database in layout.DATABASES:
            with prove_database.opened_copy(restored.databases[database.name], Path(directory)) as connection:
                verdict = prove_database.check(connection, database, written)
                if database.name == "registry":
                    newest_dream_run = prove_database.newest_dream_run(connection, agent_id=written.agent_id)
            counters[database.name], rows_checked[database.name] = verdict
    counters["cursor"] = _check_cursors(restored, written)
    _check_dream_run(restored, newest_dream_run)
    memdir = prove_memdir.check(restored.memdir, written)
    counters["worktree"], counters["commit"] = memdir.worktree_round, memdir.commit_round
    instant = find_instant(counters, written)
    return Proof(counters, rows_checked, log_line_count, memdir.object_count, instant)


def find_instant(counters: dict[str, int], journal: Journal) -> Instant:
    """The moment of the writer's history that had these counters. Raises NotOneInstant."""
    closest, fewest_differences = "", len(counters) + 1
    for at_instant, instant in journal.instants():
        different = [store for store in layout.STEPS if at_instant[store] != counters[store]]
        if not different:
            return instant
        if len(different) < fewest_differences:
            fewest_differences = len(different)
            wrong = ", ".join(f"{store} at {counters[store]}, not {at_instant[store]}" for store in different)
            closest = f"closest: {instant}, but for {wrong}"
    seen = ", ".join(f"{store}={counters[store]}" for store in layout.STEPS)
    raise NotOneInstant(f"no instant of the agent had {seen}; {closest}")


def _check_identity(restored: RestoredPaths, journal: Journal) -> None:
    expected = content.identity_document(
        agent_id=journal.agent_id, seed=journal.seed, size_mb=journal.size_mb
    )
    if read_file(restored.files / layout.IDENTITY) != expected:
        raise ChangedContent(f"{layout.IDENTITY}: not what was written")


def _check_logs(restored: RestoredPaths, journal: Journal) -> tuple[int, int]:
    """Every line of every session log; returns how many, and the round of the last."""
    line_count = 0
    for name in layout.ARCHIVED_LOGS:
        line_count += _compare_lines(restored, name, expected=_base_lines(name, journal))
    digests = journal.digests("session_log")

    def expected_lines() -> Iterator[str]:
        yield from _base_lines(layout.CURRENT_LOG, journal)
        for round_number in range(1, max(digests, default=0) + 1):
            yield digests[round_number][0]

    line_count += _compare_lines(restored, layout.CURRENT_LOG, expected=expected_lines(), may_be_shorter=True)
    return line_count, _last_round_logged(restored.files / layout.CURRENT_LOG)


def _base_lines(name: str, journal: Journal) -> Iterator[str]:
    size_bytes = Sizes.of(journal.size_mb).each_log_bytes
    return map(content.digest, content.base_log_lines(journal.seed, name, size_bytes=size_bytes))


def _compare_lines(
    restored: RestoredPaths, name: str, *, expected: Iterator[str], may_be_shorter: bool = False
) -> int:
    line_count = 0
    for number, (line, digest) in enumerate(zip_longest(_lines(restored, name), expected), start=1):
        if line is None and may_be_shorter:
            break
        if line is None:
            raise MissingContent(f"{name}: ends before line {number}")
        if digest is None or content.digest(line) != digest:
            raise ChangedContent(f"{name}: line {number} was never written like this")
        line_count = number
    return line_count


def _lines(restored: RestoredPaths, name: str) -> Iterator[bytes]:
    path = restored.files / name
    if not path.exists():
        raise MissingContent(f"{name}: not there")
    with path.open("rb") as log:
        for line in log:
            if line.endswith(b"\n"):
                yield line
            elif not restored.may_end_mid_line:
                raise TornTransaction(f"{name}: ends in the middle of a line")


def _last_round_logged(path: Path) -> int:
    last_line = b""
    with path.open("rb") as log:
        for line in log:
            last_line = line if line.endswith(b"\n") else last_line
    return int(json.loads(last_line)["round"])


def _check_cursors(restored: RestoredPaths, journal: Journal) -> int:
    """The extract cursor, of which a restore may leave a copy as a file and one as a state value."""
    if not restored.cursors:
        raise MissingContent("the extract cursor is nowhere")
    documents = [read_file(path) for path in restored.cursors]
    if len(set(documents)) > 1:
        raise NotOneInstant(f"copies of the extract cursor differ: {_names(restored.cursors)}")
    round_number = int(json.loads(documents[0])["round"])
    if round_number > 0:
        check_digest("cursor", documents[0], journal.digests("cursor").get(round_number))
    return round_number


def _check_dream_run(restored: RestoredPaths, newest: dict[str, Any]) -> None:
    """The captured row and the captured registry are of one instant only if they agree."""
    if restored.dream_run is None:
        return
    captured = json.loads(read_file(restored.dream_run))
    if captured != [newest]:
        raise NotOneInstant(f"the dream_run value is {captured}, and the registry's newest row is {newest}")


def check_digest(store: str, found: bytes, digests: Sequence[str] | None) -> None:
    if digests is None or content.digest(found) not in digests:
        raise ChangedContent(f"{store}: was never written like this: {found[:80]!r}")


def read_file(path: Path) -> bytes:
    if not path.exists():
        raise MissingContent(f"{path}: not there")
    return path.read_bytes()


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(str(path) for path in paths)
