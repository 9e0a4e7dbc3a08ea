"""Running commands of the local configuration: freeze and thaw, state values, their way back.

Never a shell, never a command out of a bundle. A command is given neither our credentials nor our
settings; what it says on stderr goes to ours, and into no record. One that takes too long is ended with
everything that it started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

_WITHHELD = ("AGENTKEEP_", "AWS_", "CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET")
_STDERR = 2
_LOOK_SECONDS = 0.05


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
                stdout=said if max_output_bytes else _STDERR,
                start_new_session=True,
            )
        except OSError as exc:
            raise CommandFailed(f"{program} cannot be started: {exc.strerror}") from exc
        try:
            why = _wait(process, said, timeout_seconds=timeout_seconds, max_output_bytes=max_output_bytes)
        finally:
            is_ended = _end(process)
        if why is not None:
            outcome = "and was ended" if is_ended else "and cannot be ended: it runs as another user"
            raise CommandFailed(f"{program} {why} {outcome}")
        if process.returncode != 0:
            raise CommandFailed(f"{program} ended with {_outcome(process.returncode)}")
        # Without a seek: what still writes in the background would go on at the beginning.
        data = os.pread(said.fileno(), max_output_bytes + 1, 0)
    if len(data) > max_output_bytes:
        raise CommandFailed(f"{program} printed more than {max_output_bytes} bytes")
    return data


def _wait(
    process: subprocess.Popen[bytes], said: BinaryIO, *, timeout_seconds: float, max_output_bytes: int
) -> str | None:
    """Wait for the command's end; or say why it must not go on."""
    deadline = time.monotonic() + timeout_seconds
    while (left_seconds := deadline - time.monotonic()) > 0:
        try:
            process.wait(min(left_seconds, _LOOK_SECONDS))
        except subprocess.TimeoutExpired:
            # Output without end would fill the disk before the time is up.
            if os.fstat(said.fileno()).st_size > max_output_bytes:
                return f"printed more than {max_output_bytes} bytes"
        else:
            return None
    return f"took longer than {timeout_seconds:g} s"


def _end(process: subprocess.Popen[bytes]) -> bool:
    """End a command that still runs, with all of its group; False if this user may not (sudo)."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except PermissionError:
            return False
        process.wait()
    return True


def _outcome(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:  # most of the real-time signals have no name
        return f"signal {-code}"
