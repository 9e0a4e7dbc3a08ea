"""The writer as a process, kept running or killed again and again; and what a bundle shows of its stores."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from daemon.locate import LocalBundle
from daemon.model import Manifest
from daemon.restore.unpack import unpack
from tests.harness.sample_agent.builder import run_git
from tests.stress.stores import (
    CURSOR,
    DATABASES,
    LOG,
    NOTE,
    STORES,
    last_of_log,
    size_bytes,
    value_of_commit,
    value_of_document,
)

_REPOSITORY = Path(__file__).parents[2]
_END_SECONDS = 60.0  # only for what hangs
_LONGEST_LIFE_SECONDS = 0.5
_LONGEST_DEATH_SECONDS = 0.25
_LOOK_AGAIN_SECONDS = 0.001


def start_writer(root: Path, *options: str) -> subprocess.Popen[bytes]:
    """A writer at work, in a session of its own, so that its git can be killed with it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.stress.writer", str(root), *options],
        cwd=_REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    if process.stdout.readline() != b"ready\n":
        _, said = process.communicate()
        raise AssertionError(f"the writer did not get up: {said.decode()}")
    return process


def kill_writer(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@contextmanager
def writing(root: Path, *options: str) -> Iterator[dict[str, Any]]:
    """A writer at work; in the end what it said goes into the dictionary. Raises AssertionError if any of
    its stores refused it."""
    said: dict[str, Any] = {}
    process = start_writer(root, *options)
    try:
        yield said
        process.terminate()
        out, err = process.communicate(timeout=_END_SECONDS)
        assert process.returncode == 0, err.decode()
        said.update(json.loads(out))
    finally:
        kill_writer(process)


class Killer:
    """Starts the writer and kills it again and again, with it dead for moments: wherever it is, and every
    other time in the middle of something."""

    def __init__(self, root: Path, *options: str, in_the_middle: Callable[[Path], bool]) -> None:
        self._root = root
        self._options = options
        self._in_the_middle = in_the_middle
        self._born = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.error: AssertionError | None = None
        self.kills = 0
        self.kills_in_the_middle = 0

    def __enter__(self) -> Killer:
        self._thread.start()
        self._born.wait()  # for the first time: there is an agent now
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                self._live_and_die()
        except AssertionError as exc:
            self.error = exc
        finally:
            self._born.set()

    def _live_and_die(self) -> None:
        process = start_writer(self._root, *self._options)
        self._born.set()
        try:
            self._over.wait(random.uniform(0.0, _LONGEST_LIFE_SECONDS))
            while self.kills % 2 and not self._in_the_middle(self._root) and process.poll() is None:
                self._over.wait(_LOOK_AGAIN_SECONDS)
            assert process.poll() is None, "the writer ended by itself"
        finally:
            kill_writer(process)
        self.kills += 1
        self.kills_in_the_middle += self._in_the_middle(self._root)
        self._over.wait(random.uniform(0.0, _LONGEST_DEATH_SECONDS))


def within_a_line(root: Path) -> bool:
    """Whether the log ends with a torn line."""
    log = (root / LOG).read_bytes()
    return not log.endswith(b"\n") and log != b""


def within_a_transaction(root: Path) -> bool:
    """Whether a rollback journal lies beside a database. Looked at by name only: closing a database's file
    here would drop the locks of a snapshot that this process is taking."""
    return any(size_bytes(root / f"{name}-journal") for name in DATABASES)


@dataclass(frozen=True)
class Shown:
    """What a bundle shows: the counter of each store, in the order of `STORES`, and all its plain files."""

    manifest: Manifest
    counters: dict[str, int]
    files: Path

    @property
    def is_point_in_time(self) -> bool:
        return self.manifest.consistency.level == "point_in_time"

    @property
    def values(self) -> tuple[int, ...]:
        return tuple(self.counters.values())

    @property
    def steps(self) -> int:
        """How many steps the agent had done at that instant."""
        return sum(self.values)

    def __str__(self) -> str:
        values = ", ".join(f"{name} {value}" for name, value in self.counters.items())
        return f"{self.manifest.snapshot_id}: {self.manifest.consistency} of {values}"


def read_back(bundle: Path, scratch: Path) -> Shown:
    """Unpack a bundle, prove each store sound by itself, and read its counter."""
    scratch.mkdir()
    manifest, unsound = unpack(LocalBundle(bundle), scratch, identities=())
    assert unsound == ()
    assert manifest.complete, manifest.failures
    read = {name: _value_of_database(scratch / "sqlite" / name) for name in DATABASES}
    if manifest.git is not None:
        read[LOG] = _value_of_log(scratch / "files" / LOG)
        read["note"] = _value_of_file(scratch / "memory_files" / NOTE)
        read["commit"] = _value_of_repository(scratch)
        read[CURSOR] = _value_of_file(scratch / "files" / CURSOR)
    return Shown(manifest, {name: read[name] for name in STORES if name in read}, scratch / "files")


def _value_of_database(path: Path) -> int:
    """Each transaction raised many rows together, so a torn one shows."""
    with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro&immutable=1", uri=True)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        (counter,) = database.execute("SELECT value FROM counter").fetchone()
        ballast = database.execute("SELECT min(value), max(value) FROM ballast").fetchone()
        history = database.execute("SELECT count(*), coalesce(max(value), 0) FROM history").fetchone()
    assert (*ballast, *history) == (counter,) * 4, "a torn transaction"
    return int(counter)


def _value_of_log(path: Path) -> int:
    content = path.read_bytes() if path.exists() else b""
    assert content == b"" or content.endswith(b"\n"), "a log that ends within a line"
    return last_of_log(content)


def _value_of_file(path: Path) -> int:
    return value_of_document(path.read_bytes()) if path.exists() else 0


def _value_of_repository(scratch: Path) -> int:
    repository = scratch / "repository"
    run_git(scratch, "clone", "--quiet", "--mirror", "git/memory.bundle", str(repository))
    run_git(repository, "fsck", "--strict")
    counter = value_of_commit(run_git(repository, "log", "-1", "--format=%s", "main"))
    if counter:
        assert value_of_document(run_git(repository, "show", f"main:{NOTE}").encode()) >= counter
    return counter
