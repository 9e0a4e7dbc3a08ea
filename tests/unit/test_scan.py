"""What a scan finds, leaves out, and refuses to be fooled by."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from config.agents import load_profile
from daemon.capture.scan import Patterns, Scan, Scanner
from daemon.model import AgentSpec, StateSource


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "ana"
    root.mkdir()
    return root


def scan_of(root: Path, **fields: Any) -> Scan:
    return Scanner(AgentSpec("default", "ana", root, **{"include": ("**",), **fields})).scan()


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def make_database(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t (x)")


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("**", ["a", "a/b", ".hidden", "a/.b/c"], []),
        ("*.md", ["a.md", ".a.md"], ["a/b.md", "a.mdx"]),
        ("**/*.md", ["a.md", "a/b.md", "a/.b/c.md"], ["a/b.txt"]),
        ("db/*.sqlite", ["db/a.sqlite"], ["db/b/a.sqlite", "a.sqlite"]),
        ("sessions/**/*.jsonl", ["sessions/a.jsonl", "sessions/b/c/a.jsonl"], ["a.jsonl", "other/a.jsonl"]),
        ("notes/?.md", ["notes/a.md"], ["notes/ab.md", "notes//.md"]),
        ("log[0-9].txt", ["log1.txt"], ["logx.txt"]),
        ("a b/#?.md", ["a b/#1.md"], ["a b/1.md"]),
    ],
)
def test_patterns_match_like_globs_with_hidden_files(
    pattern: str, matching: list[str], other: list[str]
) -> None:
    patterns = Patterns((pattern,), anywhere=False)
    assert [path for path in matching + other if patterns.matching(path) == pattern] == matching


def test_an_exclusion_without_a_slash_matches_at_any_depth() -> None:
    patterns = Patterns(("*.tmp", "top/only.md"), anywhere=True)
    assert patterns.matching("a.tmp") == "*.tmp"
    assert patterns.matching("deep/er/a.tmp") == "*.tmp"
    assert patterns.matching("top/only.md") == "top/only.md"
    assert patterns.matching("deep/top/only.md") is None


def test_the_first_pattern_that_matches_is_the_one_that_is_counted() -> None:
    assert Patterns(("a*", "*b"), anywhere=False).matching("ab") == "a*"


def test_included_files_alone_are_found(root: Path) -> None:
    write(root, "a.md", "a.txt", "sub/b.md", "other/c.md")
    found = scan_of(root, include=("*.md", "sub/**"))
    assert found.files.keys() == {"a.md", "sub/b.md"}


def test_nothing_outside_the_fixed_part_of_the_patterns_is_looked_at(root: Path) -> None:
    write(root, "sessions/a/1.jsonl", "huge/cache/x")
    found = scan_of(root, include=("sessions/**/*.jsonl",))
    assert found.files.keys() == {"sessions/a/1.jsonl"}
    assert found.directories.keys() == {"sessions/a"}


@pytest.mark.parametrize("directory", list("abcdefgh"))
def test_overlapping_patterns_find_a_file_once(root: Path, directory: str) -> None:
    write(root, f"{directory}/b/c.md", f"{directory}/x.tmp")
    include = (f"{directory}/**", f"{directory}/b/**", "**/*.md")
    found = scan_of(root, include=include, exclude=("*.tmp",))
    assert found.files.keys() == {f"{directory}/b/c.md"}
    assert dict(found.excluded) == {("excluded by pattern", "*.tmp"): 1}


def test_an_excluded_directory_is_not_looked_into(root: Path) -> None:
    write(root, "cache/a", "cache/deep/b", "sub/cache/c")
    found = scan_of(root, exclude=("cache/**",))
    assert found.files.keys() == {"sub/cache/c"}
    assert found.directories.keys() == {"sub", "sub/cache"}


def test_the_repository_of_the_memdir_is_left_to_git(root: Path) -> None:
    write(root, "memory/.git/config", "memory/note.md", "memory/.gitignore", "vendored/.git/config")
    found = scan_of(root, memdir=root / "memory")
    assert found.files.keys() == {"memory/note.md", "memory/.gitignore", "vendored/.git/config"}


def test_a_state_file_is_left_to_the_state_values(root: Path) -> None:
    write(root, "cursor.json", "other.json")
    found = scan_of(root, states=(StateSource("cursor", file=root / "cursor.json"),))
    assert found.files.keys() == {"other.json"}


def test_databases_are_told_by_their_header(root: Path) -> None:
    make_database(root / "anything.at.all")
    write(root, "text.db")
    found = scan_of(root)
    assert found.databases.keys() == {"anything.at.all"}
    assert found.files.keys() == {"text.db"}


@pytest.mark.parametrize("name", ["memory.sqlite", "memory.sqlite3"])
def test_what_is_called_a_database_and_is_none_is_suspect(root: Path, name: str) -> None:
    write(root, name)
    found = scan_of(root)
    assert found.suspects.keys() == {name}
    assert found.suspects[name].hint
    assert found.files == {}


def test_what_was_promised_to_be_a_database_and_is_none_is_suspect_whatever_its_name(root: Path) -> None:
    write(root, "db/memory.dat")
    found = scan_of(root, sqlite=("db/*.dat",))
    assert found.suspects.keys() == {"db/memory.dat"}


def test_what_has_a_wal_and_is_no_database_is_suspect(root: Path) -> None:
    write(root, "memory.dat", "memory.dat-wal")
    assert scan_of(root).suspects.keys() == {"memory.dat", "memory.dat-wal"}


def test_a_database_that_becomes_a_file_is_one_and_the_other_way_round(root: Path) -> None:
    """Also where the file system gives an inode's number to the next file."""
    scanner = Scanner(AgentSpec("default", "ana", root, include=("**",)))
    for _ in range(20):
        make_database(root / "memory")
        assert scanner.scan().databases.keys() == {"memory"}
        (root / "memory").unlink()
        write(root, "memory")
        assert scanner.scan().files.keys() == {"memory"}
        (root / "memory").unlink()


