"""Builds the sample agent as it stands before its first round: reproducible, streamed, of any size.

The same seed and size give the same rows, lines, notes and commit ids on every host. Memory stays at
a few megabytes however large the agent. Writes nothing outside the root it is given.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tests.harness.sample_agent import content, layout, rows
from tests.harness.sample_agent.layout import Database, Sizes

_ROWS_IN_ONE_INSERT = 500
_WORDS_IN_A_NOTE = 450
_NOTE_BYTES = 3200
_COMMITS_OF_NOTES = 5
_IDENTITY = {"NAME": "Sample Agent", "EMAIL": "agent@example.invalid", "DATE": "2026-01-01T00:00:00+0000"}


class GitCommandError(Exception):
    """A git command failed; the message is what it said."""


def build(root: Path, *, seed: int, size_mb: float = 2, agent_id: str = layout.AGENT_ID) -> None:
    """Make an agent of about `size_mb` (10^6 bytes) in `root`, which must not exist or be empty."""
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()):
        raise FileExistsError(f"{root} is not empty")
    for directory in ("db", "sessions", "state"):
        (root / directory).mkdir()
    sizes = Sizes.of(size_mb)
    identity = content.identity_document(agent_id=agent_id, seed=seed, size_mb=size_mb)
    (root / layout.IDENTITY).write_bytes(identity)
    for database in layout.DATABASES:
        _build_database(root / database.path, database, seed=seed, size_mb=size_mb)
    for name in (*layout.ARCHIVED_LOGS, layout.CURRENT_LOG):
        with (root / name).open("wb") as log:
            log.writelines(content.base_log_lines(seed, name, size_bytes=sizes.each_log_bytes))
    log_size_bytes = (root / layout.CURRENT_LOG).stat().st_size
    (root / layout.CURSOR).write_bytes(content.cursor_document(round_number=0, log_size_bytes=log_size_bytes))
    _build_memdir(root / layout.MEMDIR, seed=seed, note_count=3 + sizes.memdir_bytes // _NOTE_BYTES)


def run_git(memdir: Path, *arguments: str) -> str:
    """One git command under a fixed identity and clock, with nobody's configuration or hooks."""
    fixed = {
        f"GIT_{role}_{name}": value for role in ("AUTHOR", "COMMITTER") for name, value in _IDENTITY.items()
    }
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(memdir),
        "LC_ALL": "C",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        **fixed,
    }
    done = subprocess.run(
        ["git", *arguments], cwd=memdir, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise GitCommandError(f"git {arguments[0]}: exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _build_database(path: Path, database: Database, *, seed: int, size_mb: float) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = OFF")  # nobody mourns a half-built sample
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("BEGIN")
        rows.create_tables(connection, database)
        row_count = 0
        stream = rows.base_rows(database, seed=seed, size_mb=size_mb)
        while batch := list(islice(stream, _ROWS_IN_ONE_INSERT)):
            rows.insert_rows(connection, database, batch)
            row_count += len(batch)
        connection.execute("INSERT INTO rounds VALUES (0, ?, 'base')", (row_count,))
        connection.execute("COMMIT")
        connection.execute("PRAGMA journal_mode = WAL")
    finally:
        connection.close()


def _build_memdir(memdir: Path, *, seed: int, note_count: int) -> None:
    """History in a pack and loose, a branch, a tag, and work that is not committed."""
    (memdir / "notes").mkdir(parents=True)
    run_git(memdir, "init", "--quiet", "--initial-branch=main")
    (memdir / layout.MODIFIED_NOTE).write_bytes(memory_note(seed, modified=False))
    run_git(memdir, "add", layout.MODIFIED_NOTE)
    run_git(memdir, "commit", "--quiet", "--message=memory begins")
    names = note_names(note_count)
    commits = min(_COMMITS_OF_NOTES, note_count)
    for number in range(commits):
        for name in islice(names, note_count // commits + (number < note_count % commits)):
            (memdir / name).write_bytes(content.note(seed, name, words=_WORDS_IN_A_NOTE))
        run_git(memdir, "add", "notes")
        run_git(memdir, "commit", "--quiet", f"--message=notes, part {number + 1}")
    run_git(memdir, "tag", "--annotate", "v1", "--message=first good state")
    run_git(memdir, "gc", "--quiet")
    run_git(memdir, "checkout", "--quiet", "-b", "experiment")
    (memdir / "notes/idea.md").write_bytes(content.note(seed, "idea", words=80))
    run_git(memdir, "add", "notes/idea.md")
    run_git(memdir, "commit", "--quiet", "--message=an idea, on a branch")
    run_git(memdir, "checkout", "--quiet", "main")
    (memdir / layout.ROUND_NOTE).write_bytes(content.round_note(seed, 0))
    run_git(memdir, "add", layout.ROUND_NOTE)
    run_git(memdir, "commit", "--quiet", "--message=round 0")
    (memdir / layout.MODIFIED_NOTE).write_bytes(memory_note(seed, modified=True))
    (memdir / layout.UNTRACKED_NOTE).write_bytes(content.note(seed, layout.UNTRACKED_NOTE, words=90))


def memory_note(seed: int, *, modified: bool) -> bytes:
    """MEMORY.md as committed, or with the lines that the agent has added since."""
    committed = content.note(seed, layout.MODIFIED_NOTE, words=200)
    return committed + b"\n- not committed yet\n" if modified else committed


def note_names(note_count: int) -> Iterator[str]:
    return (f"notes/note-{number:05}.md" for number in range(note_count))
