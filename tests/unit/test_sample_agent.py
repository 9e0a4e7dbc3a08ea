"""The prover is only worth what it refuses: copies that are sound piece by piece and wrong together."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.sample_agent import (
    DATABASES,
    STEPS,
    ChangedContent,
    MissingContent,
    NotOneInstant,
    ProofError,
    RestoredPaths,
    SampleWriter,
    TornTransaction,
    build,
    prove,
    running_writer,
)
from tests.harness.sample_agent.builder import run_git

SEED = 7
SIZE_MB = 0.3


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("built") / "ana"
    build(root, seed=SEED, size_mb=SIZE_MB)
    return root


@pytest.fixture
def agent(built: Path, tmp_path: Path) -> Path:
    return _copy(built, tmp_path / "ana")


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


@pytest.fixture
def writer(agent: Path, journal: Path) -> Iterator[SampleWriter]:
    with SampleWriter(agent, journal=journal, commit_every_rounds=2) as writer:
        yield writer


@pytest.fixture(scope="module")
def restored_once(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven rounds and a half, as `agentkeep restore --to` would lay them out, and their journal."""
    directory = tmp_path_factory.mktemp("restored")
    agent = _copy(built, directory / "ana")
    with SampleWriter(agent, journal=directory / "journal.jsonl", commit_every_rounds=2) as writer:
        writer.write_until(round_number=8, step="concepts")
    _laid_out_as_restored(agent, directory / "restored")
    return directory


@pytest.fixture
def restored(restored_once: Path, journal: Path, tmp_path: Path) -> Path:
    _copy(restored_once / "journal.jsonl", journal)
    return _copy(restored_once / "restored", tmp_path / "restored")


def test_accepts_a_quiet_agent(agent: Path, journal: Path) -> None:
    with SampleWriter(agent, journal=journal, commit_every_rounds=2) as writer:
        writer.write_until(round_number=4)
    proof = prove(RestoredPaths.live(agent), journal)
    assert set(proof.counters.values()) == {4}
    assert (proof.instant.round_number, proof.instant.step) == (4, "commit")
    assert proof.total_rows_checked > 200


def test_accepts_every_step_boundary(
    writer: SampleWriter, agent: Path, journal: Path, tmp_path: Path
) -> None:
    seen = []
    for number in range(2 * len(STEPS)):
        expected = writer.next_step()
        proof = prove(RestoredPaths.live(_copy(agent, tmp_path / f"copy-{number}")), journal)
        assert (proof.instant.round_number, proof.instant.step) == expected
        seen.append(expected)
    assert seen[len(STEPS) - 1] == (2, "session_log")  # round 1 of two commits nothing
    assert (2, "commit") in seen


def test_accepts_what_a_restore_lays_out(restored: Path, journal: Path) -> None:
    proof = prove(RestoredPaths.find(restored), journal)
    assert (proof.instant.round_number, proof.instant.step) == (8, "concepts")
    assert proof.counters["commit"] == 6
    assert proof.counters["compactions"] == 7


def test_changes_nothing_of_what_it_judges(restored: Path, journal: Path) -> None:
    before = _listing(restored)
    prove(RestoredPaths.find(restored), journal)
    assert _listing(restored) == before


@pytest.mark.parametrize("store", [database.path for database in DATABASES])
def test_refuses_one_database_of_another_moment(
    writer: SampleWriter, agent: Path, journal: Path, tmp_path: Path, store: str
) -> None:
    writer.write_until(round_number=2)
    earlier = _copy(agent, tmp_path / "earlier")
    writer.write_until(round_number=5)
    mixture = _copy(agent, tmp_path / "mixture")
    _replace_database(mixture / store, earlier / store)
    with pytest.raises(NotOneInstant, match=Path(store).stem):
        prove(RestoredPaths.live(mixture), journal)


@pytest.mark.parametrize("store", ["sessions/current.jsonl", "state/cursor.json", "memory"])
def test_refuses_files_and_memdir_of_another_moment(
    writer: SampleWriter, agent: Path, journal: Path, tmp_path: Path, store: str
) -> None:
    writer.write_until(round_number=2)
    mixture = _copy(agent, tmp_path / "mixture")
    writer.write_until(round_number=5)
    _remove(mixture / store)
    _copy(agent / store, mixture / store)
    with pytest.raises(NotOneInstant):
        prove(RestoredPaths.live(mixture), journal)


