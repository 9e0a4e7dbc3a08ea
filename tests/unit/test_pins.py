"""A pin holds from the window to the last page of its copy, whatever else the capture looks at meanwhile."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from daemon.capture.sources import OpenSources
from daemon.model import AgentSpec

_TRUNCATE_THE_WAL = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)
db.execute("UPDATE facts SET value = value + 1")
print(db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])
"""


def _posix_locks() -> list[str]:
    """What this process has locked, as the kernel says: mode, file, range."""
    lines = Path("/proc/locks").read_text().splitlines()
    mine = [line.split()[1:] for line in lines if "POSIX" in line and f" {os.getpid()} " in line]
    return sorted(" ".join(fields) for fields in mine)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An agent with a database that another connection has open, so that it has its sidecars."""
    root = tmp_path / "agent"
    root.mkdir()
    return root


def test_a_scan_leaves_the_locks_of_a_pin_alone(root: Path, tmp_path: Path) -> None:
    path = root / "facts.sqlite"
    (tmp_path / "staged").mkdir()
    spec = AgentSpec("default", "ana", root, include=("**",))
    with closing(sqlite3.connect(path, isolation_level=None)) as agent, ExitStack() as stack:
        agent.execute("PRAGMA journal_mode=WAL")
        agent.execute("CREATE TABLE facts (value INTEGER)")
        agent.execute("INSERT INTO facts VALUES (1)")
        sources = OpenSources(spec, tmp_path / "staged", stack)
        assert sources.prepare() == set()
        assert sources.pin() == set()
        held = _posix_locks()
        assert held  # the pin's
        # As a writer's memory map does by itself, now and then.
        os.utime(f"{path}-shm")
        os.utime(f"{path}-wal")

        sources.moved_since_staged()

        assert _posix_locks() == held
        done = subprocess.run(
            [sys.executable, "-c", _TRUNCATE_THE_WAL, path], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "1"  # busy: the checkpoint waits for the pin
        pinned = sources.databases["facts.sqlite"].connection()
        assert pinned.execute("SELECT value FROM facts").fetchone() == (1,)


def test_a_database_may_have_a_sidecars_name(root: Path, tmp_path: Path) -> None:
    (tmp_path / "staged").mkdir()
    with closing(sqlite3.connect(root / "dream-journal")) as agent:
        agent.execute("CREATE TABLE dreams (text TEXT)")
    with ExitStack() as stack:
        sources = OpenSources(AgentSpec("default", "ana", root, include=("**",)), tmp_path / "staged", stack)
        sources.prepare()
        assert list(sources.databases) == ["dream-journal"]
