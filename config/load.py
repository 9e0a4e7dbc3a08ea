"""Finding, reading and checking the configuration. Every complaint names the file, the line, the value
and the nearest right one (complaints.py)."""

from __future__ import annotations

import fnmatch
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote, urlsplit

from pydantic import ValidationError
from pydantic_settings import SettingsError

from config.agents import agent_spec
from config.complaints import at, explain, is_there, nearest, nearest_path, not_json
from config.settings import ENVIRONMENT_PREFIX, AgentSettings, Settings
from daemon.errors import AgentNotFound, ConfigError, UsageError
from daemon.model import AgentSpec, fixed_head, has_wildcard
from storage_backends import known_schemes

_OWN_VARIABLES = {"AGENTKEEP_CONFIG"}
_Patterns = list[tuple[Path, re.Pattern[str]]]


@dataclass(frozen=True, slots=True)
class Configuration:
    """Checked settings, where they came from, and each agent's sources."""

    path: Path
    settings: Settings
    agents: Mapping[str, AgentSpec]
    _text: str = field(repr=False)  # may hold secrets

    def agent(self, agent_id: str | None) -> AgentSpec:
        """The agent of that id, or the only one. Raises AgentNotFound, which lists the known ones."""
        known = ", ".join(self.agents) or "none"
        if agent_id is None:
            if len(self.agents) != 1:
                raise UsageError("which agent?", hint=f"known agents: {known}")
            return next(iter(self.agents.values()))
        if agent_id not in self.agents:
            near = get_close_matches(agent_id, self.agents, n=1)
            raise AgentNotFound(
                f"no agent {agent_id!r} in {self.path}" + (f"; did you mean {near[0]!r}?" if near else ""),
                hint=f"known agents: {known}",
            )
        return self.agents[agent_id]

    def destinations_of(self, agent_id: str) -> tuple[str, ...]:
        named = self.settings.agents[agent_id].destinations
        return tuple(self.settings.destinations) if named is None else named

    def missing_paths(self, agent_id: str) -> list[str]:
        """A complaint for each plain path of the agent that is not there now."""
        spec = self.agents[agent_id]
        required = [spec.root / path for path in spec.required] if is_there(spec.root) else []
        return [
            f"{at(self.path, self._text, self._location_of(agent_id, path))}no such path: {path}"
            f"{nearest_path(path)}"
            for path in (spec.root, *required)
            if not is_there(path)
        ]

    def _location_of(self, agent_id: str, path: Path) -> tuple[str, str, str]:
        """The key that names `path`."""
        root = self.agents[agent_id].root
        for key, pattern in self.settings.agents[agent_id].spelled_out:
            if path in (root / Path(pattern).expanduser(), root / Path(fixed_head(pattern)).expanduser()):
                return ("agents", agent_id, key)
        return ("agents", agent_id, "root")


def find_config_file(given: Path | None) -> Path:
    """`--config`, then AGENTKEEP_CONFIG, then the host's, then the user's. Raises ConfigError."""
    if given is None and (named := os.environ.get("AGENTKEEP_CONFIG")):
        given = Path(named)
    user = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    usual = [Path("/etc/agentkeep/agentkeep.toml"), user / "agentkeep" / "agentkeep.toml"]
    for path in [given] if given is not None else usual:
        if path.is_file():
            return path
    looked = ", ".join(map(str, [given] if given is not None else usual))
    raise ConfigError(
        f"no configuration: {looked} is not there" if given else f"no configuration at {looked}",
        hint="`agentkeep init --out FILE` writes one; name it with --config FILE or AGENTKEEP_CONFIG",
    )


def load(path: Path) -> Configuration:
    """Read and check a configuration file. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path} is not valid TOML: {exc}") from exc
    return parse(path, text)


def parse(path: Path, text: str) -> Configuration:
    """Check a configuration that is, or is to be, in a file. Raises ConfigError."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{path} is not valid TOML: {exc}") from exc
    _check_environment()
    for key in raw:
        if key.startswith("_"):  # BaseSettings would take it as an argument of its own
            raise ConfigError(f"{at(path, text, (key,))}unknown key {key!r}", hint=_EXAMPLE_HINT)
    try:
        settings = Settings(**raw)
    except ValidationError as exc:
        raise ConfigError("\n".join(explain(path, text, exc)), hint=_EXAMPLE_HINT) from exc
    except SettingsError as exc:
        raise not_json(str(exc)) from exc
    _check_destinations(path, text, settings)
    agents = _agents(path, text, settings)
    _check_overlap(path, text, agents)
    _check_written(path, text, agents, settings)
    return Configuration(path, settings, agents, text)


_EXAMPLE_HINT = f"{Path(__file__).with_name('agentkeep.example.toml')} shows every key with its meaning"


def _agents(path: Path, text: str, settings: Settings) -> dict[str, AgentSpec]:
    agents = {}
    for agent_id, agent in settings.agents.items():
        try:
            agents[agent_id] = agent_spec(agent_id, agent)
        except ConfigError as exc:
            source, separator, _ = str(exc).partition(": ")
            key = source if separator and source in AgentSettings.model_fields else "profile"
            raise ConfigError(f"{at(path, text, ('agents', agent_id, key))}{exc}", hint=exc.hint) from exc
    return agents


