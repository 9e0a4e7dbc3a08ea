"""`python -m demo`: tells the story, leaves nothing behind, and says by its exit code how it ended."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from demo.bucket import directory_destination, s3_destination
from demo.host import DemoError
from demo.narrator import Narrator
from demo.story import tell


class _TerminatedError(BaseException):
    """SIGTERM, made an exception so that everything started is stopped on the way out."""


def main() -> int:
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, _terminate)
    narrator = Narrator()
    try:
        with tempfile.TemporaryDirectory(prefix="agentkeep-demo-") as name:
            directory = Path(name)
            open_destination = directory_destination if arguments.file_backend else s3_destination
            proof = tell(narrator, directory=directory, destination=open_destination(directory / "offsite"))
    except DemoError as exc:
        narrator.verdict(f"FAILED: {exc}", good=False)
        narrator.detail(exc.detail)
        return 1
    except KeyboardInterrupt:
        narrator.verdict("Interrupted; nothing is left running.", good=False)
        return 128 + signal.SIGINT
    except _TerminatedError:
        narrator.verdict("Terminated; nothing is left running.", good=False)
        return 128 + signal.SIGTERM
    narrator.verdict(
        f"PASSED in {narrator.elapsed_seconds:.0f} s: the agent came back from its bucket key, all "
        f"{proof.total_rows_checked:,} rows of one instant.",
        good=True,
    )
    return 0


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise _TerminatedError


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
