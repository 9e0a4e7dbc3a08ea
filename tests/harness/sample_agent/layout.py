"""Where the sample agent keeps what, alive and after a restore, and the order in which it writes.

Names and shapes only: nothing here opens a file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Self

from tests.harness.sample_agent import content
from tests.harness.sample_agent.content import Row

AGENT_ID = "ana"
NEIGHBOUR_ID = "bob"  # shares the registry, so that a query without its agent shows
MEMDIR = "memory"
ROUND_NOTE = "notes/round-log.md"
MODIFIED_NOTE = "MEMORY.md"
UNTRACKED_NOTE = "notes/draft.md"
BRANCH = "refs/heads/experiment"
TAG = "refs/tags/v1"
IDENTITY = "agent.json"
CURRENT_LOG = "sessions/current.jsonl"
ARCHIVED_LOGS = tuple(f"sessions/2025-12-{day:02}.jsonl" for day in (28, 29, 30))
CURSOR = "state/cursor.json"
DREAM_RUN_QUERY = "SELECT * FROM dream_runs WHERE agent_id = :agent ORDER BY started_at DESC LIMIT 1"

LOGS_SHARE = 0.14
MEMDIR_SHARE = 0.03
MEMDIR_LIMIT_BYTES = 12_000_000  # nobody writes a gigabyte of notes
REGISTRY_BASE_ROWS = 40


@dataclass(frozen=True)
class Database:
    """One SQLite file: `head` (its counter), `rounds` (what each transaction was) and a table of rows.

    Every row of the table is (id, round, *values), in the order of `columns`; round 0 is what the
    agent held before its first round. `share` is its part of the agent's whole size.
    """

    name: str
    table: str
    columns: tuple[str, ...]
    share: float
    rows_per_round: tuple[int, int]
    values: Callable[[Random, int, int], Row]  # (random, round, position in the round)
    indexed_column: str | None = None
    page_overhead: float = 1.0

    @property
    def path(self) -> str:
        return f"db/{self.name}.sqlite"


def _memory(random: Random, round_number: int, _position: int) -> Row:
    return (
        random.choice(("fact", "preference", "event", "person")),
        int(content.moment_of(round_number).timestamp() * 1000),
        f"mark{round_number} {content.text(random, words=10)}",
        content.text(random, words=random.randrange(20, 400)),
    )


def _embedding(random: Random, _round_number: int, _position: int) -> Row:
    return (random.randrange(1, 100_000), "sample-embedder", content.vector(random))


def _concept(random: Random, _round_number: int, _position: int) -> Row:
    name = content.text(random, words=2)
    return (name, content.text(random, words=random.randrange(10, 80)), random.random())


def _compaction(random: Random, _round_number: int, _position: int) -> Row:
    words = random.randrange(300, 1600)
    return (f"session-{random.getrandbits(32):08x}", words * 2, content.text(random, words=words))


def _dream_run(random: Random, round_number: int, position: int) -> Row:
    agent_id = AGENT_ID if position % 2 == 0 else NEIGHBOUR_ID
    started_at = content.moment_of(round_number or position - REGISTRY_BASE_ROWS).isoformat()
    return (agent_id, started_at, random.choice(("done", "running")), content.text(random, words=8))


DATABASES = (
    Database(
        name="long_term",
        table="memories",
        columns=("kind TEXT", "created_at_ms INTEGER", "summary TEXT", "body TEXT"),
        share=0.34,
        rows_per_round=(3, 8),
        values=_memory,
        indexed_column="summary",
        page_overhead=1.27,
    ),
    Database(
        name="vector",
        table="embeddings",
        columns=("memory_id INTEGER", "model TEXT", "vector BLOB"),
        share=0.30,
        rows_per_round=(3, 8),
        values=_embedding,
        page_overhead=1.29,
    ),
    Database(
        name="concepts",
        table="concepts",
        columns=("name TEXT", "description TEXT", "salience REAL"),
        share=0.07,
        rows_per_round=(2, 6),
        values=_concept,
        page_overhead=1.08,
    ),
    Database(
        name="compactions",
        table="compactions",
        columns=("session TEXT", "tokens INTEGER", "transcript TEXT"),
        share=0.12,
        rows_per_round=(2, 3),
        values=_compaction,
        page_overhead=1.10,
    ),
    Database(
        name="registry",
        table="dream_runs",
        columns=("agent_id TEXT", "started_at TEXT", "status TEXT", "notes TEXT"),
        share=0.0,
        rows_per_round=(2, 2),
        values=_dream_run,
    ),
)


def database(name: str) -> Database:
    return next(known for known in DATABASES if known.name == name)


# The order of the steps of a round. A store's counter is the last round in which its step was done, so
# every instant of the agent is one set of counters, and only such sets are instants.
STEPS = ("session_log", *(database.name for database in DATABASES), "cursor", "worktree", "commit")


@dataclass(frozen=True)
class RestoredPaths:
    """Where the prover finds every store. Lists name every copy of a store; all must agree."""

    memdir: Path
    databases: dict[str, Path]
    files: Path
    cursors: tuple[Path, ...]
    dream_run: Path | None
    may_end_mid_line: bool

    @classmethod
    def live(cls, root: Path) -> Self:
        """The agent's own layout: alive and quiet, copied, or restored in place."""
        return cls(
            memdir=root / MEMDIR,
            databases={database.name: root / database.path for database in DATABASES},
            files=root,
            cursors=(root / CURSOR,),
            dream_run=None,
            may_end_mid_line=True,  # a writer that was killed leaves half a line, and that is the truth
        )

    @classmethod
    def restored(cls, directory: Path) -> Self:
        """What `agentkeep restore --to DIR` leaves."""
        cursors = (directory / "state/extract_cursor.json", directory / "files" / CURSOR)
        dream_run = directory / "state/dream_run.json"
        return cls(
            memdir=directory / "memdir",
            databases={database.name: directory / "sqlite" / database.path for database in DATABASES},
            files=directory / "files",
            cursors=tuple(path for path in cursors if path.exists()),
            dream_run=dream_run if dream_run.exists() else None,
            may_end_mid_line=False,
        )

    @classmethod
    def find(cls, directory: Path) -> Self:
        """Either of the two, by what is there."""
        return cls.live(directory) if (directory / IDENTITY).exists() else cls.restored(directory)


@dataclass(frozen=True)
class Sizes:
    """How many bytes each store holds before the first round."""

    total_bytes: int

    @classmethod
    def of(cls, size_mb: float) -> Self:
        return cls(total_bytes=round(size_mb * 1_000_000))

    def database_bytes(self, database: Database) -> int:
        return round(self.total_bytes * database.share)

    @property
    def each_log_bytes(self) -> int:
        return round(self.total_bytes * LOGS_SHARE / (len(ARCHIVED_LOGS) + 1))

    @property
    def memdir_bytes(self) -> int:
        return min(round(self.total_bytes * MEMDIR_SHARE), MEMDIR_LIMIT_BYTES)
