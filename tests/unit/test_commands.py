"""Commands of the configuration, run for real: what they are given, what is told of them, how they end."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.commands import CommandFailed, run_command
from tests.e2e.commands import wait_until

LONG_SECONDS = 60.0
"""More than any of these takes, however busy the machine is."""


def run(
    *argv: str, directory: Path, stdin: bytes = b"", output: int = 1 << 20, seconds: float = LONG_SECONDS
) -> bytes:
    return run_command(
        argv, directory=directory, timeout_seconds=seconds, stdin=stdin, max_output_bytes=output
    )


def run_python(
    script: str, *argv: str, directory: Path, stdin: bytes = b"", output: int = 1 << 20, seconds: float = 60.0
) -> bytes:
    return run(
        sys.executable, "-c", script, *argv, directory=directory, stdin=stdin, output=output, seconds=seconds
    )


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


# --- what goes in and what comes out ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [b"", b"\n", b"no newline", b"\0\xff\xfe\r\n", bytes(range(256)) * 1000],
    ids=["empty", "newline", "unended", "raw", "long"],
)
def test_output_comes_back_to_the_byte(tmp_path: Path, said: bytes) -> None:
    (tmp_path / "said").write_bytes(said)
    assert run("cat", "said", directory=tmp_path) == said


def test_stdin_is_given_whole_and_then_ends(tmp_path: Path) -> None:
    given = os.urandom(3_000_000)  # more than a pipe holds
    assert run("cat", directory=tmp_path, stdin=given, output=4_000_000) == given


def test_without_stdin_a_command_that_reads_is_not_kept_waiting(tmp_path: Path) -> None:
    assert run("cat", directory=tmp_path) == b""


def test_a_command_that_does_not_read_its_stdin_is_none_the_worse(tmp_path: Path) -> None:
    assert run("echo", "done", directory=tmp_path, stdin=bytes(3_000_000)) == b"done\n"


def test_stdin_is_of_no_other_file_and_nobody_elses(tmp_path: Path) -> None:
    """Values are memory: what holds them on the way has no name that anybody could open."""
    script = "import os; print(os.fstat(0).st_nlink, oct(os.fstat(0).st_mode & 0o777))"
    assert run_python(script, directory=tmp_path, stdin=b"a secret").split() == [b"0", b"0o600"]


def test_it_runs_in_the_directory_that_it_is_given(tmp_path: Path) -> None:
    odd = tmp_path / "a dir; $(id)\n"
    odd.mkdir()
    assert run("pwd", directory=odd) == os.fsencode(odd) + b"\n"


def test_arguments_are_no_shells_business(tmp_path: Path) -> None:
    odd = [
        "$(id)",
        "`id`",
        "a b",
        "*",
        "; touch made",
        "",
        "-n",
        "'\"",
        "\\",
        "new\nline",
        os.fsdecode(b"\xff"),
    ]
    script = "import os, sys; sys.stdout.buffer.write(b'\\0'.join(map(os.fsencode, sys.argv[1:])))"
    assert run_python(script, *odd, directory=tmp_path) == b"\0".join(map(os.fsencode, odd))
    assert list(tmp_path.iterdir()) == []


def test_with_no_output_wanted_what_it_says_goes_to_stderr(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = "print('said', flush=True); import sys; print('and complained', file=sys.stderr)"
    assert run_python(script, directory=tmp_path, output=0) == b""
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "said\nand complained\n")


def test_stderr_is_not_in_the_output(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = "import sys; print('complaint', file=sys.stderr); print('value')"
    assert run_python(script, directory=tmp_path) == b"value\n"
    assert capfd.readouterr().err == "complaint\n"


# --- what it is not given ---------------------------------------------------------------------------------


def test_credentials_and_settings_are_withheld_and_the_rest_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    withheld = {
        "AGENTKEEP_CONFIG": "a setting",
        "AGENTKEEP_IDENTITY": "a key",
        "AWS_ACCESS_KEY_ID": "an id",
        "AWS_SECRET_ACCESS_KEY": "a secret",
        "AWS_SESSION_TOKEN": "a token",
        "CREDENTIALS_DIRECTORY": "/run/credentials/agentkeep.service",
        "NOTIFY_SOCKET": "/run/systemd/notify",
    }
    for name, value in {**withheld, "OPENCLAW_HOME": "kept", "LAWS_": "kept too"}.items():
        monkeypatch.setenv(name, value)
    given = dict(line.partition(b"=")[::2] for line in run("env", "-0", directory=tmp_path).split(b"\0"))
    assert given.keys().isdisjoint(map(os.fsencode, withheld))
    assert (given[b"OPENCLAW_HOME"], given[b"LAWS_"]) == (b"kept", b"kept too")
    assert given[b"PATH"] == os.fsencode(os.environ["PATH"])


def test_none_of_our_open_files_are_inherited(tmp_path: Path) -> None:
    secret = tmp_path / "open here"
    secret.write_bytes(b"x")
    with secret.open("rb") as stream:
        os.set_inheritable(stream.fileno(), True)
        listed = run("ls", "-l", "/proc/self/fd", directory=tmp_path)
    assert b"0 -> " in listed
    assert b"open here" not in listed


# --- how it ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [1, 2, 77, 127, 255])
def test_an_exit_code_is_named(tmp_path: Path, code: int) -> None:
    with pytest.raises(CommandFailed, match=rf"^sh ended with exit code {code}$"):
        run("sh", "-c", f"exit {code}", directory=tmp_path)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGSEGV", "SIGPIPE"])
def test_a_signal_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CommandFailed, match=rf"^sh ended with signal {name}$"):
        run("sh", "-c", f"kill -{int(signal.Signals[name])} $$", directory=tmp_path)


def test_a_signal_that_has_no_name_is_told_by_its_number(tmp_path: Path) -> None:
    unnamed = signal.SIGRTMIN + 5
    with pytest.raises(CommandFailed, match=rf"^sh ended with signal {unnamed}$"):
        run("sh", "-c", f"kill -{unnamed} $$", directory=tmp_path)


@pytest.mark.parametrize(
    "script",
    [
        "import sys; print(sys.argv[1]); print(sys.argv[1], file=sys.stderr); sys.exit(3)",
        "import sys, os; os.write(1, sys.argv[1].encode()); os.kill(os.getpid(), 9)",
        "import sys; print(sys.argv[1] * 10_000)",
        "import sys, time; print(sys.argv[1], flush=True); time.sleep(600)",
    ],
    ids=["exit", "signal", "too-much", "timeout"],
)
def test_a_failure_says_neither_arguments_nor_input_nor_output(tmp_path: Path, script: str) -> None:
    with pytest.raises(CommandFailed) as raised:
        run_python(script, "hunter2", directory=tmp_path, stdin=b"hunter2", output=1000, seconds=1)
    assert str(raised.value).startswith(sys.executable)
    assert "hunter2" not in str(raised.value)


def test_a_program_that_is_not_there_is_named_with_why(tmp_path: Path) -> None:
    with pytest.raises(
        CommandFailed, match=r"^no-such-program cannot be started: No such file or directory$"
    ):
        run("no-such-program", "hunter2", directory=tmp_path)


def test_a_program_that_may_not_be_run_is_named_with_why(tmp_path: Path) -> None:
    program = tmp_path / "freeze.sh"
    program.write_text("#!/bin/sh\n")
    with pytest.raises(CommandFailed, match=r"freeze\.sh cannot be started: Permission denied$"):
        run(str(program), directory=tmp_path)
    program.write_text("no program at all\n")
    program.chmod(stat.S_IRWXU)
    with pytest.raises(CommandFailed, match=r"freeze\.sh cannot be started: Exec format error$"):
        run(str(program), directory=tmp_path)


@pytest.mark.parametrize(("output", "is_too_much"), [(100, False), (99, True), (1, True)])
def test_output_may_be_as_large_as_is_said_and_no_larger(
    tmp_path: Path, output: int, is_too_much: bool
) -> None:
    (tmp_path / "said").write_bytes(b"x" * 100)
    if not is_too_much:
        assert len(run("cat", "said", directory=tmp_path, output=output)) == output
        return
    with pytest.raises(CommandFailed, match=rf"^cat printed more than {output} bytes$"):
        run("cat", "said", directory=tmp_path, output=output)


def test_output_without_end_is_ended_long_before_the_disk_is_full(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match=r"^yes printed more than 1000 bytes and was ended$"):
        run("yes", directory=tmp_path, output=1000)


# --- what it leaves running -------------------------------------------------------------------------------

_STUBBORN_FAMILY = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
if os.fork() == 0:
    if os.fork() == 0:
        open("grandchild", "w").write(str(os.getpid()))
        os.rename("grandchild", "grandchild.pid")
        time.sleep(600)
    open("child", "w").write(str(os.getpid()))
    os.rename("child", "child.pid")
    time.sleep(600)
while not (os.path.exists("child.pid") and os.path.exists("grandchild.pid")):
    time.sleep(0.01)
time.sleep(600)
"""


