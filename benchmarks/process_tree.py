"""Runs one command and measures it: wall time, CPU time, and the peak memory of its process tree.

Two figures for memory, because each misses something. PSS, sampled over the whole tree, divides shared
pages among those who share them, but a peak between two samples is not seen. The high-water mark of RSS
is kept by the kernel and misses nothing up to the last sample, but it is that of the largest single
process, and counts shared pages in full. It is read from /proc (`VmHWM`) because `ru_maxrss` of a child
starts at what its parent used when it was forked.
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
    """Run `command` to its end, whatever its exit code."""
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
        peak_pss_bytes=sampler.peak_pss_bytes,
        peak_rss_bytes=sampler.peak_rss_bytes,
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
        self.peak_pss_bytes = 0
        self.peak_rss_bytes = 0
        self.samples = 0

    def run(self) -> None:
        while not self._stopping.is_set():
            tree = list(_tree(self._pid))
            self.peak_pss_bytes = max(self.peak_pss_bytes, sum(map(_pss_bytes, tree)))
            self.peak_rss_bytes = max(self.peak_rss_bytes, *map(_high_water_bytes, tree))
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
    return _kilobytes_said(Path(f"/proc/{pid}/smaps_rollup"), "Pss:") * 1024


def _high_water_bytes(pid: int) -> int:
    return _kilobytes_said(Path(f"/proc/{pid}/status"), "VmHWM:") * 1024


def _kilobytes_said(path: Path, field: str) -> int:
    with suppress(*_GONE):
        for line in path.read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1])
    return 0
