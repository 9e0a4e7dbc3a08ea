"""`python -m tests.harness.sample_agent build|write|prove`: the sample agent by hand and as a process."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from tests.harness.sample_agent import writer
from tests.harness.sample_agent.builder import build
from tests.harness.sample_agent.layout import RestoredPaths
from tests.harness.sample_agent.prover import prove
from tests.harness.sample_agent.verdicts import ProofError


def main() -> int:
    arguments = _parser().parse_args()
    match arguments.command:
        case "build":
            build(arguments.root, seed=arguments.seed, size_mb=arguments.size_mb)
            return 0
        case "write":
            return _write(arguments)
        case _:
            return _prove(arguments)


def _write(arguments: argparse.Namespace) -> int:
    """Until SIGTERM, or until whoever started this is gone: a writer is nobody's orphan."""
    started_by = os.getppid()
    signals: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: signals.append(number))
    signal.signal(signal.SIGINT, lambda number, _frame: signals.append(number))
    writer.work(
        arguments.root,
        journal=arguments.journal,
        pause_ms=arguments.pause_ms,
        commit_every_rounds=arguments.commit_every_rounds,
        stopping=lambda: bool(signals) or os.getppid() != started_by,
    )
    return 0


def _prove(arguments: argparse.Namespace) -> int:
    try:
        proof = prove(RestoredPaths.find(arguments.root), arguments.journal)
    except ProofError as exc:
        sys.stderr.write(f"{type(exc).__name__}: {exc}\n")
        return 1
    sys.stdout.write(f"one instant, {proof.instant}: {proof.total_rows_checked} rows as written\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.harness.sample_agent")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (
        ("build", "make an agent in ROOT"),
        ("write", "keep writing until SIGTERM"),
        ("prove", "prove that ROOT, alive or restored, is one instant of what the journal says"),
    ):
        command = commands.add_parser(name, help=about)
        command.add_argument("root", type=Path)
        if name == "build":
            command.add_argument("--seed", type=int, default=1)
            command.add_argument("--size-mb", type=float, default=20.0)
        else:
            command.add_argument("--journal", type=Path, required=True)
        if name == "write":
            command.add_argument("--pause-ms", type=float, default=20.0)
            command.add_argument("--commit-every-rounds", type=int, default=3)
    return parser


if __name__ == "__main__":
    sys.exit(main())
