"""What other people's software has written comes back for that same software to read.

Each runs in a process of its own, from an environment of its own (`.venv/software`, which `make install`
makes), and has its stores open while the snapshot is taken. What it says then of what it holds, it has to say
of what was restored.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import LIMIT_SECONDS, REPOSITORY, Host, clean_environment, quoted

PYTHON = REPOSITORY / ".venv/software/bin/python"


@pytest.fixture(autouse=True)
def _installed() -> None:
    assert PYTHON.exists(), "the software is not installed: `make install` does it"


def start(name: str, what: str, root: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [PYTHON, "-m", "tests.harness.software", name, what, root],
        cwd=REPOSITORY,
        env=clean_environment(root.parent),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@contextmanager
def having_written(name: str, root: Path) -> Iterator[Any]:
    """What the software says of the store that it has made, and has open until the end of the block."""
    with start(name, "write", root) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            assert line, f"{name} has failed to write"
            yield json.loads(line)
        finally:
            process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0


def read_again(name: str, root: Path) -> Any:
    with start(name, "read", root) as process:
        said, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0
    return json.loads(said)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("llm_logs", 'profile = "llm"'),
        ("chroma_collection", 'profile = "chroma"'),
        ("langgraph_checkpoints", ""),
        ("vectors_apsw", 'sqlite = ["vectors.db"]'),
    ],
    ids=["llm", "chroma", "langgraph", "sqlite-vec"],
)
def test_software_finds_in_a_restored_store_what_it_had_written(name: str, lines: str, host: Host) -> None:
    root = host.home / "ana"
    host.configure({"ana": f"root = {quoted(root)}\n{lines}"})
    with having_written(name, root) as written:
        record = host.document("snapshot")
        files = {path.name: path.stat().st_size for path in root.rglob("*") if path.is_file()}
    assert record["complete"] is True
    assert record["consistency"]["level"] == "point_in_time"
    root.rename(host.home / "lost")

    restored = host.document("restore", "latest", "--agent", "ana", "--yes")
    assert restored["snapshot_id"] == record["snapshot_id"]
    assert restored["complete"] is True
    assert not restored["not_put_back"]
    assert not restored["unsound"]
    assert read_again(name, root) == written
    if name in ("langgraph_checkpoints", "vectors_apsw"):  # else the test would prove less than it means to
        assert any(size_bytes > 0 for file, size_bytes in files.items() if file.endswith("-wal"))


def test_a_store_is_restored_to_a_directory_for_its_software_to_look_into(host: Host) -> None:
    root = host.home / "ana"
    host.configure({"ana": f"root = {quoted(root)}"})
    with having_written("langgraph_checkpoints", root) as written:
        record = host.document("snapshot")
    host.agentkeep("restore", record["snapshot_id"], "--to", host.home / "look")
    assert os.listdir(host.home / "look/sqlite") == ["checkpoints.sqlite"]  # noqa: PTH208
    assert read_again("langgraph_checkpoints", host.home / "look/sqlite") == written
