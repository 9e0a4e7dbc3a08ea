"""State values that a command gives, and their way back through a command: real ones, all the way."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from daemon.capture import Capture, CutOptions, take_cut
from daemon.capture.sources import OpenSources
from daemon.errors import RefusedError
from daemon.locate import LocalBundle
from daemon.model import AgentSpec, ArtifactKind, Failure, StateHome, StateSource
from daemon.restore import RestoreReport, restore_agent, restore_to_directory
from daemon.snapshots import Sealing, Store, take_snapshot
from tests.property.honest import Piece, place, seal
from tests.unit.test_capture import contents, run_sql


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "ana"
    root.mkdir()
    (root / "note.md").write_bytes(b"a note\n")
    return root


def spec_of(root: Path, *states: StateSource, **fields: Any) -> AgentSpec:
    return AgentSpec("default", "ana", root, **{"include": ("**",), "states": states, **fields})


def cut(root: Path, *states: StateSource, **fields: Any) -> Capture:
    scratch = root.with_name(f"scratch-{len(list(root.parent.iterdir()))}")
    scratch.mkdir()
    return take_cut(spec_of(root, *states, **fields), scratch, options=CutOptions(attempts=2))


def printing(name: str, *argv: str, **fields: Any) -> StateSource:
    return StateSource(name, command=argv, **fields)


def the_failure(capture: Capture) -> Failure:
    (failure,) = capture.failures
    return failure


NOTE = {"files/note.md": b"a note\n"}


# --- what a command prints --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        b'{ "offset" : 12.50 }',
        b"null",
        b'\n\t"caf\xc3\xa9"\r\n\n',
        b'{"b": 1, "a": 9007199254740993, "b": 2}',
        b"[" + b"1," * 1_000_000 + b"1]",
    ],
    ids=["spaces", "null", "around", "order", "large"],
)
def test_a_value_is_what_the_command_prints_to_the_byte(root: Path, tmp_path: Path, value: bytes) -> None:
    (tmp_path / "value").write_bytes(value)
    capture = cut(root, printing("run", "cat", str(tmp_path / "value")))
    assert (capture.failures, capture.consistency.level) == ([], "point_in_time")
    assert contents(capture) == {**NOTE, "state/run.json": value}
    kinds = {artifact.path_in_bundle: artifact.kind for artifact in capture.artifacts}
    assert kinds["state/run.json"] == ArtifactKind.STATE
    assert capture.states == {"run": StateHome(kind="command", path="cat")}


def test_it_runs_in_the_root_and_no_argument_of_it_is_recorded(root: Path) -> None:
    say = "import json, os, sys; print(json.dumps([os.getcwd(), sys.argv[1]]))"
    capture = cut(root, printing("run", sys.executable, "-c", say, "hunter2 $(id)"))
    assert json.loads(contents(capture)["state/run.json"]) == [str(root), "hunter2 $(id)"]
    assert "hunter2" not in repr(capture.states)


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("echo", "no JSON"), "not valid JSON"),
        (("true",), "not valid JSON"),
        (("echo", "1 2"), "not valid JSON"),
        (("printf", r'"\377"'), "not valid JSON"),
        ((sys.executable, "-c", "print('[' * 100_000)"), "not valid JSON"),
        (("sh", "-c", "echo 1; exit 3"), "sh ended with exit code 3"),
        (("sh", "-c", "echo 1; kill -9 $$"), "sh ended with signal SIGKILL"),
        (("no-such-program",), "no-such-program cannot be started"),
        ((sys.executable, "-c", "print('1' * 5_000_000)"), "printed more than"),
        (("yes", "1"), "yes printed more than 4194304 bytes"),
    ],
    ids=["text", "nothing", "two", "no-utf8", "deep", "exit", "killed", "missing", "large", "endless"],
)
def test_what_is_no_value_is_a_failure_that_is_named_and_stops_nothing_else(
    root: Path, argv: tuple[str, ...], reason: str
) -> None:
    capture = cut(root, printing("run", *argv), printing("other", "echo", "1"))
    failure = the_failure(capture)
    assert failure.source == f"state run ({argv[0]})"
    assert reason in failure.reason
    assert "`state` in the configuration" in failure.hint
    assert contents(capture) == {**NOTE, "state/other.json": b"1\n"}
    assert capture.fingerprint is None


def test_one_that_takes_too_long_is_a_failure(root: Path) -> None:
    capture = cut(root, printing("run", "sleep", "600"), command_timeout_seconds=0.3)
    assert the_failure(capture).reason == "sleep took longer than 0.3 s and was ended"


def test_what_a_failing_command_says_is_in_no_record(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    say = "echo hunter2; echo hunter2 >&2; exit 1"
    assert "hunter2" not in repr(cut(root, printing("run", "sh", "-c", say, "hunter2")).failures)
    assert "hunter2" not in repr(cut(root, printing("run", "echo", "{hunter2}")).failures)
    assert "hunter2" not in capfd.readouterr().out


# --- values that move -------------------------------------------------------------------------------------


def test_a_value_that_is_another_each_time_is_named_as_what_moved(root: Path, tmp_path: Path) -> None:
    count = 'echo x >> "$0"; wc -l < "$0"'
    capture = cut(
        root, printing("steady", "echo", "1"), printing("run", "sh", "-c", count, str(tmp_path / "count"))
    )
    consistency = capture.consistency
    assert (consistency.level, consistency.moved, consistency.attempts) == ("per_source", ("state run",), 2)
    assert (capture.failures, capture.fingerprint) == ([], None)
    lines = len((tmp_path / "count").read_bytes().split())
    assert json.loads(contents(capture)["state/run.json"]) == lines  # the last one, and not one between


def test_a_value_that_moves_once_holds_in_the_next_attempt(root: Path, tmp_path: Path) -> None:
    once = 'if [ -e "$0" ]; then echo 2; else touch "$0"; echo 1; fi'
    capture = cut(root, printing("run", "sh", "-c", once, str(tmp_path / "was here")))
    assert (capture.consistency.level, capture.consistency.attempts) == ("point_in_time", 2)
    assert contents(capture)["state/run.json"] == b"2\n"


def test_a_command_that_fails_only_the_second_time_is_a_failure(root: Path, tmp_path: Path) -> None:
    once = 'if [ -e "$0" ]; then exit 9; else touch "$0"; echo 1; fi'
    capture = cut(root, printing("run", "sh", "-c", once, str(tmp_path / "was here")))
    assert the_failure(capture).reason == "sh ended with exit code 9"
    assert contents(capture) == NOTE


def test_a_value_is_part_of_what_tells_whether_anything_changed(root: Path, tmp_path: Path) -> None:
    value = tmp_path / "value"
    value.write_bytes(b"1")
    spec = spec_of(root, printing("run", "cat", str(value)))
    prints = []
    for number, said in enumerate([b"1", b"1", b"2", b"no JSON"]):
        value.write_bytes(said)
        scratch = tmp_path / f"scratch {number}"
        scratch.mkdir()
        with ExitStack() as stack:
            prints.append(OpenSources(spec, scratch, stack).fingerprint_now())
    assert prints[0] is not None
    assert (prints[0] == prints[1], prints[1] == prints[2], prints[3]) == (True, False, None)


# --- values that may be absent ----------------------------------------------------------------------------


def test_optional_values_that_are_absent_are_no_failure(root: Path) -> None:
    capture = cut(
        root,
        StateSource("file", file=root / "cursor.json", optional=True),
        StateSource("rows", sqlite=root / "runs.sqlite", query="SELECT 1", optional=True),
    )
    assert (capture.failures, capture.states, contents(capture)) == ([], {}, NOTE)


def test_the_same_values_are_failures_where_they_are_not_optional(root: Path) -> None:
    capture = cut(
        root,
        StateSource("file", file=root / "cursor.json"),
        StateSource("rows", sqlite=root / "runs.sqlite", query="SELECT 1"),
    )
    assert {"cursor.json", "runs.sqlite"} <= {
        name for name in ("cursor.json", "runs.sqlite") for f in capture.failures if name in f.source
    }
    assert contents(capture) == NOTE


def test_an_optional_value_that_is_there_and_is_broken_is_a_failure(root: Path) -> None:
    (root / "cursor.json").write_bytes(b'{"offset": ')
    os.utime(root / "cursor.json", ns=(1, 1_700_000_000_000_000_000))
    run_sql(root / "runs.sqlite", "CREATE TABLE t (x)")
    capture = cut(
        root,
        StateSource("file", file=root / "cursor.json", optional=True),
        StateSource("rows", sqlite=root / "runs.sqlite", query="SELECT * FROM nowhere", optional=True),
    )
    assert sorted(failure.source.split()[1] for failure in capture.failures) == ["file", "rows"]


# --- the way back -----------------------------------------------------------------------------------------


def snapshot(root: Path, tmp_path: Path, *states: StateSource) -> LocalBundle:
    """A bundle as it is really made; the agent is gone after that."""
    store = Store(tmp_path / "state")
    record = take_snapshot(store, spec_of(root, *states), sealing=Sealing())
    assert record.complete, record.failures
    root.rename(root.with_name("lost"))
    return LocalBundle(store.path_of(record.key), record.key)


def restored(bundle: LocalBundle, root: Path, *states: StateSource) -> RestoreReport:
    report = restore_agent(bundle, spec_of(root, *states))
    assert (root / "note.md").read_bytes() == b"a note\n"
    assert list(root.parent.glob(".*")) == []  # nothing of the work is left beside it
    return report


def test_a_value_goes_back_through_its_restore_command_to_the_byte(root: Path, tmp_path: Path) -> None:
    given = tmp_path / "given"
    value = b'{ "offset" : 12.50 }\n\n' + b" " * 300_000
    (tmp_path / "value").write_bytes(value)
    take = 'cat > "$0"; pwd > "$0.pwd"; cp note.md "$0.note"'
    state = printing("run", "cat", str(tmp_path / "value"), restore_command=("sh", "-c", take, str(given)))
    bundle = snapshot(root, tmp_path, state)
    report = restored(bundle, root, state)
    assert (report.not_put_back, report.is_whole) == ((), True)
    assert given.read_bytes() == value
    assert Path(f"{given}.pwd").read_text() == f"{root}\n"
    assert Path(f"{given}.note").read_bytes() == b"a note\n"  # the agent was in place by then


def test_the_command_of_today_takes_the_value_of_then(root: Path, tmp_path: Path) -> None:
    bundle = snapshot(root, tmp_path, printing("run", "echo", "7", restore_command=("touch", "of-then")))
    today = printing("run", "false", restore_command=("sh", "-c", "cat > of-today"))
    assert restored(bundle, root, today).is_whole
    assert (root / "of-today").read_bytes() == b"7\n"
    assert not (root / "of-then").exists()


def test_without_a_restore_command_a_value_is_not_put_back(root: Path, tmp_path: Path) -> None:
    state = printing("run", "echo", "7")
    report = restored(snapshot(root, tmp_path, state), root, state)
    assert (report.not_put_back, report.is_whole) == (("state/run.json",), False)


def test_a_value_that_the_configuration_no_longer_knows_is_not_put_back(root: Path, tmp_path: Path) -> None:
    bundle = snapshot(root, tmp_path, printing("run", "echo", "7", restore_command=("touch", "made")))
    report = restored(bundle, root, printing("other", "echo", "7", restore_command=("touch", "made")))
    assert report.not_put_back == ("state/run.json",)
    assert not (root / "made").exists()


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (("sh", "-c", "cat; echo hunter2 >&2; exit 4"), "sh ended with exit code 4"),
        (("no-such-program",), "no-such-program cannot be started: No such file or directory"),
    ],
)
def test_a_restore_command_that_fails_is_reported_and_the_others_run(
    root: Path, tmp_path: Path, command: tuple[str, ...], reason: str
) -> None:
    states = (
        printing("a", "echo", '"hunter2"', restore_command=command),
        printing("b", "echo", "2", restore_command=("sh", "-c", "cat > b")),
    )
    report = restored(snapshot(root, tmp_path, *states), root, *states)
    assert report.not_put_back == (f"state/a.json ({reason})",)
    assert not report.is_whole
    assert (root / "b").read_bytes() == b"2\n"


def test_a_look_at_a_snapshot_runs_nothing(root: Path, tmp_path: Path) -> None:
    state = printing("run", "echo", "7", restore_command=("touch", str(tmp_path / "made")))
    bundle = snapshot(root, tmp_path, state)
    restore_to_directory(bundle, tmp_path / "look")
    assert (tmp_path / "look/state/run.json").read_bytes() == b"7\n"
    assert not (tmp_path / "made").exists()


def test_a_restore_that_is_refused_runs_nothing(root: Path, tmp_path: Path) -> None:
    state = printing("run", "echo", "7", restore_command=("touch", str(tmp_path / "made")))
    bundle = snapshot(root, tmp_path, state)
    root.mkdir()
    (root / "precious.md").touch()
    with pytest.raises(RefusedError):
        restore_agent(bundle, spec_of(root, state))
    assert not (tmp_path / "made").exists()


# --- a hostile bundle -------------------------------------------------------------------------------------


def hostile(tmp_path: Path, states: dict[str, StateHome], *names: str) -> LocalBundle:
    pieces = [Piece("files/note.md", b"a note\n")]
    pieces += [Piece(f"state/{name}.json", b'"planted"', ArtifactKind.STATE) for name in names]
    return place(tmp_path, seal(pieces, states=states).data)


@pytest.mark.parametrize(
    "program", ["/usr/bin/touch made", "touch", "made", "../made", "/bin/sh -c 'touch made'"]
)
@pytest.mark.parametrize("name", ["run", "other"])
def test_no_bundle_names_a_command(tmp_path: Path, program: str, name: str) -> None:
    root = tmp_path / "ana"
    (tmp_path / "made").write_text("#!/bin/sh\ntouch ran\n")
    (tmp_path / "made").chmod(0o755)
    bundle = hostile(tmp_path, {name: StateHome(kind="command", path=program)}, name)
    report = restored(bundle, root, printing("run", "echo", "1"))
    assert report.not_put_back == (f"state/{name}.json",)
    assert [path.name for path in root.iterdir()] == ["note.md"]


@pytest.mark.parametrize("kind", ["rows", "file"])
def test_a_value_that_says_it_came_from_elsewhere_reaches_no_command(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "ana"
    home = StateHome(kind="rows" if kind == "rows" else "file", path="/etc/outside.json")
    state = printing("run", "echo", "1", restore_command=("touch", "made"))
    report = restored(hostile(tmp_path, {"run": home}, "run"), root, state)
    assert report.not_put_back == ("state/run.json",)
    assert not (root / "made").exists()


def test_a_value_without_a_home_reaches_no_command(tmp_path: Path) -> None:
    root = tmp_path / "ana"
    state = printing("run", "echo", "1", restore_command=("touch", "made"))
    report = restored(hostile(tmp_path, {}, "run"), root, state)
    assert report.not_put_back == ("state/run.json",)
    assert not (root / "made").exists()


def test_a_home_without_a_value_runs_nothing(tmp_path: Path) -> None:
    root = tmp_path / "ana"
    state = printing("run", "echo", "1", restore_command=("touch", "made"))
    restored(hostile(tmp_path, {"run": StateHome(kind="command", path="echo")}), root, state)
    assert not (root / "made").exists()


def test_a_planted_program_in_the_root_is_not_taken_for_the_one_of_the_configuration(tmp_path: Path) -> None:
    """They run in the agent's root, which is as the bundle says: a name is looked up in PATH alone."""
    root = tmp_path / "ana"
    pieces = [
        Piece("files/note.md", b"a note\n"),
        Piece("files/true", b"#!/bin/sh\ntouch made\n", mode=0o755),
        Piece("state/run.json", b'"planted"', ArtifactKind.STATE),
    ]
    states = {"run": StateHome(kind="command", path="echo")}
    bundle = place(tmp_path, seal(pieces, states=states).data)
    report = restored(bundle, root, printing("run", "echo", "1", restore_command=("true",)))
    assert report.not_put_back == ()
    assert not (root / "made").exists()


def test_a_database_that_was_never_there_is_said_to_be_missing_and_costs_no_instant(
    root: Path, tmp_path: Path
) -> None:
    source = StateSource("h", sqlite=root / "nope.sqlite", query="SELECT 1")
    (tmp_path / "scratch").mkdir()
    capture = take_cut(spec_of(root, source), tmp_path / "scratch")
    assert (capture.consistency.level, capture.consistency.attempts) == ("point_in_time", 1)
    (failure,) = capture.failures
    assert "not there" in failure.reason
