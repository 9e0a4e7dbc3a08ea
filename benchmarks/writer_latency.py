"""`python -m benchmarks.writer_latency`: what does an agent notice of a backup that is taken while it writes?

Writers commit to the agent's databases (WAL, autocommit, each commit measured), while the agent is left
alone, while agentkeep takes a snapshot, and while the same databases are copied with what a user would pick
instead. All take turns in one run, so that each is compared with its neighbours.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.committing_writer import END, Histogram
from demo.bucket import directory_destination
from demo.configuration import write_configuration
from demo.host import Host, agentkeep_command
from tests.harness.sample_agent import DATABASES, build

AGENT = "ana"
TARGET_MS = 50.0
_REPOSITORY = Path(__file__).parents[1]
_NICE = ["nice", "-n", "10"]  # as systemd/agentkeep.service has it


@dataclass
class Figures:
    histogram: Histogram = field(default_factory=Histogram)
    seconds: list[float] = field(default_factory=list)
    unfinished: int = 0
    """Copies that were given up at the limit."""


class Phases:
    """Tells the writers, by a byte that they map, what their commits count for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_bytes(bytes(1))
        self.names = ["between"]

    def enter(self, name: str) -> None:
        if name not in self.names:
            self.names.append(name)
        self._write(self.names.index(name))

    def end(self) -> None:
        self._write(END)

    def _write(self, value: int) -> None:
        with self._path.open("r+b") as stream:
            stream.write(bytes([value]))


class Bench:
    def __init__(self, directory: Path, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._host = Host(directory, {})
        self._root = directory / AGENT
        self._copies = directory / "copies"
        self._copies.mkdir()
        self._databases = [self._root / database.path for database in DATABASES]
        build(self._root, seed=700, size_mb=arguments.size_mb)
        with directory_destination(directory / "offsite") as destination:
            self._configuration = write_configuration(
                directory, destination, agent_id=AGENT, root=self._root, schedule="every 12h"
            )
        self.phases = Phases(directory / "phase")
        self.figures: dict[str, Figures] = {}

    @property
    def agent_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._root.rglob("*") if path.is_file())

    def run(self) -> None:
        kinds: dict[str, Callable[[], int]] = {
            "nothing": self._nothing,
            "agentkeep snapshot, nice 10": lambda: self._agentkeep(_NICE),
            "agentkeep snapshot": lambda: self._agentkeep([]),
            "sqlite3 .backup": self._backup,
            "cp": self._copy,
        }
        with self._writers():
            for number in range(self._arguments.rounds):
                for name, action in kinds.items():
                    _progress(f"round {number + 1}: {name}")
                    self._measure(name, action)

    def snapshot_of_nothing_new(self) -> list[float]:
        """Seconds of snapshots of an agent at rest: the first takes what is new, the others find nothing."""
        time.sleep(1)
        return [self._timed(lambda: self._agentkeep([], force=False)) for _ in range(4)]

    def _measure(self, name: str, action: Callable[[], int]) -> None:
        figures = self.figures.setdefault(name, Figures())
        self.phases.enter(name)
        started = time.monotonic()
        figures.unfinished += action()
        figures.seconds.append(time.monotonic() - started)
        self.phases.enter("between")
        for copy in self._copies.iterdir():
            copy.unlink()
        time.sleep(1)

    def _timed(self, action: Callable[[], int]) -> float:
        started = time.monotonic()
        action()
        return time.monotonic() - started

    def _nothing(self) -> int:
        time.sleep(self._arguments.quiet_seconds)
        return 0

    def _agentkeep(self, prefix: Sequence[str], *, force: bool = True) -> int:
        command = [*prefix, *agentkeep_command(), "--config", self._configuration.name, "--json", "snapshot"]
        command += ["--no-upload", AGENT] + (["--force"] if force else [])
        done = subprocess.run(
            command,
            cwd=self._host.home,
            env=self._host.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        consistency = json.loads(done.stdout)["consistency"]
        _progress(f"  {consistency['level']}, window {consistency['window_ms']} ms")
        return 0

    def _backup(self) -> int:
        """Each database by the sqlite3 tool, which begins anew whenever somebody has written meanwhile."""
        unfinished = 0
        for database in self._databases:
            target = self._copies / database.name
            command = ["sqlite3", f"file:{database}?mode=ro", f".backup '{target}'"]
            try:
                subprocess.run(command, check=True, timeout=self._arguments.limit_seconds)
            except subprocess.TimeoutExpired:
                unfinished += 1
        return unfinished

    def _copy(self) -> int:
        """Not a backup: copies of live databases are torn. What copying alone costs the writers."""
        subprocess.run(["cp", *map(str, self._databases), str(self._copies)], check=True)
        return 0

    @contextmanager
    def _writers(self) -> Iterator[None]:
        how = [str(self._host.home / "phase"), str(self._arguments.pause_ms), self._arguments.synchronous]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.committing_writer", str(database), *how],
                cwd=_REPOSITORY,
                stdout=subprocess.PIPE,
                text=True,
            )
            for database in self._databases[: self._arguments.writers]
        ]
        try:
            for process in processes:
                assert process.stdout is not None
                process.stdout.readline()
            yield
        finally:
            self.phases.end()
            said = [process.communicate()[0] for process in processes]
        for process, text in zip(processes, said, strict=True):
            if process.returncode != 0:
                raise RuntimeError("a writer has failed: see above")
            self._take_in(json.loads(text))

    def _take_in(self, said: dict[str, Any]) -> None:
        for number, (counts, longest_ms) in said.items():
            name = self.phases.names[int(number)]
            if name in self.figures:
                self.figures[name].histogram.merge(counts, longest_ms)