def _check_environment() -> None:
    known = {f"{ENVIRONMENT_PREFIX}{name}".upper() for name in Settings.model_fields}
    given = [("environment variable", variable) for variable in os.environ]
    if (credentials := Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nonexistent"))).is_dir():
        given += [("credential", entry.name) for entry in credentials.iterdir()]
    for what, spelled in given:
        name = spelled.upper()
        if not name.startswith(ENVIRONMENT_PREFIX) or name in _OWN_VARIABLES:
            continue
        if name.split("__")[0] not in known:
            raise ConfigError(f"the {what} {spelled} means nothing{nearest(name, known)}")


def _check_destinations(path: Path, text: str, settings: Settings) -> None:
    for name, destination in settings.destinations.items():
        scheme, separator, _ = destination.url.partition("://")
        schemes = [known for known in known_schemes() if known != "memory"]  # gone with the process
        if not separator or scheme not in schemes:
            raise ConfigError(
                f"{at(path, text, ('destinations', name, 'url'))}no storage backend for"
                f" {scheme[:40]!r}{nearest(scheme, schemes)}",
                hint=f"a URL begins with one of: {', '.join(f'{known}://' for known in schemes)}",
            )
    for agent_id, agent in settings.agents.items():
        for name in agent.destinations or ():
            if name not in settings.destinations:
                raise ConfigError(
                    f"{at(path, text, ('agents', agent_id, 'destinations'))}no destination {name!r}"
                    f"{nearest(name, settings.destinations)}",
                    hint=f"known destinations: {', '.join(settings.destinations) or 'none'}",
                )


def _check_overlap(path: Path, text: str, agents: Mapping[str, AgentSpec]) -> None:
    """Nothing belongs to two agents, as far as names tell; of wildcards that meet in part they do not."""
    owners: dict[Path, str] = {}
    patterns: dict[Path, _Patterns] = {}  # by the directory of the first wildcard

    def refuse(agent_id: str, place: Path, other: Path) -> NoReturn:
        raise ConfigError(
            f"{at(path, text, ('agents', agent_id))}agents {owners[other]!r} and {agent_id!r} overlap:"
            f" {other} and {place}",
            hint="two agents cannot own the same files: mend `root`, or spell their sources out",
        )

    for agent_id, spec in agents.items():
        for place in _places(spec):
            if owners.setdefault(place, agent_id) != agent_id:
                refuse(agent_id, place, place)
            if has_wildcard(str(place)):
                spelled = re.compile(fnmatch.translate(str(place)))
                patterns.setdefault(Path(fixed_head(str(place))), []).append((place, spelled))
    # A state value of one agent within another: one would read what the other has pinned, and a database
    # must not be opened as a file while SQLite has it open in the same process.
    states = [
        (home.resolve(), agent_id)
        for agent_id, spec in agents.items()
        for source in spec.states
        if (home := source.file or source.sqlite) is not None
    ]
    for place, agent_id in [*owners.items(), *states]:
        for other in _claims_on(place, owners, patterns):
            if owners[other] != agent_id:
                refuse(agent_id, place, other)


def _claims_on(place: Path, owners: Mapping[Path, str], patterns: Mapping[Path, _Patterns]) -> Iterable[Path]:
    """What of that which is claimed is a place, lies above it, or is a pattern that it matches."""
    if place in owners:
        yield place
    for above in place.parents:
        if above in owners:
            yield above
        for pattern, spelled in patterns.get(above, ()):
            if len(pattern.parts) == len(place.parts) and spelled.match(str(place)):
                yield pattern


def _check_written(path: Path, text: str, agents: Mapping[str, AgentSpec], settings: Settings) -> None:
    """What agentkeep writes belongs to no agent: each snapshot would hold all those before it."""
    state_dir = settings.state_dir.resolve()
    written = {"state_dir": state_dir}
    for name, destination in settings.destinations.items():
        if destination.url.startswith("file://"):
            written[f"destination {name!r}"] = Path(unquote(urlsplit(destination.url).path)).resolve()
    for agent_id, spec in agents.items():
        for place in _places(spec):
            for what, directory in written.items():
                is_inside = directory == place or place in directory.parents
                if is_inside or (directory == state_dir and state_dir in place.parents):
                    raise ConfigError(
                        f"{at(path, text, ('agents', agent_id))}agent {agent_id!r} and {what} overlap:"
                        f" {place} and {directory}",
                        hint="what agentkeep writes needs a directory of its own, outside of every agent",
                    )


def _places(spec: AgentSpec) -> Iterable[Path]:
    """What an agent claims: whole directories (for patterns that go deep) or single paths."""
    if spec.memdir is not None:
        yield spec.memdir.resolve()
    for pattern in spec.include:
        is_deep = "**" in pattern
        yield (spec.root / (fixed_head(pattern) if is_deep else pattern)).resolve()