def test_refuses_a_later_store_that_runs_ahead_by_one_step(
    writer: SampleWriter, agent: Path, journal: Path, tmp_path: Path
) -> None:
    """`concepts` is written after `vector`, so it is never ahead of it."""
    writer.write_until(round_number=3, step="long_term")
    mixture = _copy(agent, tmp_path / "mixture")
    writer.write_until(round_number=3, step="concepts")
    later = _copy(agent, tmp_path / "later")
    _replace_database(mixture / "db/concepts.sqlite", later / "db/concepts.sqlite")
    with pytest.raises(NotOneInstant, match="concepts at 3, not 2"):
        prove(RestoredPaths.live(mixture), journal)


def test_refuses_databases_copied_without_their_wal(
    writer: SampleWriter, agent: Path, journal: Path, tmp_path: Path
) -> None:
    writer.write_until(round_number=2)
    copy = _copy(agent, tmp_path / "copy")
    unmerged = [wal for wal in (copy / "db").glob("*-wal") if wal.stat().st_size]
    assert unmerged
    for wal in unmerged:
        wal.unlink()
    with pytest.raises(ProofError):
        prove(RestoredPaths.live(copy), journal)


Damage = Callable[[Path], None]


def _in_database(name: str, *statements: str) -> Damage:
    def damage(restored: Path) -> None:
        connection = sqlite3.connect(restored / f"sqlite/db/{name}.sqlite", isolation_level=None)
        for statement in statements:
            connection.execute(statement)
        connection.close()

    return damage


def _in_file(path: str, change: Callable[[bytes], bytes]) -> Damage:
    def damage(restored: Path) -> None:
        target = restored / path
        target.write_bytes(change(target.read_bytes()))

    return damage


def _without(path: str) -> Damage:
    return lambda restored: _remove(restored / path)


def _git(*arguments: str) -> Damage:
    def damage(restored: Path) -> None:
        run_git(restored / "memdir", *arguments)

    return damage


@pytest.mark.parametrize(
    ("damage", "verdict", "named"),
    [
        pytest.param(
            _in_database("long_term", "DELETE FROM memories WHERE id = (SELECT max(id) FROM memories)"),
            TornTransaction,
            "long_term: round 8",
            id="a row short of its transaction",
        ),
        pytest.param(
            _in_database("vector", "UPDATE head SET round = round - 1"),
            TornTransaction,
            "vector: head",
            id="a counter without its rows",
        ),
        pytest.param(
            _in_database("long_term", "DELETE FROM memories_fts WHERE rowid = 3"),
            TornTransaction,
            "full-text",
            id="a row that the full-text index lacks",
        ),
        pytest.param(
            _in_database("concepts", "UPDATE concepts SET salience = 2 WHERE id = 5"),
            ChangedContent,
            "concepts: row 5",
            id="a changed row of the base",
        ),
        pytest.param(
            _in_database("compactions", "UPDATE compactions SET tokens = 1 WHERE round = 3"),
            ChangedContent,
            "compactions: round 3",
            id="a changed row of a round",
        ),
        pytest.param(
            _in_file("sqlite/db/vector.sqlite", lambda held: held[:8192] + bytes(4096) + held[12288:]),
            ChangedContent,
            "vector",
            id="a page of zeros",
        ),
        pytest.param(
            _in_file("files/sessions/current.jsonl", lambda held: held[:-10]),
            TornTransaction,
            "middle of a line",
            id="half a log line",
        ),
        pytest.param(
            _in_file("files/sessions/2025-12-29.jsonl", lambda held: held.replace(b"user", b"USER", 1)),
            ChangedContent,
            "2025-12-29",
            id="a changed log line",
        ),
        pytest.param(
            _in_file("state/extract_cursor.json", lambda held: held.replace(b'"round": 7', b'"round": 6')),
            NotOneInstant,
            "copies of the extract cursor differ",
            id="two cursors",
        ),
        pytest.param(
            _in_file("state/dream_run.json", lambda held: held.replace(b'"round": 7', b'"round": 6')),
            NotOneInstant,
            "dream_run",
            id="a dream_run of another moment",
        ),
        pytest.param(
            _git("update-ref", "-d", "refs/heads/experiment"), MissingContent, "experiment", id="no branch"
        ),
        pytest.param(_git("update-ref", "-d", "refs/tags/v1"), MissingContent, "v1", id="no tag"),
        pytest.param(
            _git("checkout", "--force", "HEAD", "--", "MEMORY.md"),
            ChangedContent,
            "uncommitted",
            id="an uncommitted change lost",
        ),
        pytest.param(_without("memdir/notes/draft.md"), MissingContent, "draft.md", id="no untracked file"),
        pytest.param(
            _without("memdir/notes/note-00000.md"), MissingContent, "note-00000", id="no tracked file"
        ),
        pytest.param(_without("sqlite/db/concepts.sqlite"), MissingContent, "concepts", id="no database"),
    ],
)
def test_refuses(
    restored: Path, journal: Path, damage: Damage, verdict: type[ProofError], named: str
) -> None:
    damage(restored)
    with pytest.raises(verdict, match=named):
        prove(RestoredPaths.find(restored), journal)