def main() -> int:
    arguments = _parser().parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="agentkeep-benchmark-") as directory:
        _progress(f"building an agent of {arguments.size_mb:g} MB")
        bench = Bench(Path(directory), arguments)
        bench.run()
        at_rest = bench.snapshot_of_nothing_new()
        _print_table(bench, arguments, at_rest)
    return 0


def _print_table(bench: Bench, arguments: argparse.Namespace, at_rest: list[float]) -> None:
    quiet = bench.figures["nothing"]
    table = Table(
        title=f"{arguments.writers} writers, pauses of {arguments.pause_ms:g} ms, "
        f"synchronous = {arguments.synchronous}, an agent of {bench.agent_bytes / 1e6:.0f} MB, "
        f"{arguments.rounds} rounds, {os.cpu_count()} cores; latency of a commit (times that of `nothing`)",
        caption="Nothing new: a snapshot of the agent at rest took "
        + ", ".join(f"{seconds:.2f}" for seconds in at_rest)
        + " s; the first of them had something to take.",
        caption_justify="left",
    )
    for heading in (
        "meanwhile",
        "seconds",
        "commits/s",
        "p50 ms",
        "p99 ms",
        "longest ms",
        f"> {TARGET_MS:g} ms",
    ):
        table.add_column(heading, justify="left" if heading == "meanwhile" else "right")
    for name, figures in bench.figures.items():
        found = figures.histogram
        ratios = [
            (found.quantile_ms(share), found.quantile_ms(share) / quiet.histogram.quantile_ms(share))
            for share in (0.5, 0.99)
        ]
        ratios.append((found.longest_ms, found.longest_ms / quiet.histogram.longest_ms))
        note = f" ({figures.unfinished} given up)" if figures.unfinished else ""
        table.add_row(
            name + note,
            " ".join(f"{seconds:.1f}" for seconds in figures.seconds),
            f"{found.total / sum(figures.seconds):,.0f}",
            *(f"{ms:.3f} ({ratio:.1f})" for ms, ratio in ratios),
            f"{found.longer_than(TARGET_MS)}",
        )
    Console(width=shutil.get_terminal_size((150, 40)).columns).print(table)


def _progress(text: str) -> None:
    sys.stderr.write(f"{text} ...\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.writer_latency")
    parser.add_argument("--size-mb", type=float, default=700.0, help="size of the agent, in 10^6 bytes")
    parser.add_argument("--writers", type=int, choices=range(1, 5), default=4, help="each its own database")
    parser.add_argument("--pause-ms", type=float, default=0.0, help="between commits; 0: full speed")
    parser.add_argument("--synchronous", choices=["off", "normal", "full"], default="normal")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quiet-seconds", type=float, default=10.0)
    parser.add_argument("--limit-seconds", type=float, default=10.0, help="for each database's .backup")
    parser.add_argument("--scratch", type=Path, help="a directory with room for four times the size")
    return parser


if __name__ == "__main__":
    sys.exit(main())