def test_a_database_that_is_held_open_is_not_opened_as_a_file(root: Path) -> None:
    """Closing any descriptor of it would drop SQLite's locks: what is known to be one is not looked at."""
    write(root, "held")
    scanner = Scanner(AgentSpec("default", "ana", root, include=("**",)))
    status = (root / "held").stat()
    scanner.held_open.add((status.st_dev, status.st_ino))
    assert scanner.scan().databases.keys() == {"held"}


def test_sources_that_are_spelled_out_and_missing_are_failures(root: Path) -> None:
    write(root, "there.md")
    found = scan_of(root, required=("there.md", "gone.md"), sqlite=("db/*.sqlite",))
    assert found.failures.keys() == {"gone.md", "db/*.sqlite"}
    assert all(failure.reason == "nothing is there" and failure.hint for failure in found.failures.values())


def test_a_source_that_is_spelled_out_and_a_symlink_is_a_failure(root: Path, tmp_path: Path) -> None:
    make_database(tmp_path / "elsewhere.sqlite")
    (root / "memory.sqlite").symlink_to(tmp_path / "elsewhere.sqlite")
    found = scan_of(root, required=("memory.sqlite",), sqlite=("memory.sqlite",))
    assert "symbolic link" in found.failures["memory.sqlite"].reason
    assert found.databases == {}


def test_a_symlinked_directory_is_not_entered(root: Path, tmp_path: Path) -> None:
    write(tmp_path, "elsewhere/secret.md")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    found = scan_of(root)
    assert found.files == {}
    assert found.symlinks == {"link": str(tmp_path / "elsewhere")}


def test_a_fifo_is_not_waited_for(root: Path) -> None:
    os.mkfifo(root / "memory.sqlite")
    found = scan_of(root, sqlite=("*.sqlite",))
    assert dict(found.excluded) == {("neither file nor directory", "fifo"): 1}
    assert found.failures.keys() == {"*.sqlite"}


def test_the_generic_profile_leaves_out_what_an_agent_does_not_know(root: Path) -> None:
    left_out = [
        "agent.pid",
        "run/agent.sock",
        "node_modules/x/index.js",
        "sub/node_modules/x/index.js",
        "__pycache__/a.pyc",
        "src/__pycache__/a.pyc",
        ".cache/x",
        "tool/.venv/bin/python",
        "repo/.git/hooks/post-commit",
    ]
    secrets = [
        ".env",
        "sub/.env.local",
        "auth.json",
        "aws-credentials.toml",
        "keys/server.pem",
        "id_ed25519",
        ".netrc",
    ]
    kept = [
        "note.md",
        "environment.md",
        "keys/about.md",
        "sub/cache.md",
        ".config/agent.toml",
        "repo/.git/config",
    ]
    write(root, *left_out, *secrets, *kept)
    profile = load_profile("generic")
    found = scan_of(root, include=profile.include, exclude=profile.exclude, secrets=profile.secrets)
    assert found.files.keys() == set(kept)
    counted: dict[str, int] = {}
    for (reason, _), count in found.excluded.items():
        counted[reason] = counted.get(reason, 0) + count
    assert counted["looks like a secret"] == len(secrets)
    assert counted["excluded by pattern"] == len(left_out)
