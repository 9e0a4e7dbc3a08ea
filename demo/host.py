"""One host of the story: its directories, its environment, and agentkeep run on it as a user would.

Every command is a process of its own with a clean environment. Credentials go in by environment only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).parents[1]
_COMMAND_LIMIT_SECONDS = 120.0
_STOP_LIMIT_SECONDS = 30.0
_POLL_SECONDS = 0.1
_LOG_LINES_SHOWN = 15


class DemoError(Exception):
    """Something in the story did not go as told. `detail` is what a reader needs to find out why."""

    def __init__(self, message: str, *, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


@dataclass(frozen=True)
class Host:
    """A home directory and what is known there. `credentials` are variables of the environment."""

    home: Path
    credentials: dict[str, str]

    def agentkeep(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end. Raises DemoError unless it exits with 0."""
        words = f"agentkeep {' '.join(arguments)}"
        try:
            done = subprocess.run(
                [*agentkeep_command(), *arguments],
                cwd=self.home,
                env=self.environment(),
                capture_output=True,
                text=True,
                timeout=_COMMAND_LIMIT_SECONDS,
                start_new_session=True,
                check=False,
            )
        except subprocess.TimeoutExpired as exc:
            raise DemoError(f"{words}: not done after {exc.timeout:g} s", detail=str(exc.stderr)) from exc
        if done.returncode != 0:
            said = (done.stdout + done.stderr).strip()
            raise DemoError(f"{words}: exit code {done.returncode}", detail=said)
        return done

    def agentkeep_json(self, *arguments: str) -> Any:
        return json.loads(self.agentkeep("--json", *arguments).stdout)

    @contextmanager
    def daemon(self, *arguments: str) -> Iterator[Daemon]:
        """agentkeep in the background; killed at the end if nobody has stopped it."""
        log = self.home / "agentkeep.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [*agentkeep_command(), *arguments],
                cwd=self.home,
                env=self.environment(),
                stdout=stream,
                stderr=stream,
                start_new_session=True,  # a Ctrl-C is for the demo, which then stops it in good order
            )
        daemon = Daemon(process, log)
        try:
            yield daemon
        finally:
            daemon.kill()

    def environment(self) -> dict[str, str]:
        """All that a command sees: nothing of whoever runs the demo but the path and the time zone."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "LC_ALL": "C.UTF-8",
            "TZ": os.environ.get("TZ", ""),
            "AWS_EC2_METADATA_DISABLED": "true",
            **self.credentials,
        }


class Daemon:
    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log

    def wait_until(self, condition: Callable[[], bool], *, what: str, limit_seconds: float) -> None:
        """Raises DemoError if the daemon ends, or the limit passes, before the condition holds."""
        deadline = time.monotonic() + limit_seconds
        while not condition():
            if self._process.poll() is not None:
                raise self._error(f"the daemon ended by itself, exit code {self._process.returncode}")
            if time.monotonic() > deadline:
                raise self._error(f"no {what} within {limit_seconds:g} s")
            time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """By SIGTERM, as an init system would. Raises DemoError unless the daemon exits with 0."""
        self._process.send_signal(signal.SIGTERM)
        try:
            exit_code = self._process.wait(_STOP_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise self._error(f"the daemon was still there {_STOP_LIMIT_SECONDS:g} s after SIGTERM") from None
        if exit_code != 0:
            raise self._error(f"the daemon's exit code after SIGTERM is {exit_code}, not 0")

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _error(self, message: str) -> DemoError:
        lines = self._log.read_text(errors="replace").splitlines()
        return DemoError(message, detail="\n".join(lines[-_LOG_LINES_SHOWN:]))


def agentkeep_command() -> Sequence[str]:
    """The command as installed beside this interpreter."""
    installed = Path(sys.executable).with_name("agentkeep")
    if not installed.exists():
        raise DemoError(
            f"agentkeep is not installed beside {sys.executable}",
            detail=f"make demo installs it; by hand: {sys.executable} -m pip install -e {_REPOSITORY}",
        )
    return [str(installed)]
