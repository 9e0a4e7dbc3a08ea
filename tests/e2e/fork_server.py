"""Runs `agentkeep` commands by fork, with everything already imported: tens of milliseconds, not a second.

Each command is a process of its own that runs the real `main`, with its own arguments, environment,
directory and streams; only the import is shared. It can be told to kill itself, by SIGKILL, right
before its n-th step that touches the file system, so that every moment of a command can be died at.

`python -m tests.e2e.fork_server FD` serves one client on the socket FD until the client is gone; commands
that still run then are killed.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

MAX_REQUEST_BYTES = 1 << 17
READY = b"ready"
_PACKAGES = ("daemon", "config", "storage_backends")
_LATE_IMPORTS = (
    "apscheduler.triggers.cron",
    "boto3",
    "botocore.client",
    "encodings.idna",
    "encodings.utf_16_be",
    "importlib.readers",
    "importlib.resources.readers",
    "rich._emoji_codes",
    "typer._adapters",
    "typer._click.decorators",
)
_NOT_IMPORTED = ("daemon.cli.__main__", "storage_backends.conformance")  # runs; is for tests

# Audit events (https://docs.python.org/3/library/audit_events.html) of what changes the file system, and
# of opening anything, which comes before and after all the rest.
_STEPS = {
    "open",
    "os.chmod",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.truncate",
    "os.utime",
    "sqlite3.connect",
}


@dataclass(frozen=True)
class _Command:
    pid: int
    status: socket.socket


def main() -> None:
    client = socket.socket(fileno=int(sys.argv[1]))
    _import_everything()
    gc.freeze()  # so that a collection in a fork does not copy every page
    client.send(READY)
    running: dict[int, _Command] = {}
    while True:
        waiting_for: list[Any] = [client, *running]
        ready, _, _ = select.select(waiting_for, [], [])
        for found in ready:
            if isinstance(found, int):
                _report_end(found, running.pop(found))
                continue
            data, descriptors, _, _ = socket.recv_fds(client, MAX_REQUEST_BYTES, 4)
            if not data:
                _kill_all(running)
                return
            if _start(json.loads(data), descriptors, running):
                client.close()
                _run()


def _import_everything() -> None:
    for name in _LATE_IMPORTS:
        with suppress(ImportError):  # some are a library's own business, which may change
            importlib.import_module(name)
    for package_name in _PACKAGES:
        package = importlib.import_module(package_name)
        for module in pkgutil.walk_packages(package.__path__, f"{package_name}."):
            if module.name not in _NOT_IMPORTED:
                importlib.import_module(module.name)


def _start(request: dict[str, Any], descriptors: list[int], running: dict[int, _Command]) -> bool:
    """Whether this is the new process, which then has become the command but for running it."""
    *streams, status_descriptor = descriptors
    pid = os.fork()
    if pid == 0:
        for pidfd, other in running.items():
            os.close(pidfd)
            other.status.close()
        os.close(status_descriptor)
        _become(request, streams)
        return True
    for stream in streams:
        os.close(stream)
    pidfd = os.pidfd_open(pid)
    status = socket.socket(fileno=status_descriptor)
    socket.send_fds(status, [str(pid).encode()], [pidfd])
    running[pidfd] = _Command(pid, status)
    return False


def _become(request: dict[str, Any], streams: list[int]) -> None:
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    os.chdir(request["cwd"])
    sys.argv = ["agentkeep", *request["arguments"]]
    if (uid := request["uid"]) is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    if request["trace"] is not None or request["kill_at_step"] is not None:
        _watch_steps(trace=request["trace"], kill_at_step=request["kill_at_step"])


def _watch_steps(*, trace: str | None, kill_at_step: int | None) -> None:
    descriptor = None if trace is None else os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    step = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal step
        if event not in _STEPS:
            return
        step += 1
        if descriptor is not None:
            os.write(descriptor, f"{event} {arguments[0]!r}\n".encode())
        if step == kill_at_step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _run() -> None:
    """The command, and of an interpreter's end what can be seen from outside: taking apart all that was
    imported would take longer than most commands."""
    from daemon.cli import main as agentkeep

    try:
        agentkeep()
    except SystemExit as exc:
        exit_code = exc.code
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(int(exit_code or 0))


def _report_end(pidfd: int, command: _Command) -> None:
    _, wait_status = os.waitpid(command.pid, 0)
    os.close(pidfd)
    with suppress(OSError), command.status as status:  # nobody may care any more
        status.send(str(os.waitstatus_to_exitcode(wait_status)).encode())


def _kill_all(running: dict[int, _Command]) -> None:
    for pidfd, command in running.items():
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        _report_end(pidfd, command)


if __name__ == "__main__":
    main()
