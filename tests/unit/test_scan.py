"""What a scan finds, leaves out, and refuses to be fooled by."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from config.agents import agent_spec
from config.settings import AgentSettings
from daemon.capture import scan
from daemon.capture.patterns import Patterns
from daemon.capture.scan import EXCLUDED, LINK_OUT, OUTSIDE, SECRET, Scan, Scanner, open_quietly
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
    assert found.directories.keys() == {"sessions", "sessions/a"}


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


def test_what_is_left_of_a_database_is_one(root: Path) -> None:
    """Whatever its name: it cannot be captured, and that is said where it is opened."""
    (root / "torn").write_bytes(b"SQLite format 3\0")
    assert scan_of(root).databases.keys() == {"torn"}


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


def test_a_link_in_place_of_a_directory_of_the_profile_is_a_failure(root: Path, tmp_path: Path) -> None:
    """What it leads to is what the agent knows, and it is not in the snapshot."""
    write(tmp_path, "elsewhere/MEMORY.md")
    write(root, "skills/real/SKILL.md")
    for link in ("workspace", "skills/linked", "unknown"):
        (root / link).symlink_to(tmp_path / "elsewhere")
    (root / "gone").symlink_to(tmp_path / "nowhere")
    found = scan_of(root, include=("workspace/**", "skills/**", "gone/**"), walk_all=True)
    assert found.symlinks.keys() == {"workspace", "skills/linked", "gone"}
    assert found.failures.keys() == {"workspace"}
    assert "symbolic link" in found.failures["workspace"].reason
    assert reasons(found) == {(OUTSIDE, "unknown"): 1, LINK_OUT: 2}


def test_a_link_that_is_excluded_is_no_failure(root: Path, tmp_path: Path) -> None:
    (root / "workspace").symlink_to(tmp_path)
    found = scan_of(root, include=("workspace/**",), exclude=("workspace",), walk_all=True)
    assert (found.failures, found.symlinks) == ({}, {})


def test_a_fifo_is_not_waited_for(root: Path) -> None:
    os.mkfifo(root / "memory.sqlite")
    found = scan_of(root, sqlite=("*.sqlite",))
    assert dict(found.excluded) == {("neither file nor directory", "fifo"): 1}
    assert found.failures.keys() == {"*.sqlite"}


def reasons(found: Scan) -> dict[tuple[str, str], int]:
    return dict(found.excluded)


# --- what is counted ------------------------------------------------------------------------------


def test_what_no_pattern_takes_is_counted_below_the_entry_of_the_root_that_it_lies_in(root: Path) -> None:
    write(root, "sessions/1.jsonl", "sessions/1.txt", "sessions/old/2.txt", "logs/a.log", "logs/b/c.log", "x")
    found = scan_of(root, include=("sessions/*.jsonl",), walk_all=True)
    assert found.files.keys() == {"sessions/1.jsonl"}
    assert found.directories.keys() == {"sessions"}
    assert reasons(found) == {
        (OUTSIDE, "logs/"): 1,  # a directory in which nothing can match is one, and not entered
        (OUTSIDE, "sessions/"): 2,
        (OUTSIDE, "x"): 1,
    }
    assert sorted(found.examples[OUTSIDE, "sessions/"]) == ["sessions/1.txt", "sessions/old"]


def test_a_directory_in_which_nothing_can_match_is_not_listed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root, "a.md", "huge/x")
    listed: list[str] = []
    list_directory = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or list_directory(path))
    found = scan_of(root, include=("*.md", "notes/*/x.md"), walk_all=True)
    assert reasons(found) == {(OUTSIDE, "huge/"): 1}
    assert listed == [str(root)]


@pytest.mark.parametrize(
    ("include", "entered"),
    [
        ("a/b/c.md", {"a", "a/b"}),
        ("a/*/c.md", {"a", "a/b", "a/other"}),
        ("*/b/*.md", {"a", "a/b", "other"}),
        ("a/**", {"a", "a/b", "a/b/deep", "a/other"}),
        ("**/c.md", {"a", "a/b", "a/b/deep", "a/other", "other"}),
        ("c.md", set()),
    ],
)
def test_the_directories_that_a_pattern_can_match_in_are_entered(
    include: str, entered: set[str], root: Path
) -> None:
    write(root, "a/b/deep/c.md", "a/other/x", "other/x")
    assert scan_of(root, include=(include,), walk_all=True).directories.keys() == entered


def test_sources_that_are_spelled_out_say_nothing_of_what_lies_beside_them(root: Path) -> None:
    write(root, "sessions/1.jsonl", "sessions/.env", "sessions/keys/.env", "private/letter", ".env")
    found = scan_of(root, include=("sessions/*.jsonl",), secrets=(".env",))
    assert found.files.keys() == {"sessions/1.jsonl"}
    assert reasons(found) == {}


def test_however_much_lies_in_a_root_few_groups_are_counted(root: Path) -> None:
    write(root, *(f"{number:03}" for number in range(100)), "big/a", "big/b")
    found = scan_of(root, include=("notes/**", "big/*.md"), walk_all=True)
    assert len(found.excluded) == 21
    assert found.excluded[OUTSIDE, "big/"] == 2
    assert found.excluded.total() == 102
    assert len(found.examples[OUTSIDE, "(other entries)"]) == 3


def test_a_name_that_is_no_text_can_be_counted(root: Path) -> None:
    write(root, "a.md")
    (root / os.fsdecode(b"\xff\xfe")).write_bytes(b"")
    [excluded] = scan_of(root, include=("*.md",), walk_all=True).exclusions()
    assert (excluded.reason, excluded.pattern) == (OUTSIDE, "\\xff\\xfe")


def test_examples_are_few(root: Path) -> None:
    write(root, *(f"{number}.tmp" for number in range(10)))
    found = scan_of(root, exclude=("*.tmp",))
    assert found.excluded[EXCLUDED, "*.tmp"] == 10
    assert len(found.examples[EXCLUDED, "*.tmp"]) == 3


# --- secrets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["credentials", "*cred*", "credentials/**", "**/credentials/**"])
def test_a_directory_of_secrets_is_left_out_whole_and_counted_as_one(pattern: str, root: Path) -> None:
    write(root, "credentials/a.json", "credentials/deep/b.md", "note.md")
    found = scan_of(root, secrets=(pattern,))
    assert found.files.keys() == {"note.md"}
    assert found.directories == {}
    assert reasons(found) == {(SECRET, pattern): 1}


def test_a_secret_is_one_in_capitals_too(root: Path) -> None:
    write(root, "AUTH.JSON", "Credentials/x", "note.TMP")
    found = scan_of(root, secrets=("auth.json", "credentials"), exclude=("*.tmp",))
    assert found.files.keys() == {"note.TMP"}


def test_a_secret_outside_of_the_profile_is_still_named_as_one(root: Path) -> None:
    write(root, "auth.json", "other.json", "a.md")
    found = scan_of(root, include=("*.md",), secrets=("auth.json",), walk_all=True)
    assert reasons(found) == {(SECRET, "auth.json"): 1, (OUTSIDE, "other.json"): 1}


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
def test_the_sidecar_of_a_database_that_is_left_out_is_left_out_with_it(suffix: str, root: Path) -> None:
    make_database(root / "auth.db")
    make_database(root / "logs.db")
    write(root, f"auth.db{suffix}", f"logs.db{suffix}")
    found = scan_of(root, secrets=("auth.db",), exclude=("logs.db",))
    assert (found.files, found.databases) == ({}, {})
    assert reasons(found) == {(SECRET, "auth.db"): 2, (EXCLUDED, "logs.db"): 2}


def test_the_sidecar_of_a_database_is_no_stranger_to_the_profile(root: Path) -> None:
    make_database(root / "state.sqlite")
    write(root, "state.sqlite-wal", "state.sqlite-shm")
    found = scan_of(root, include=("*.sqlite",), walk_all=True)
    assert found.databases.keys() == {"state.sqlite"}
    assert {pattern: count for (_, pattern), count in found.excluded.items()} == {"*-wal": 1, "*-shm": 1}


# --- what the user named --------------------------------------------------------------------------


@pytest.mark.parametrize("walk_all", [False, True])
def test_what_is_named_is_taken_whatever_leaves_it_out(walk_all: bool, root: Path) -> None:
    write(root, ".env", "other.env", "keep.tmp", "lose.tmp")
    named = (".env", "keep.tmp")
    found = scan_of(
        root, include=("**",), named=named, secrets=("*.env", ".env"), exclude=("*.tmp",), walk_all=walk_all
    )
    assert found.files.keys() == set(named)
    assert reasons(found) == {(SECRET, "*.env"): 1, (EXCLUDED, "*.tmp"): 1}


@pytest.mark.parametrize("walk_all", [False, True])
def test_of_a_directory_of_secrets_only_what_is_named_is_taken(walk_all: bool, root: Path) -> None:
    name = "credentials/of/ana/token.json"
    write(root, name, "credentials/other.json", "credentials/of/bob/token.json", "credentials/of/ana/x")
    found = scan_of(
        root, include=("notes/*.md", name), named=(name,), secrets=("credentials",), walk_all=walk_all
    )
    assert found.files.keys() == {name}
    assert {why for why, _ in found.excluded} == {SECRET}


def test_a_directory_that_is_named_is_taken_whole_but_for_secrets(root: Path) -> None:
    write(root, "credentials/a.md", "credentials/deep/b.md", "credentials/.env", "other/c.md")
    found = scan_of(
        root, include=("credentials",), named=("credentials",), secrets=("credentials", ".env"), walk_all=True
    )
    assert found.files.keys() == {"credentials/a.md", "credentials/deep/b.md"}
    assert reasons(found) == {(SECRET, ".env"): 1, (OUTSIDE, "other/"): 1}


def test_a_pattern_into_a_directory_of_secrets_finds_nothing_and_that_is_said(root: Path) -> None:
    write(root, "credentials/a.json")
    found = scan_of(
        root, include=("credentials/*.json",), required=("credentials",), secrets=("*credentials",)
    )
    assert found.files == {}
    assert "looks like a secret" in found.failures["credentials"].reason
    assert found.failures["credentials"].hint


# --- sizes ----------------------------------------------------------------------------------------


def test_what_is_larger_than_allowed_is_a_failure_and_is_not_captured(root: Path) -> None:
    make_database(root / "large.sqlite")
    write(root, "small.md")
    with (root / "large.bin").open("wb") as stream:
        stream.truncate(5000)  # a sparse file counts as what a copy would be
    found = scan_of(root, include=("**",), sqlite=("*.sqlite",), max_file_bytes=4999)
    assert (found.files.keys(), found.databases) == ({"small.md"}, {})
    assert found.failures.keys() == {"large.bin", "large.sqlite"}
    failure = found.failures["large.bin"]
    assert (failure.source, failure.reason) == (
        str(root / "large.bin"),
        "has 5,000 bytes; max_file_bytes allows 4,999",
    )
    assert "max_file_bytes" in failure.hint


def test_what_is_just_as_large_as_allowed_is_captured(root: Path) -> None:
    write(root, "a.md")
    assert scan_of(root, max_file_bytes=1).files.keys() == {"a.md"}


def test_a_file_too_small_for_a_header_is_not_opened(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "small").write_bytes(b"x" * 15)
    (root / "empty").touch()
    make_database(root / "database")
    opened: list[str] = []
    monkeypatch.setattr(scan, "open_quietly", lambda path: opened.append(path) or open_quietly(path))
    assert scan_of(root).databases.keys() == {"database"}
    assert opened == [str(root / "database")]


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
        "repo/.git/config",
    ]
    kept = [
        "note.md",
        "environment.md",
        "keys/about.md",
        "sub/cache.md",
        ".config/agent.toml",
        "repo/.git/HEAD",
    ]
    write(root, *left_out, *secrets, *kept)
    found = Scanner(agent_spec("ana", AgentSettings(root=root))).scan()
    assert found.files.keys() == set(kept)
    counted: dict[str, int] = {}
    for (reason, _), count in found.excluded.items():
        counted[reason] = counted.get(reason, 0) + count
    assert counted["looks like a secret"] == len(secrets)
    assert counted["excluded by pattern"] == len(left_out)
