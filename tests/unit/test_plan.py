"""A plan says what a snapshot would hold, what not, and why, and touches nothing."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from config.agents import agent_spec
from config.settings import AgentSettings
from daemon.errors import AgentNotFound
from daemon.model import AgentSpec, StateSource
from daemon.plan import DATABASE, FILE, MEMORY_FILE, Entry, LeftOut, Plan, StateEntry, Total, plan_snapshot
from tests.e2e.trees import access_times, listing


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "ana"
    (root / "memory/.git").mkdir(parents=True)
    (root / "memory/MEMORY.md").write_text("x" * 30)
    (root / "sessions").mkdir()
    (root / "sessions/1.jsonl").write_text("x" * 2000)
    (root / "cursor.json").write_text("{}")
    (root / ".env").write_text("KEY=x")
    (root / "link").symlink_to("sessions")
    with closing(sqlite3.connect(root / "memory.db")) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE t (x)")
    return root


def plan_of(root: Path, **settings: Any) -> Plan:
    return plan_snapshot(agent_spec("ana", AgentSettings(root=root, **settings)))


def test_everything_is_counted_as_what_it_will_be(root: Path) -> None:
    plan = plan_of(root, state={"cursor": {"file": "cursor.json"}, "clock": {"command": ["date", "+%s"]}})
    database = Entry("memory.db", DATABASE, (root / "memory.db").stat().st_size)
    assert plan.totals == {
        DATABASE: Total(1, database.size_bytes),
        MEMORY_FILE: Total(1, 30),
        FILE: Total(1, 2000),
    }
    assert plan.size_bytes == database.size_bytes + 2030
    assert plan.databases == (database,)
    assert plan.biggest == (
        database,
        Entry("sessions/1.jsonl", FILE, 2000),
        Entry("memory/MEMORY.md", MEMORY_FILE, 30),
    )
    assert (plan.spec.memdir, plan.has_repository, plan.symlinks) == (root / "memory", True, 1)
    assert plan.states == (
        StateEntry("cursor", "file", "cursor.json", is_there=True),
        StateEntry("clock", "command", "date", is_there=True),
    )
    assert plan.left_out == (LeftOut("looks like a secret", ".env", 1, (".env",)),)
    assert plan.failures == ()


def test_a_plan_touches_nothing_and_opens_no_database(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a database was opened")

    monkeypatch.setattr(sqlite3, "connect", refuse)
    (root / "memory.db-wal").write_bytes(b"not to be read")
    before = listing(root), access_times(root)
    plan_of(root)
    assert (listing(root), access_times(root)) == before


def test_only_the_biggest_are_named(root: Path) -> None:
    for number in range(30):
        (root / f"{number:02}").write_text("x" * (5000 + number))
    biggest = plan_of(root).biggest
    assert len(biggest) == 10
    assert [entry.path for entry in biggest if entry.kind == FILE] == [
        f"{number:02}" for number in range(29, 29 - len([e for e in biggest if e.kind == FILE]), -1)
    ]


def test_what_would_be_missing_is_named_with_its_fix(root: Path) -> None:
    (root / "broken.sqlite").write_text("no database")
    plan = plan_of(
        root,
        files=("gone.md",),
        profile="generic",
        max_file_bytes=1999,
        max_agent_bytes=10,
        state={"cursor": {"file": "no/cursor.json"}},
    )
    reasons = {failure.source.removeprefix(f"{root}/"): failure.reason for failure in plan.failures}
    assert reasons["gone.md"] == "nothing is there"
    assert "not a SQLite database" in reasons["broken.sqlite"]
    assert reasons["sessions/1.jsonl"] == "has 2,000 bytes; max_file_bytes allows 1,999"
    assert "state value 'cursor'" in reasons["no/cursor.json"]
    assert reasons[str(root)].endswith("max_agent_bytes allows 10")
    assert all(failure.hint for failure in plan.failures)


def test_a_state_value_that_need_not_be_there_is_no_failure(root: Path) -> None:
    states = (StateSource("x", file=root / "none.json", optional=True),)
    plan = plan_snapshot(AgentSpec("default", "ana", root, include=("**",), states=states))
    assert plan.states == (StateEntry("x", "file", "none.json", is_there=False),)
    assert plan.failures == ()


def test_there_is_no_plan_for_an_agent_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(AgentNotFound) as caught:
        plan_of(tmp_path / "nobody")
    assert "is not there" in str(caught.value)
    assert caught.value.hint


def test_programs_that_are_not_there_and_links_that_lead_out_are_named(root: Path) -> None:
    (root / "out").symlink_to("/etc/hostname")
    plan = plan_of(root, before=["no-such-program"], state={"clock": {"command": ["/nowhere/clock"]}})
    assert {failure.source for failure in plan.failures} == {"command 'before'", "command 'state clock'"}
    (outward,) = [left for left in plan.left_out if left.pattern == "symbolic link"]
    assert (outward.count, outward.examples) == (1, ("out",))
