"""`agentkeep` as tests run it: a host with a home, a configuration and commands, each a real process."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests.e2e.fork_server import MAX_REQUEST_BYTES, READY

REPOSITORY = Path(__file__).parents[2]
LIMIT_SECONDS = 60.0
_POLL_SECONDS = 0.005
_TRIES = 8


@dataclass(frozen=True)
class Done:
    """A command that has come to its end. A negative exit code is the signal that killed it."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        return json.loads(self.stdout)


class Running:
    """A command on its way."""

    def __init__(self, pid: int, pidfd: int, status: socket.socket, out: IO[bytes], err: IO[bytes]) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._status = status
        self._out = out
        self._err = err
        self.exit_code: int | None = None

    def send(self, number: signal.Signals) -> None:
        if self.is_running():
            signal.pidfd_send_signal(self._pidfd, number)

    def is_running(self) -> bool:
        return self.exit_code is None and not self._has_ended(0.0)

    def has_ended_within(self, seconds: float) -> bool:
        return self.exit_code is not None or self._has_ended(seconds)

    def wait(self) -> Done:
        """Raises TimeoutError after a limit that is only for what hangs."""
        if not self.has_ended_within(LIMIT_SECONDS):
            self.kill()
            raise TimeoutError(f"still running after {LIMIT_SECONDS:g} s: {self.output()}")
        out, err = (_content(stream) for stream in (self._out, self._err))
        assert self.exit_code is not None
        return Done(self.exit_code, out, err)

    def kill(self) -> Done:
        self.send(signal.SIGKILL)
        return self.wait()

    def output(self) -> str:
        return _content(self._out) + _content(self._err)

    def close(self) -> None:
        self.kill()
        os.close(self._pidfd)

    def _has_ended(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._status], [], [], seconds)
        if ready:
            said = self._status.recv(64)
            if not said:
                raise RuntimeError("the fork server is gone")
            self.exit_code = int(said)
        return bool(ready)


class ForkServer:
    """A handle on the process that commands are forked from."""

    def __init__(self, client: socket.socket) -> None:
        self._client = client

    @contextmanager
    def started(
        self,
        *arguments: str,
        cwd: Path,
        environment: Mapping[str, str],
        stdin: bytes = b"",
        uid: int | None = None,
        trace: Path | None = None,
        kill_at_step: int | None = None,
    ) -> Iterator[Running]:
        """A command as a process of its own; killed at the end if it still runs.

        uid: to become before it begins, for which the tests have to run as root
        trace: a file for one line per step of the command, kill_at_step: see fork_server.py
        """
        request = {
            "arguments": arguments,
            "cwd": str(cwd),
            "environment": dict(environment),
            "uid": uid,
            "trace": None if trace is None else str(trace),
            "kill_at_step": kill_at_step,
        }
        data = json.dumps(request).encode()
        assert len(data) < MAX_REQUEST_BYTES
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            with theirs, tempfile.TemporaryFile() as given:
                given.write(stdin)
                given.seek(0)
                streams = [given.fileno(), out.fileno(), err.fileno(), theirs.fileno()]
                socket.send_fds(self._client, [data], streams)
            ours.settimeout(LIMIT_SECONDS)
            pid, (pidfd,), _, _ = socket.recv_fds(ours, 64, 1)
            running = Running(int(pid), pidfd, ours, out, err)
            try:
                yield running
            finally:
                running.close()


