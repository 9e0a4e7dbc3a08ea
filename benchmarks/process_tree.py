"""Runs one command and measures it: wall time, CPU time, and the peak memory of its process tree.

Two figures for memory, because each misses something. PSS, sampled over the whole tree, divides shared
pages among those who share them, but a peak between two samples is not seen. `ru_maxrss`, kept by the
kernel, misses nothing, but is that of the largest single process, and counts shared pages in full.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

_SAMPLE_INTERVAL_SECONDS = 0.02
_GONE = (FileNotFoundError, ProcessLookupError, PermissionError)  # it ended while we looked


@dataclass(frozen=True)
class Measurement:
    wall_seconds: float
    cpu_seconds: float
    peak_pss_bytes: int
    peak_rss_bytes: int
    samples: int
    exit_code: int
    stdout: str
    stderr: str

    @property
    def peak_bytes(self) -> int:
        """The worse of the two."""
        return max(self.peak_pss_bytes, self.peak_rss_bytes)


def measure(command: Sequence[str], *, cwd: Path, environment: Mapping[str, str]) -> Measurement:
    """Run `command` to its end. The caller's own memory must be small: a child's `ru_maxrss` begins there."""
    began = monotonic()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    sampler = _Sampler(process.pid)
    readers = [_Reader(stream) for stream in (process.stdout, process.stderr) if stream is not None]
    try:
        sampler.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        sampler.stop()
    wall_seconds = monotonic() - began
    stdout, stderr = (reader.text() for reader in readers)
    return Measurement(
        wall_seconds=wall_seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_pss_bytes=sampler.peak_bytes,
        peak_rss_bytes=usage.ru_maxrss * 1024,
        samples=sampler.samples,
        exit_code=process.returncode,
        stdout=stdout,
        stderr=stderr,
    )


class _Sampler(threading.Thread):
    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self._stopping = threading.Event()
        self.peak_bytes = 0
        self.samples = 0

    def run(self) -> None:
        while not self._stopping.is_set():
            self.peak_bytes = max(self.peak_bytes, sum(map(_pss_bytes, _tree(self._pid))))
            self.samples += 1
            self._stopping.wait(_SAMPLE_INTERVAL_SECONDS)

    def stop(self) -> None:
        self._stopping.set()
        self.join()


class _Reader(threading.Thread):
    """Drains a pipe, so that a talkative command does not wait for us."""

    def __init__(self, stream: Iterator[str]) -> None:
        super().__init__(daemon=True)
        self._stream = stream
        self._lines: list[str] = []
        self.start()

    def run(self) -> None:
        self._lines.extend(self._stream)

    def text(self) -> str:
        self.join()
        return "".join(self._lines)


def _tree(pid: int) -> Iterator[int]:
    yield pid
    with suppress(*_GONE):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _tree(int(child))


def _pss_bytes(pid: int) -> int:
    with suppress(*_GONE):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