def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    names = [tmp_path / f"{name}.pid" for name in ("child", "grandchild")]
    for seconds in (1, 5, 25):  # until the whole family was there in time
        with pytest.raises(CommandFailed, match=rf"took longer than {seconds} s and was ended$"):
            run_python(_STUBBORN_FAMILY, directory=tmp_path, seconds=seconds)
        if all(name.exists() for name in names):
            break
    pids = [int(name.read_text()) for name in names]
    wait_until(lambda: not any(map(is_running, pids)), "the end of the whole family")


def test_an_interruption_ends_it_too(tmp_path: Path) -> None:
    """As Ctrl-C does: what it started is in a session of its own, which the terminal does not reach."""
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from daemon.commands import run_command\n"
        "argv = [sys.executable, '-c', sys.argv[1]]\n"
        "run_command(argv, directory=Path(sys.argv[2]), timeout_seconds=600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, _STUBBORN_FAMILY, tmp_path], stderr=subprocess.DEVNULL
    ) as ours:
        names = [tmp_path / f"{name}.pid" for name in ("child", "grandchild")]
        wait_until(lambda: all(name.exists() for name in names), "the family")
        ours.send_signal(signal.SIGINT)
        ours.wait()
    pids = [int(name.read_text()) for name in names]
    wait_until(lambda: not any(map(is_running, pids)), "the end of the whole family")


