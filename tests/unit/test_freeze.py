"""The agent's own way to hold still: `before` and `after` around a capture, whatever happens in between."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from daemon.capture import Capture, take_cut
from daemon.capture.freeze import Frozen
from daemon.errors import AgentNotFound, RefusedError
from daemon.model import AgentSpec, StateSource
from daemon.snapshots import Sealing, Store, take_snapshot
from tests.e2e.commands import wait_until
from tests.unit.test_capture import contents, files_not_larger_than, run_sql


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "ana"
    root.mkdir()
    return root


@pytest.fixture
def a_note(root: Path) -> Path:
    note = root / "note.md"
    note.write_bytes(b"a note")
    return note


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """Where the commands write what happened, outside of the agent."""
    return tmp_path / "told"


def telling(told: Path, word: str, and_then: str = "") -> tuple[str, ...]:
    return ("sh", "-c", f'echo {word} >> "$0"; {and_then}', str(told))


def spec_of(root: Path, **fields: Any) -> AgentSpec:
    return AgentSpec("default", "ana", root, **{"include": ("**",), **fields})


def scratch_for(root: Path) -> Path:
    scratch = root.with_name(f"scratch-{len(list(root.parent.iterdir()))}")
    scratch.mkdir()
    return scratch


def cut(root: Path, **fields: Any) -> Capture:
    return take_cut(spec_of(root, **fields), scratch_for(root))


def words(told: Path) -> list[str]:
    return told.read_text().split() if told.exists() else []


def test_each_runs_once_in_order_around_the_reading_of_the_agent(root: Path, told: Path) -> None:
    (root / "note.md").write_bytes(b"a note")
    capture = cut(
        root,
        before=telling(told, "before"),
        after=telling(told, "after"),
        states=(StateSource("value", command=telling(told, "value", "echo 1")),),
    )
    assert words(told) == ["before", "value", "value", "after"]  # the value is asked for on both sides
    assert (capture.failures, capture.consistency.level) == ([], "point_in_time")


@pytest.mark.usefixtures("a_note")
def test_both_run_in_the_agents_root(root: Path, told: Path) -> None:
    cut(root, before=telling(told, '"$(pwd)"'), after=telling(told, '"$(pwd)"'))
    assert words(told) == [str(root), str(root)]


@pytest.mark.usefixtures("a_note")
@pytest.mark.parametrize("only", ["before", "after"])
def test_one_of_them_alone_will_do(root: Path, told: Path, only: str) -> None:
    assert cut(root, **{only: telling(told, only)}).failures == []
    assert words(told) == [only]


# --- what they change is seen -----------------------------------------------------------------------------


def test_what_before_writes_is_captured_and_what_after_writes_is_not(root: Path) -> None:
    (root / "note.md").write_bytes(b"unflushed")
    (root / "old.md").write_bytes(b"old")
    capture = cut(
        root,
        before=("sh", "-c", "printf flushed > note.md; rm old.md; printf new > new.md"),
        after=("sh", "-c", "printf woken > note.md; printf late > late.md"),
    )
    assert capture.failures == []
    assert contents(capture) == {"files/note.md": b"flushed", "files/new.md": b"new"}
    assert capture.consistency.level == "point_in_time"


def test_a_checkpoint_in_before_is_seen_and_harms_nothing(root: Path) -> None:
    statements = (
        "PRAGMA journal_mode = WAL; CREATE TABLE t (x); INSERT INTO t VALUES ('in the WAL alone');\n"
        ".print ready\n"
    )
    agent = subprocess.Popen(
        ["sqlite3", root / "memory.sqlite"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with agent:
        assert agent.stdin is not None
        assert agent.stdout is not None
        agent.stdin.write(statements)
        agent.stdin.flush()
        assert [agent.stdout.readline() for _ in range(2)] == ["wal\n", "ready\n"]
        checkpoint = "INSERT INTO t VALUES ('a last word'); PRAGMA wal_checkpoint(TRUNCATE)"
        capture = cut(
            root,
            before=("sqlite3", "memory.sqlite", checkpoint),
            after=("sqlite3", "memory.sqlite", "INSERT INTO t VALUES ('awake')"),
        )
        assert (root / "memory.sqlite-wal").stat().st_size > 0  # `after` wrote to it
        agent.stdin.write("SELECT x FROM t;\n")
        agent.stdin.close()
        assert agent.stdout.read().splitlines() == ["in the WAL alone", "a last word", "awake"]
    copy = contents(capture)["sqlite/memory.sqlite"]
    assert (capture.failures, capture.consistency.level) == ([], "point_in_time")
    assert b"in the WAL alone" in copy
    assert b"a last word" in copy
    assert b"awake" not in copy


def test_a_database_that_before_makes_is_captured(root: Path) -> None:
    capture = cut(root, before=("sqlite3", "new.sqlite", "CREATE TABLE t (x)"), sqlite=("*.sqlite",))
    assert (capture.failures, list(contents(capture))) == ([], ["sqlite/new.sqlite"])


def test_after_may_write_to_a_database_without_wal_at_once(root: Path) -> None:
    """Nothing of ours holds it any more: the writer would not wait at all."""
    path = root / "memory.sqlite"
    run_sql(path, "PRAGMA journal_mode = DELETE", "CREATE TABLE t (x)")
    capture = cut(
        root,
        after=(
            "sqlite3",
            "-cmd",
            ".timeout 0",
            "memory.sqlite",
            "BEGIN EXCLUSIVE; INSERT INTO t VALUES (1); COMMIT",
        ),
    )
    assert capture.failures == []
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (1,)


def test_an_agent_that_only_holds_still_when_asked_is_captured_as_of_one_instant(
    root: Path, told: Path
) -> None:
    """What it writes without pause would be `per_source`: with the two commands it is not."""
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "root, told = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "generation = 0\n"
        "while True:\n"
        "    if (root / 'hold').exists():\n"
        "        (root / 'held').touch()\n"
        "        while (root / 'hold').exists(): time.sleep(0.005)\n"
        "        (root / 'held').unlink(missing_ok=True)\n"
        "    generation += 1\n"
        "    for name in 'ab':\n"
        "        with open(root / name, 'r+b') as stream:\n"
        "            stream.write(b'%08d' % generation * 25_000)\n"
    )
    for name in "ab":
        (root / name).write_bytes(b"%08d" % 0 * 25_000)
    hold = "touch hold; until [ -e held ]; do sleep 0.01; done"
    with subprocess.Popen([sys.executable, "-c", script, root, told]) as agent:
        try:
            capture = cut(root, before=("sh", "-c", hold), after=("rm", "hold"), exclude=("hold", "held"))
        finally:
            agent.kill()
    captured = contents(capture)
    assert (capture.failures, capture.consistency.level) == ([], "point_in_time")
    assert captured["files/a"] == captured["files/b"] == captured["files/a"][:8] * 25_000


# --- whatever happens in between --------------------------------------------------------------------------


@pytest.mark.usefixtures("a_note")
def test_after_runs_when_before_fails_and_the_capture_goes_on(root: Path, told: Path) -> None:
    capture = cut(root, before=telling(told, "before", "exit 3"), after=telling(told, "after"))
    assert words(told) == ["before", "after"]
    (failure,) = capture.failures
    assert (failure.source, failure.reason) == ("command 'before'", "sh ended with exit code 3")
    assert "'ana'" in failure.hint
    assert "`before`" in failure.hint
    assert contents(capture) == {"files/note.md": b"a note"}
    assert not capture.is_complete
    assert capture.consistency.level == "point_in_time"  # which is proven whatever `before` did


@pytest.mark.usefixtures("a_note")
def test_a_failing_after_is_a_failure_that_is_urgent(root: Path, told: Path) -> None:
    capture = cut(root, before=telling(told, "before"), after=telling(told, "after", "kill -9 $$"))
    assert words(told) == ["before", "after"]
    (failure,) = capture.failures
    assert (failure.source, failure.reason) == ("command 'after'", "sh ended with signal SIGKILL")
    assert "look at once" in failure.hint
    assert contents(capture) == {"files/note.md": b"a note"}
    assert not capture.is_complete


@pytest.mark.usefixtures("a_note")
def test_both_may_fail_and_both_are_named(root: Path) -> None:
    capture = cut(root, before=("no-such-freeze",), after=("no-such-thaw",))
    assert [failure.source for failure in capture.failures] == ["command 'before'", "command 'after'"]
    assert "no-such-freeze cannot be started" in capture.failures[0].reason


@pytest.mark.usefixtures("a_note")
def test_one_that_takes_too_long_is_ended_and_named(root: Path, told: Path) -> None:
    capture = cut(
        root,
        before=telling(told, "before", "exec sleep 600"),
        after=telling(told, "after"),
        command_timeout_seconds=1,
    )
    assert words(told) == ["before", "after"]
    assert [failure.reason for failure in capture.failures] == ["sh took longer than 1 s and was ended"]


@pytest.mark.usefixtures("a_note")
def test_one_that_could_not_even_be_tried_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for the file that takes its output."""
    (root / "note.md").write_bytes(b"a note")
    monkeypatch.setattr(tempfile, "tempdir", str(root / "nowhere"))
    capture = cut(root, after=("true",))
    assert [failure.source for failure in capture.failures] == ["command 'after'"]
    assert not capture.is_complete