def test_a_killed_writer_is_continued_where_it_was(agent: Path, journal: Path) -> None:
    with running_writer(agent, journal=journal, pause_ms=1) as process:
        process.wait_for_round(3)
        process.kill()
    left = prove(RestoredPaths.live(agent), journal)
    with SampleWriter(agent, journal=journal) as writer:
        assert writer.counters == left.counters
        writer.write_until(round_number=left.instant.round_number + 1)
    assert prove(RestoredPaths.live(agent), journal).instant.round_number == left.instant.round_number + 1


def test_a_stopped_writer_ends_between_two_steps(agent: Path, journal: Path) -> None:
    with running_writer(agent, journal=journal, pause_ms=1) as process:
        process.wait_for_round(2)
        process.stop()
    proof = prove(RestoredPaths.live(agent), journal)
    assert proof.instant.round_number >= 2
    assert proof.instant.not_before_ms is not None


def test_the_same_seed_builds_the_same_agent(built: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    build(again, seed=SEED, size_mb=SIZE_MB)
    assert _listing(again, skip=".git") == _listing(built, skip=".git")
    assert _refs(again) == _refs(built)


def _copy(source: Path, target: Path) -> Path:
    # By another process: closing a descriptor of a database in this one would drop the writer's locks.
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)
    return target


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _replace_database(target: Path, source: Path) -> None:
    for suffix in ("", "-wal"):
        target.with_name(target.name + suffix).unlink(missing_ok=True)
        if source.with_name(source.name + suffix).exists():
            _copy(source.with_name(source.name + suffix), target.with_name(target.name + suffix))


def _laid_out_as_restored(live: Path, target: Path) -> Path:
    (target / "sqlite/db").mkdir(parents=True)
    (target / "state").mkdir()
    for database in DATABASES:
        with_wal = sqlite3.connect(live / database.path)
        with_wal.execute("VACUUM INTO ?", (str(target / "sqlite" / database.path),))
        with_wal.close()
    registry = sqlite3.connect(target / "sqlite/db/registry.sqlite")
    registry.row_factory = sqlite3.Row
    newest = registry.execute(
        "SELECT * FROM dream_runs WHERE agent_id = 'ana' ORDER BY started_at DESC"
    ).fetchone()
    (target / "state/dream_run.json").write_text(json.dumps([dict(newest)]))
    registry.close()
    shutil.copytree(live / "memory", target / "memdir")
    shutil.copytree(live / "sessions", target / "files/sessions")
    shutil.copytree(live / "state", target / "files/state")
    shutil.copy(live / "agent.json", target / "files/agent.json")
    shutil.copy(live / "state/cursor.json", target / "state/extract_cursor.json")
    return target


def _listing(root: Path, *, skip: str = "") -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in files
        if not skip or skip not in path.relative_to(root).parts
    }


def _refs(root: Path) -> str:
    return run_git(root / "memory", "show-ref")
