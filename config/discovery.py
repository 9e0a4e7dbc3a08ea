"""Agents that live on this host, found by the marks of the profiles, and a configuration for them."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from wcmatch import glob

from config.agents import load_profile, profile_names
from config.load import parse
from config.settings import nearest_name
from daemon.errors import UsageError

_MOST_LEVELS = 3
_MOST_DIRECTORIES = 2000
_NOT_LOOKED_INTO = {".git", ".cache", "node_modules", ".venv", "venv", "__pycache__", "proc", "sys", "dev"}


@dataclass(frozen=True, slots=True)
class FoundAgent:
    agent_id: str
    profile: str
    root: Path


@dataclass(frozen=True, slots=True)
class Discovery:
    """looked_at: every place, for people to read"""

    agents: tuple[FoundAgent, ...]
    looked_at: tuple[str, ...]


def find_agents(directories: Sequence[Path]) -> Discovery:
    """Look at the usual places of each profile, and some levels deep into `directories`.

    Symbolic links are not followed, and of what lies within another agent only that one is found. Raises
    UsageError for a directory that is not there.
    """
    hits: list[tuple[Path, str, str]] = []  # root, profile, what to call it
    looked_at: list[str] = []
    for name in profile_names():
        for place in _usual_places(name):
            looked_at.append(str(place))
            if _is_marked(place, name):
                hits.append((place, name, name))
    for directory in directories:
        if not directory.is_dir():
            raise UsageError(f"no such directory: {directory}", hint="name directories that agents live in")
        for place, name in _search(directory.absolute(), looked_at):
            hits.append((place, name, place.name))
    return Discovery(tuple(_named(_outermost(hits))), tuple(looked_at))


def configuration_for(agents: Sequence[FoundAgent], *, path: Path, url: str | None) -> str:
    """The text of a configuration that loads. Raises ConfigError: a URL that no backend takes, places that
    overlap; it names `path`."""
    parts = [_HEAD, *map(_agent_section, agents), _destination_section(url), _TAIL]
    text = "\n".join(parts)
    parse(path, text)
    return text


def _usual_places(name: str) -> Iterator[Path]:
    for written in load_profile(name).roots:
        expanded = os.path.expandvars(os.path.expanduser(written))  # noqa: PTH111  a Path knows no variables
        if "$" not in expanded and os.path.isabs(expanded):  # noqa: PTH117
            yield Path(expanded)


def _is_marked(place: Path, name: str) -> bool:
    flags = glob.BRACE | glob.DOTGLOB
    marks = load_profile(name).marks
    return bool(marks) and all(any(glob.iglob(mark, root_dir=place, flags=flags)) for mark in marks)


def _search(top: Path, looked_at: list[str]) -> Iterator[tuple[Path, str]]:
    """Agents in and below a directory, those nearest to it first."""
    # Who asks for more is the better guess; `generic` asks for least of all.
    names = sorted(profile_names(), key=lambda name: (name == "generic", -len(load_profile(name).marks)))
    pending = deque([(top, 0)])
    seen = 0
    while pending and seen < _MOST_DIRECTORIES:
        place, level = pending.popleft()
        seen += 1
        if (name := next((name for name in names if _is_marked(place, name)), None)) is not None:
            yield place, name
        elif level < _MOST_LEVELS:
            pending.extend((below, level + 1) for below in _directories_in(place))
    extent = f"{_MOST_LEVELS} levels deep" if not pending else f"its first {_MOST_DIRECTORIES} directories"
    looked_at.append(f"{top} ({extent})")


def _directories_in(place: Path) -> list[Path]:
    try:
        with os.scandir(place) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:  # not for this user to look into
        return []
    return [place / name for name in sorted(names) if name not in _NOT_LOOKED_INTO]


def _outermost(hits: list[tuple[Path, str, str]]) -> list[tuple[Path, str, str]]:
    """Each root once, and none that lies in another: two agents cannot own the same files."""
    kept: dict[Path, tuple[Path, str, str]] = {}
    for hit in sorted(hits, key=lambda hit: len(hit[0].resolve().parts)):
        root = hit[0].resolve()
        if not any(place in kept for place in (root, *root.parents)):
            kept[root] = hit
    return list(kept.values())


def _named(hits: list[tuple[Path, str, str]]) -> Iterator[FoundAgent]:
    taken: set[str] = set()
    for root, profile, called in sorted(hits, key=lambda hit: (hit[1], hit[0])):
        if not _is_text(root):
            continue  # TOML cannot name it
        base = nearest_name(called) or profile
        agent_id, number = base, 1
        while agent_id in taken:
            number += 1
            agent_id = f"{base[:58].rstrip('_-')}-{number}"
        taken.add(agent_id)
        yield FoundAgent(agent_id, profile, root)


def _is_text(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _agent_section(agent: FoundAgent) -> str:
    return f"""\
# {load_profile(agent.profile).summary}
[agents.{agent.agent_id}]
profile = {_toml(agent.profile)}
root = {_toml(str(agent.root))}
#schedule = "every 1h"
#exclude = ["scratch/**"]
"""


def _destination_section(url: str | None) -> str:
    if url is not None:
        return f"[destinations.offsite]\nurl = {_toml(url)}\n"
    return """\
# Without a destination bundles stay on this host.
#[destinations.offsite]
#url = "s3://backups/agents"
#endpoint_url = "https://s3.example.net"
"""


_HEAD = f"""\
# agentkeep: what was found on this host. Every key is in {Path(__file__).with_name("agentkeep.example.toml")}
#
# Next, with --config and this file:
#   agentkeep show --plan AGENT   what would be captured, what not, and why
#   agentkeep check               what would make a backup fail
#   agentkeep run                 the daemon

# Where bundles are kept. Give it if a service and your own shell are to see the same snapshots.
#state_dir = "/var/lib/agentkeep/agents"
"""

_TAIL = """\
# Without recipients, whoever can read the bucket can read the agents' memory: `agentkeep keygen --out FILE`.
#[encryption]
#recipients = ["age1..."]
"""
