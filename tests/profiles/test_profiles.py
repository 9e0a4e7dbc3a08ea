"""Every shipped profile, against the layout that it was written for.

`NAME.toml` beside this file lists paths of that layout and what has to become of each:

    source      where the layout is from
    databases, files, memory (in the memdir), states, links: captured
    secret      looks like a secret; a directory ends in "/" and is left out whole
    excluded    by a pattern
    outside     not part of the profile

A path that stands in none of them is a failure, as is a profile without such a file.
"""

from __future__ import annotations

import sqlite3
import tomllib
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from wcmatch import glob

from config.agents import Profile, agent_spec, load_profile, profile_names
from config.settings import AgentSettings
from daemon.capture.cut import with_memdir
from daemon.capture.scan import EXCLUDED, OUTSIDE, SECRET, Scanner
from daemon.model import AgentSpec

HERE = Path(__file__).parent
LEFT_OUT = {"secret": SECRET, "excluded": EXCLUDED, "outside": OUTSIDE}
KINDS = ("databases", "files", "memory", "states", *LEFT_OUT)


def layout(name: str) -> dict[str, Any]:
    return tomllib.loads((HERE / f"{name}.toml").read_text())


def build(root: Path, listed: dict[str, Any]) -> AgentSpec:
    """The tree that a fixture lists; the agent in it as capture sees it."""
    for kind in KINDS:
        for path in listed.get(kind, ()):
            place = root / path
            (place if path.endswith("/") else place.parent).mkdir(parents=True, exist_ok=True)
            if path.endswith("/"):
                (place / "something").write_text("x")
            elif kind == "databases" or path.endswith((".db", ".sqlite")):
                with closing(sqlite3.connect(place)) as connection:
                    connection.execute("CREATE TABLE t (x)")
            else:
                place.write_text("x")
    for path in listed.get("repositories", ()):
        (root / path / ".git" / "refs").mkdir(parents=True)
        (root / path / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    return with_memdir(agent_spec("ana", AgentSettings(root=root, profile=listed["profile"])))


def became(spec: AgentSpec) -> dict[str, str]:
    """What a snapshot would make of each path."""
    found = Scanner(spec).scan()
    assert (found.failures, found.suspects) == ({}, {})
    memdir = "" if spec.memdir in (None, spec.root) else f"{spec.relative(spec.memdir or spec.root)}/"
    is_memory = bool(spec.memdir)
    of_files = {path: "memory" if is_memory and path.startswith(memdir) else "files" for path in found.files}
    of_states = {spec.relative(state.file): "states" for state in spec.states if state.file}
    return of_files | dict.fromkeys(found.databases, "databases") | of_states


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_takes_its_layout_as_it_should(name: str, tmp_path: Path) -> None:
    listed = layout(name) | {"profile": name}
    spec = build(tmp_path, listed)
    expected = {path: kind for kind in KINDS[:4] for path in listed.get(kind, ())}
    assert became(spec) == expected


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_says_why_it_leaves_out_the_rest(name: str, tmp_path: Path) -> None:
    listed = layout(name) | {"profile": name}
    found = Scanner(build(tmp_path, listed)).scan()
    for kind, reason in LEFT_OUT.items():
        paths = {path.rstrip("/") for path in listed.get(kind, ())}
        counted = sum(count for (why, _), count in found.excluded.items() if why == reason)
        examples = {path for why, paths in found.examples.items() if why[0] == reason for path in paths}
        assert counted == len(paths), (kind, found.excluded)
        assert examples <= paths


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_is_found_by_its_marks(name: str, tmp_path: Path) -> None:
    build(tmp_path, layout(name) | {"profile": name})
    marks = load_profile(name).marks
    assert marks
    for mark in marks:
        assert glob.glob(mark, root_dir=tmp_path, flags=glob.BRACE | glob.DOTGLOB), mark


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_is_written_as_it_should_be(name: str) -> None:
    profile = load_profile(name)
    assert profile.summary
    assert profile.include
    assert layout(name)["source"]
    relative = [*profile.memdir, *profile.include, *profile.exclude, *profile.secrets, *profile.marks]
    relative += [str(path) for state in profile.state.values() for path in (state.file, state.sqlite) if path]
    assert not [path for path in relative if path.startswith(("/", "~")) or ".." in path.split("/")]


@pytest.mark.parametrize(
    "text",
    [
        "inclued = []",
        "include = '**'",
        "[state]\nx = { command = ['date'] }",
        "[state]\nMyX = { file = 'x' }",
    ],
)
def test_a_profile_with_anything_else_in_it_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        Profile.model_validate(tomllib.loads(text))


def test_every_fixture_is_of_a_profile() -> None:
    assert sorted(path.stem for path in HERE.glob("*.toml")) == profile_names()


# --- what all of them leave out -------------------------------------------------------------------

SECRETS = [
    ".env",
    "deep/er/.env.production",
    "prod.env",
    ".envrc",
    "auth.json",
    "auth.json.bak",
    "agents/x/auth-profiles.json",
    "token.json",
    "credentials",
    "credentials.json",
    ".credentials.json",
    "credentials.md",
    "aws-credentials.toml",
    "credentials_of_ana.yaml",
    ".git-credentials",
    "service-account-7.json",
    "server.pem",
    "tls.KEY",
    "store.p12",
    "passwords.kdbx",
    "id_rsa",
    "id_ed25519",
    ".netrc",
    ".npmrc",
    ".pypirc",
    ".pgpass",
    "home/.docker/config.json",
    "Credentials/",
    "deep/credentials/",
    "secrets/",
    ".ssh/",
    ".aws/",
    ".gnupg/",
]
EXCLUDED_EVERYWHERE = [
    "agent.pid",
    "run/agent.sock",
    "half.tmp",
    ".lock",
    ".index.lock",
    "node_modules/",
    "sub/node_modules/",
    ".venv/",
    "venv/",
    "src/__pycache__/",
    ".cache/",
    "tool/.cache/",
    "repo/.git/hooks/",
]
NOTES = [
    "keys.md",
    "how-credentials-work.md",
    "credentials-policy/first.md",
    "credentials.py",
    "secret-santa.md",
    "secrets.md",
    "environment.md",
    "authentication.md",
    "tokens.md",
    "the-key.md",
    "poetry.lock",
    "Cargo.lock",
    "cache.md",
    "my.npmrc.md",
    "monkey",
    "id_rsa.md",
]


def build_common(root: Path) -> None:
    listed = {"secret": SECRETS, "excluded": EXCLUDED_EVERYWHERE, "files": NOTES, "profile": "generic"}
    build(root, listed)


SPELLINGS = {
    "a profile": {"profile": "generic"},
    "sources spelled out": {"files": ("**",)},
}


@pytest.mark.parametrize("settings", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_notes_stay_and_secrets_go_whatever_the_agent(settings: dict[str, Any], tmp_path: Path) -> None:
    build_common(tmp_path)
    found = Scanner(agent_spec("ana", AgentSettings(root=tmp_path, **settings))).scan()
    assert found.files.keys() == set(NOTES)
    counted = dict.fromkeys(LEFT_OUT.values(), 0)
    for (reason, _), count in found.excluded.items():
        counted[reason] += count
    assert counted == {SECRET: len(SECRETS), EXCLUDED: len(EXCLUDED_EVERYWHERE), OUTSIDE: 0}


def test_secrets_stay_where_that_is_asked_for(tmp_path: Path) -> None:
    build_common(tmp_path)
    found = Scanner(agent_spec("ana", AgentSettings(root=tmp_path, include_secrets=True))).scan()
    captured = found.files.keys()
    assert {path for path in SECRETS if not path.endswith("/")} <= captured
    assert ".ssh/something" in captured


def test_a_secret_that_is_spelled_out_stays(tmp_path: Path) -> None:
    build_common(tmp_path)
    settings = AgentSettings(root=tmp_path, profile="generic", files=("token.json", str(tmp_path / ".ssh")))
    captured = Scanner(agent_spec("ana", settings)).scan().files.keys()
    assert captured == {*NOTES, "token.json", ".ssh/something"}