@contextmanager
def running_fork_server() -> Iterator[ForkServer]:
    client, server = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with client:
        with server:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.e2e.fork_server", str(server.fileno())],
                cwd=REPOSITORY,
                env=clean_environment(REPOSITORY),
                pass_fds=[server.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            client.settimeout(LIMIT_SECONDS)
            if client.recv(16) != READY:
                raise RuntimeError("the fork server did not come up")
            yield ForkServer(client)
        finally:
            client.close()  # it ends with its client
            try:
                process.wait(LIMIT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def clean_environment(home: Path) -> dict[str, str]:
    """All that a command sees of whoever runs the tests."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "LC_ALL": "C.UTF-8",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


class Host:
    """A machine that agents live on: a home directory, a configuration, `agentkeep`, and a directory as
    the usual destination."""

    def __init__(self, home: Path, server: ForkServer) -> None:
        self.home = home
        self.state = home / "state"
        self.offsite = home / "offsite"
        self.offsite.mkdir(exist_ok=True)
        self.config = home / "agentkeep.toml"
        self.environment = clean_environment(home)
        self.server = server

    def configure(
        self, agents: Mapping[str, str], *, destinations: Mapping[str, str] | None = None, top: str = ""
    ) -> None:
        """Write the configuration: TOML lines of each agent and destination (default: `offsite` alone)."""
        lines = [f"state_dir = {quoted(self.state)}", "upload_interval_seconds = 0.2", top]
        for agent_id, agent_lines in agents.items():
            lines += [f"[agents.{agent_id}]", agent_lines]
        if destinations is None:
            destinations = {"offsite": f"url = {quoted(self.offsite.as_uri())}"}
        for name, destination_lines in destinations.items():
            lines += [f"[destinations.{name}]", destination_lines]
        self.config.write_text("\n".join(lines) + "\n")

    def agentkeep(self, *arguments: str | Path, expecting: int | None = 0, **options: Any) -> Done:
        """Run a command to its end. `expecting` None: any exit code will do."""
        with self.started(*arguments, **options) as running:
            done = running.wait()
        assert expecting is None or done.exit_code == expecting, (
            f"exit code {done.exit_code}, not {expecting}\n{done.stdout}{done.stderr}"
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def document(self, *arguments: str | Path, expecting: int = 0, **options: Any) -> Any:
        """What a command says with --json."""
        return self.agentkeep("--json", *arguments, expecting=expecting, **options).document

    @contextmanager
    def started(
        self,
        *arguments: str | Path,
        configured: bool = True,
        extra: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Iterator[Running]:
        """A command in the background. configured: with this host's configuration; extra: variables."""
        given = ["--config", str(self.config)] if configured else []
        with self.server.started(
            *given,
            *map(str, arguments),
            cwd=self.home,
            environment={**self.environment, **(extra or {})},
            **options,
        ) as running:
            yield running

    # --- what is where ---------------------------------------------------------------------------------

    def snapshots(self) -> list[Any]:
        return list(self.document("list")["snapshots"])

    def bundle(self, record: Mapping[str, Any]) -> Path:
        return self.state / str(record["key"])

    def manifest(self, snap: str | Path) -> Any:
        return self.document("show", str(snap))

    def bundles_at(self, destination: Path) -> list[Path]:
        suffixes = (".tar.zst", ".tar.zst.age")
        found = (path for path in files_below(destination) if path.name.endswith(suffixes))
        return sorted(path for path in found if not path.name.startswith("."))


def leftovers(*places: Path) -> list[Path]:
    """Everything that is not finished work: temporary names and unfinished uploads."""
    return [
        path
        for place in places
        for path in files_below(place, with_directories=True)
        if path.name.startswith(".agentkeep-") or path.parent.name == ".incoming"
    ]


def files_below(place: Path, *, with_directories: bool = False) -> Iterator[Path]:
    """Also while others make and remove some of it, which Path.rglob does not bear."""
    for directory, directories, files in os.walk(place):
        yield from (Path(directory, name) for name in files)
        if with_directories:
            yield from (Path(directory, name) for name in directories)


def quoted(value: str | Path) -> str:
    """As a TOML string."""
    return json.dumps(str(value))


def wait_until(condition: Callable[[], bool], what: str, *, limit_seconds: float = LIMIT_SECONDS) -> None:
    """Poll until the condition holds; the limit is only for what never comes."""
    deadline = time.monotonic() + limit_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"never came: {what}")
        time.sleep(_POLL_SECONDS)


@contextmanager
def busy(work: Callable[[int], None], *, pause_seconds: float = 0.002) -> Iterator[None]:
    """Does `work` with 1, 2, 3, ... without end, on a thread."""
    stopping = threading.Event()

    def run() -> None:
        generation = 0
        while not stopping.wait(pause_seconds):
            generation += 1
            work(generation)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def restless(root: Path) -> AbstractContextManager[None]:
    """An agent that writes all the time, so that every snapshot of it is needed."""

    def write(number: int) -> None:
        with (root / "thoughts.jsonl").open("a") as stream:
            stream.write(f'{{"thought": {number}}}\n')

    return busy(write, pause_seconds=_POLL_SECONDS)


def freeze_when(running: Running, condition: Callable[[], bool], what: str) -> bool:
    """Stop a command (SIGSTOP) at a moment at which the condition holds; SIGCONT lets it go on. False if
    the command was over before it was met at such a moment."""
    while True:
        wait_until(lambda: condition() or not running.is_running(), what)
        running.send(signal.SIGSTOP)
        wait_until(lambda: _is_frozen(running), "the command to stop")
        if not running.is_running():
            return False
        if condition():
            return True
        running.send(signal.SIGCONT)


@contextmanager
def frozen(
    start: Callable[[], AbstractContextManager[Running]], condition: Callable[[], bool], what: str
) -> Iterator[Running]:
    """A command that was frozen in the middle of something, begun anew if it was too quick to be met."""
    for _ in range(_TRIES):
        with start() as running:
            if freeze_when(running, condition, what):
                yield running
                return
    raise AssertionError(f"never met: {what}")


def _is_frozen(running: Running) -> bool:
    """Every thread of it."""
    try:
        stats = [path.read_text() for path in Path(f"/proc/{running.pid}/task").glob("*/stat")]
    except OSError:  # one of them is over
        return not running.is_running()
    states = {stat.rpartition(")")[2].split()[0] for stat in stats}
    return not running.is_running() or states <= {"T", "Z"}


def _content(stream: IO[bytes]) -> str:
    size_bytes = os.fstat(stream.fileno()).st_size
    return os.pread(stream.fileno(), size_bytes, 0).decode(errors="replace")