def test_what_they_say_is_in_no_record(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    say = ("sh", "-c", "echo hunter2; echo hunter2 >&2; exit 1", "hunter2")
    capture = cut(root, before=say, after=say)
    assert len(capture.failures) == 2
    assert "hunter2" not in repr(capture.failures)
    assert capfd.readouterr().out == ""


def test_after_runs_once_when_the_capture_raises(root: Path, told: Path) -> None:
    run_sql(root / "memory.sqlite", "CREATE TABLE t (x)", "INSERT INTO t VALUES (randomblob(900000))")
    scratch = scratch_for(root)
    spec = spec_of(root, before=telling(told, "before"), after=telling(told, "after"))
    with files_not_larger_than(100_000), pytest.raises(OSError, match="No space"):
        take_cut(spec, scratch)
    assert words(told) == ["before", "after"]


def test_after_runs_once_when_the_agent_is_refused(root: Path, told: Path, a_note: Path) -> None:
    with pytest.raises(RefusedError):
        cut(root, before=telling(told, "before"), after=telling(told, "after"), max_agent_bytes=1)
    assert words(told) == ["before", "after"]


def test_after_runs_once_when_there_is_nothing_to_capture(root: Path, told: Path) -> None:
    with pytest.raises(AgentNotFound):
        cut(root, before=telling(told, "before"), after=telling(told, "after"))
    assert words(told) == ["before", "after"]


def test_neither_runs_where_the_agent_is_not(root: Path, told: Path) -> None:
    root.rmdir()
    with pytest.raises(AgentNotFound):
        cut(root, before=telling(told, "before"), after=telling(told, "after"))
    assert words(told) == []


@pytest.mark.parametrize("when", ["before", "value"])
def test_after_runs_once_when_somebody_interrupts(root: Path, told: Path, when: str) -> None:
    """Ctrl-C, while `before` itself runs or while the agent is read: it must not be left frozen."""
    wait = 'touch "$0.here"; exec sleep 600'
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from daemon.capture import take_cut\n"
        "from daemon.model import AgentSpec, StateSource\n"
        "root, scratch, told, when, wait = sys.argv[1:]\n"
        "def telling(word):\n"
        "    return ('sh', '-c', f'echo {word} >> \"$0\"; {wait if word == when else \"echo 1\"}', told)\n"
        "spec = AgentSpec('default', 'ana', Path(root), include=('**',), before=telling('before'),\n"
        "    after=telling('after'), states=(StateSource('value', command=telling('value')),))\n"
        "take_cut(spec, Path(scratch))\n"
    )
    argv: list[str | Path] = [sys.executable, "-c", script, root, scratch_for(root), told, when, wait]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as ours:
        wait_until(Path(f"{told}.here").exists, "the moment to interrupt")
        ours.send_signal(signal.SIGINT)
        _, complaint = ours.communicate()
    assert complaint.splitlines()[-1] == "KeyboardInterrupt"
    assert words(told) == {"before": ["before", "after"], "value": ["before", "value", "after"]}[when]


def test_thawing_again_does_nothing(root: Path, told: Path) -> None:
    with Frozen(spec_of(root, after=telling(told, "after"))) as frozen:
        frozen.thaw()
        frozen.thaw()
        assert words(told) == ["after"]
    frozen.thaw()
    assert words(told) == ["after"]


# --- as a snapshot ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("a_note")
def test_a_snapshot_with_a_failing_command_is_incomplete_and_the_next_is_not_skipped_for_it(
    root: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "state")
    first = take_snapshot(store, spec_of(root, after=("false",)), sealing=Sealing(), unless_unchanged=True)
    assert not first.complete
    second = take_snapshot(store, spec_of(root), sealing=Sealing(), unless_unchanged=True)
    assert second.complete
    assert second.key != first.key
