"""`python -m benchmarks.memory`: how much memory and time does it take to keep an agent and bring it back?

Builds a sample agent, keeps it writing, and runs snapshot (with upload), verify, export and restore, each
as a process of its own. What comes back is proven row by row, so that no figure is one of a failure.
Prints; measures through process_tree.py. Leaves nothing running and nothing behind.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.process_tree import Measurement, measure
from demo.bucket import Destination, bundles, directory_destination, s3_destination
from demo.configuration import write_configuration
from demo.host import Host, agentkeep_command
from tests.harness.sample_agent import ProofError, RestoredPaths, prove, running_writer

AGENT = "ana"
SEED = 700
TARGET_PEAK_BYTES = 250_000_000
_SCHEDULE = "every 12h"  # never due: the benchmark takes its one snapshot itself
_WRITER_PAUSE_MS = 15.0
_REPOSITORY = Path(__file__).parents[1]


class StepFailed(Exception):
    """A command under measurement did not exit with 0; the message is what it said."""


@dataclass(frozen=True)
class Figures:
    """One step; memory is that of the command's whole process tree, in the two kinds of process_tree.py."""

    step: str
    wall_seconds: float
    cpu_seconds: float
    peak_pss_bytes: int
    peak_rss_bytes: int
    samples: int
    under_target: bool

    @classmethod
    def of(cls, step: str, measured: Measurement) -> Figures:
        return cls(
            step=step,
            wall_seconds=round(measured.wall_seconds, 2),
            cpu_seconds=round(measured.cpu_seconds, 2),
            peak_pss_bytes=measured.peak_pss_bytes,
            peak_rss_bytes=measured.peak_rss_bytes,
            samples=measured.samples,
            under_target=measured.peak_bytes < TARGET_PEAK_BYTES,
        )


@dataclass(frozen=True)
class Report:
    agent_bytes: int
    bundle_bytes: int
    destination: str
    agent_was_writing: bool
    rows_proven: int
    cpus: int
    memory_bytes: int
    target_peak_bytes: int
    steps: list[Figures]


def main() -> int:
    arguments = _parser().parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="agentkeep-benchmark-") as directory:
        try:
            report = _run(Path(directory), arguments)
        except (StepFailed, ProofError) as exc:
            sys.stderr.write(f"{type(exc).__name__}: {exc}\n")
            return 1
    if arguments.json:
        sys.stdout.write(json.dumps(asdict(report), indent=2) + "\n")
    else:
        _print_table(report)
    return 0


def _run(directory: Path, arguments: argparse.Namespace) -> Report:
    first, second = directory / "first-host", directory / "second-host"
    first.mkdir()
    second.mkdir()
    root, journal = first / AGENT, directory / "journal.jsonl"
    _progress(f"building an agent of {arguments.size_mb:g} MB")
    _sample_agent("build", str(root), f"--seed={SEED}", f"--size-mb={arguments.size_mb}")
    agent_bytes = _size_bytes(root)
    open_destination = directory_destination if arguments.file_backend else s3_destination
    with open_destination(directory / "offsite") as destination:
        host = Host(first, destination.environment)
        configuration = write_configuration(first, destination, agent_id=AGENT, root=root, schedule=_SCHEDULE)
        configured = ("--config", configuration.name)
        with _writing(root, journal=journal, quiet=arguments.quiet_agent):
            steps = [_measured("snapshot", host, [*configured, "snapshot", AGENT])]
        (snapshot_id, key), *_ = bundles(destination).items()
        shutil.rmtree(root)
        steps.append(_measured("verify", host, [*configured, "verify", snapshot_id]))
        steps.append(_measured("export", host, [*configured, "export", snapshot_id, "--to", "exported/"]))
        arrival = Host(second, destination.environment)
        steps.append(_measured("restore", arrival, _restore_arguments(destination, key)))
        bundle_bytes = destination.objects()[key]
    _progress("proving what came back")
    proof = prove(RestoredPaths.restored(second / AGENT), journal, scratch=directory)
    return Report(
        agent_bytes=agent_bytes,
        bundle_bytes=bundle_bytes,
        destination=destination.name,
        agent_was_writing=not arguments.quiet_agent,
        rows_proven=proof.total_rows_checked,
        cpus=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        target_peak_bytes=TARGET_PEAK_BYTES,
        steps=steps,
    )


@contextmanager
def _writing(root: Path, *, journal: Path, quiet: bool) -> Iterator[None]:
    """The agent at work; a quiet one has written a few rounds and stopped, its write-ahead logs merged."""
    with running_writer(root, journal=journal, pause_ms=_WRITER_PAUSE_MS) as writer:
        if quiet:
            writer.stop()
        yield
        writer.stop()


def _restore_arguments(destination: Destination, key: str) -> list[str]:
    arguments = ["restore", f"{destination.url}/{key}", "--to", AGENT, "--yes"]
    if destination.endpoint_url is not None:
        arguments += ["--endpoint-url", destination.endpoint_url]
    return arguments


def _measured(step: str, host: Host, arguments: Sequence[str]) -> Figures:
    _progress(step)
    measured = measure([*agentkeep_command(), *arguments], cwd=host.home, environment=host.environment())
    if measured.exit_code != 0:
        said = (measured.stdout + measured.stderr).strip()
        raise StepFailed(f"agentkeep {' '.join(arguments)}: exit code {measured.exit_code}\n{said}")
    return Figures.of(step, measured)


def _sample_agent(*arguments: str) -> None:
    """In a process of its own, so that this one stays small beside what it measures."""
    command = [sys.executable, "-m", "tests.harness.sample_agent", *arguments]
    subprocess.run(command, cwd=_REPOSITORY, check=True)


def _size_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def _progress(text: str) -> None:
    sys.stderr.write(f"{text} ...\n")


def _print_table(report: Report) -> None:
    state = "while it was writing" if report.agent_was_writing else "at rest"
    target = _mb(report.target_peak_bytes)
    table = Table(
        title=f"an agent of {_mb(report.agent_bytes)}, {state}; its bundle: {_mb(report.bundle_bytes)}",
        caption=f"All {report.rows_proven:,} rows came back as written. {report.destination}, on the same "
        f"machine: {report.cpus} cores, {report.memory_bytes / 2**30:.0f} GiB.",
        caption_justify="left",
    )
    table.add_column("step")
    for heading in ("wall", "CPU", "peak PSS\n(all processes)", "peak RSS\n(largest process)"):
        table.add_column(heading, justify="right")
    table.add_column(f"target:\n< {target}")
    for figures in report.steps:
        table.add_row(
            figures.step,
            f"{figures.wall_seconds:.1f} s",
            f"{figures.cpu_seconds:.1f} s",
            _mb(figures.peak_pss_bytes),
            _mb(figures.peak_rss_bytes),
            "met" if figures.under_target else "MISSED",
        )
    Console().print(table)


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.0f} MB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("--size-mb", type=float, default=700.0, help="size of the agent, in 10^6 bytes")
    parser.add_argument("--file-backend", action="store_true", help="a directory instead of an S3 server")
    parser.add_argument("--quiet-agent", action="store_true", help="the agent does not write meanwhile")
    parser.add_argument("--scratch", type=Path, help="a directory with room for five times the size")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
