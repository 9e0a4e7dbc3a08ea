"""`python -m demo`: tells the story, leaves nothing behind, and says by its exit code how it ended."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from demo.bucket import directory_destination, s3_destination
from demo.host import DemoError
from demo.narrator import Narrator
from demo.story import tell

_REMOVAL_ATTEMPTS = 50


class _StoppedError(BaseException):
    """A signal, made an exception so that everything started is stopped on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def main() -> int:
    arguments = _parser().parse_args()
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    narrator = Narrator()
    try:
        with _scratch_directory() as directory:
            open_destination = directory_destination if arguments.file_backend else s3_destination
            proof = tell(narrator, directory=directory, destination=open_destination(directory / "offsite"))
    except DemoError as exc:
        narrator.verdict(f"FAILED: {exc}", good=False)
        narrator.detail(exc.detail)
        return 1
    except RuntimeError as exc:  # the server, or the agent's writer, did not start or stay
        narrator.verdict("FAILED: a part of the demo itself did not work", good=False)
        narrator.detail(f"{exc}\n`python -m demo --file-backend` does without the S3 server")
        return 1
    except _StoppedError as exc:
        narrator.verdict(f"Stopped by {exc}; nothing is left running.", good=False)
        return exc.exit_code
    narrator.verdict(
        f"PASSED in {narrator.elapsed_seconds:.0f} s: the agent came back from its bucket key, all "
        f"{proof.total_rows_checked:,} rows of one instant.",
        good=True,
    )
    return 0


def _stop(number: int, _frame: FrameType | None) -> None:
    for more in (signal.SIGINT, signal.SIGTERM):
        signal.signal(more, signal.SIG_IGN)  # an impatient second one would leave things behind
    raise _StoppedError(number)


@contextmanager
def _scratch_directory() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="agentkeep-demo-"))
    try:
        yield directory
    finally:
        _remove(directory)


def _remove(directory: Path) -> None:
    """Again if need be: a git process that was interrupted has children that write for a moment longer."""
    for _ in range(_REMOVAL_ATTEMPTS):
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return
        time.sleep(0.1)
    raise DemoError(f"{directory} cannot be removed")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m demo", description="An agent is lost and brought back.")
    parser.add_argument(
        "--file-backend",
        action="store_true",
        help="store bundles in a directory instead of on an S3 server started for the demo",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
