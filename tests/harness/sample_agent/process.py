"""The writer as a process of its own: started, watched, stopped or killed by its own pid."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness.sample_agent.journal import Journal

_REPOSITORY = Path(__file__).parents[3]
_START_LIMIT_SECONDS = 60.0
_STOP_LIMIT_SECONDS = 30.0
_POLL_SECONDS = 0.02


class RunningWriter:
    """A handle on the process. `journal` is where it says what it writes."""

    def __init__(self, process: subprocess.Popen[bytes], journal: Path) -> None:
        self._process = process
        self.journal = journal

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for_round(self, round_number: int, *, limit_seconds: float = _START_LIMIT_SECONDS) -> None:
        """Until that round has begun. Raises RuntimeError if the writer ends or takes too long."""
        deadline = time.monotonic() + limit_seconds
        while self._last_round_begun() < round_number:
            if self._process.poll() is not None:
                raise RuntimeError(f"the writer ended by itself, exit code {self._process.returncode}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the writer has not reached round {round_number} in {limit_seconds:g} s")
            time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """Between two steps. Idempotent; raises RuntimeError unless the writer ends well."""
        self._end(signal.SIGTERM)
        if self._process.returncode != 0:
            raise RuntimeError(f"the writer failed, exit code {self._process.returncode}")

    def kill(self) -> None:
        """Wherever it is."""
        self._end(signal.SIGKILL)

    def _last_round_begun(self) -> int:
        try:
            return Journal.read(self.journal).last_round
        except (FileNotFoundError, ValueError):  # it is still getting up
            return 0

    def _end(self, how: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(how)
        try:
            self._process.wait(_STOP_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def running_writer(
    root: Path, *, journal: Path, pause_ms: float = 5.0, commit_every_rounds: int = 3
) -> Iterator[RunningWriter]:
    """A writer at work, past its first round. Whoever did not stop it: it is killed at the end."""
    command = [sys.executable, "-m", "tests.harness.sample_agent", "write", str(root)]
    options = {"journal": journal, "pause-ms": pause_ms, "commit-every-rounds": commit_every_rounds}
    command.extend(f"--{name}={value}" for name, value in options.items())
    # Its own session: a Ctrl-C is for whoever started it, who then ends it in good order.
    environment = {**os.environ, "PYTHONPATH": str(_REPOSITORY)}
    process = subprocess.Popen(command, cwd=_REPOSITORY, env=environment, start_new_session=True)
    writer = RunningWriter(process, journal)
    try:
        writer.wait_for_round(1)
        yield writer
    finally:
        writer.kill()
