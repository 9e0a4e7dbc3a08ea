"""Running commands of the local configuration: freeze and thaw, state values, their way back.

Never a shell, never a command out of a bundle. A command is given neither our credentials nor our
settings; what it says on stderr goes to ours, and into no record. One that takes too long is ended with
everything that it started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

_WITHHELD = ("AGENTKEEP_", "AWS_", "CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET")


class CommandFailed(Exception):
    """The message says which program and how: no argument, no output."""


def run_command(
    argv: Sequence[str],
    *,
    directory: Path,
    timeout_seconds: float,
    stdin: bytes = b"",
    max_output_bytes: int = 0,
) -> bytes:
    """Run a command to its end in `directory`; what it wrote to stdout. Raises CommandFailed.

    max_output_bytes: more than that fails; 0: stdout goes where stderr goes, and nothing is returned.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_WITHHELD)}
    program = argv[0]
    # Files and no pipes: nobody has to keep reading while the clock runs, and a child that outlives the
    # command holds up nothing.
    with TemporaryFile() as given, TemporaryFile() as said:
        given.write(stdin)
        given.seek(0)
        try:
            process = subprocess.Popen(
                argv,
                cwd=directory,
                env=environment,
                stdin=given,
                stdout=said if max_output_bytes else sys.stderr.fileno(),
                start_new_session=True,
            )
        except OSError as exc:
            raise CommandFailed(f"{program} cannot be started: {exc.strerror}") from exc
        try:
            code = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired as exc:
            raise CommandFailed(f"{program} took longer than {timeout_seconds:g} s and was ended") from exc
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code != 0:
            raise CommandFailed(f"{program} ended with {_outcome(code)}")
        said.seek(0)
        data = said.read(max_output_bytes + 1)
    if len(data) > max_output_bytes:
        raise CommandFailed(f"{program} printed more than {max_output_bytes} bytes")
    return data


def _outcome(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