def test_a_child_left_in_the_background_holds_up_nothing(tmp_path: Path) -> None:
    """It has the command's stdout and stderr: whoever read those to their end would wait for it."""
    script = "sleep 600 & echo $! > pid; echo value"
    try:
        assert run("sh", "-c", script, directory=tmp_path) == b"value\n"
        assert is_running(int((tmp_path / "pid").read_text()))  # it is the agent's own: let it be
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_a_child_that_writes_on_in_the_background_garbles_nothing(tmp_path: Path) -> None:
    """It shares the place in the file at which is written; what the command said stays as it is."""
    script = "cat value; (while :; do echo noise; done) & echo $! > pid"
    value = os.urandom(1_000_000)
    (tmp_path / "value").write_bytes(value)
    for _ in range(5):
        try:
            said = run("sh", "-c", script, directory=tmp_path, output=1 << 26)
        finally:
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        assert said[: len(value)] == value


def test_it_is_alone_in_its_group_so_that_ending_it_ends_nobody_else(tmp_path: Path) -> None:
    script = "import os; print(os.getpid() == os.getpgrp() == os.getsid(0), os.getsid(0))"
    is_alone, session = run_python(script, directory=tmp_path).split()
    assert (is_alone, int(session) != os.getsid(0)) == (b"True", True)
