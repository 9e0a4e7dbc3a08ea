"""Finding, reading and explaining the configuration.

Every complaint names the file, the line, the value and the nearest right one. No secret is quoted.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_settings import SettingsError

from config.agents import agent_spec
from config.settings import ENVIRONMENT_PREFIX, Settings
from daemon.errors import AgentNotFound, ConfigError, UsageError
from daemon.model import AgentSpec, fixed_head
from storage_backends import known_schemes

_OWN_VARIABLES = {"AGENTKEEP_CONFIG"}
_SECRET_KEYS = {"secret_access_key", "session_token", "access_key_id"}
_Location = tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Configuration:
    """Checked settings, where they came from, and each agent's sources."""

    path: Path
    settings: Settings
    agents: Mapping[str, AgentSpec]
    _text: str

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
        paths = [("root", spec.root), *(("required", spec.root / path) for path in spec.required)]
        return [
            f"{self._where(('agents', agent_id, key))}no such path: {path}"
            for key, path in (paths if spec.root.is_dir() else paths[:1])
            if not path.exists()
        ]

    def _where(self, location: _Location) -> str:
        return _where(self.path, self._text, location)


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
        hint="write one (README: five lines), and name it with --config FILE or AGENTKEEP_CONFIG",
    )


def load(path: Path) -> Configuration:
    """Read and check a configuration file. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
        raw = tomllib.loads(text)
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} is not valid TOML: {exc}") from exc
    _check_environment()
    try:
        settings = Settings(**raw)
    except ValidationError as exc:
        raise ConfigError("\n".join(_explain(path, text, exc)), hint=_EXAMPLE_HINT) from exc
    except SettingsError as exc:
        raise ConfigError(f"an {ENVIRONMENT_PREFIX}... variable cannot be used: {exc}") from exc
    _check_destinations(path, text, settings)
    agents = _agents(path, text, settings)
    _check_overlap(path, text, agents, settings.state_dir.resolve())
    return Configuration(path, settings, agents, text)


_EXAMPLE_HINT = "config/agentkeep.example.toml shows every key with its meaning"


def _agents(path: Path, text: str, settings: Settings) -> dict[str, AgentSpec]:
    agents = {}
    for agent_id, agent in settings.agents.items():
        try:
            agents[agent_id] = agent_spec(agent_id, agent)
        except ConfigError as exc:
            key = "profile" if "profile" in str(exc) else "root"
            raise ConfigError(f"{_where(path, text, ('agents', agent_id, key))}{exc}", hint=exc.hint) from exc
    return agents


def _check_environment() -> None:
    known = {f"{ENVIRONMENT_PREFIX}{name}".upper() for name in Settings.model_fields}
    for variable in os.environ:
        name = variable.upper()
        if not name.startswith(ENVIRONMENT_PREFIX) or name in _OWN_VARIABLES:
            continue
        if name.split("__")[0] not in known:
            raise ConfigError(f"the environment variable {variable} means nothing{_nearest(name, known)}")


def _check_destinations(path: Path, text: str, settings: Settings) -> None:
    for name, destination in settings.destinations.items():
        scheme, separator, _ = destination.url.partition("://")
        schemes = known_schemes()
        if not separator or scheme not in schemes:
            raise ConfigError(
                f"{_where(path, text, ('destinations', name, 'url'))}no storage backend for"
                f" {scheme[:40]!r}{_nearest(scheme, schemes)}",
                hint=f"a URL begins with one of: {', '.join(f'{known}://' for known in schemes)}",
            )
    for agent_id, agent in settings.agents.items():
        for name in agent.destinations or ():
            if name not in settings.destinations:
                raise ConfigError(
                    f"{_where(path, text, ('agents', agent_id, 'destinations'))}no destination {name!r}"
                    f"{_nearest(name, settings.destinations)}",
                    hint=f"known destinations: {', '.join(settings.destinations) or 'none'}",
                )


def _check_overlap(path: Path, text: str, agents: Mapping[str, AgentSpec], state_dir: Path) -> None:
    """Nothing belongs to two agents, and what agentkeep writes belongs to none."""
    owners: dict[Path, str] = {}
    for agent_id, spec in agents.items():
        where = _where(path, text, ("agents", agent_id))
        for place in _places(spec):
            other_id = owners.setdefault(place, agent_id)
            if other_id != agent_id:
                raise _overlapping(where, agent_id, place, other_id, place)
    for place, agent_id in owners.items():
        where = _where(path, text, ("agents", agent_id))
        for above in place.parents:
            if owners.get(above, agent_id) != agent_id:
                raise _overlapping(where, agent_id, place, owners[above], above)
        if place == state_dir or place in state_dir.parents or state_dir in place.parents:
            raise ConfigError(
                f"{where}agent {agent_id!r} and state_dir overlap: {place} and {state_dir}",
                hint="give agentkeep a state_dir of its own, outside of every agent",
            )


def _overlapping(where: str, one_id: str, one: Path, other_id: str, other: Path) -> ConfigError:
    return ConfigError(
        f"{where}agents {other_id!r} and {one_id!r} overlap: {other} and {one}",
        hint="two agents cannot own the same files: mend `root`, or spell their sources out",
    )


def _places(spec: AgentSpec) -> Iterable[Path]:
    """What an agent claims: whole directories (for patterns that go deep) or single paths."""
    if spec.memdir is not None:
        yield spec.memdir.resolve()
    for pattern in spec.include:
        is_deep = "**" in pattern
        yield (spec.root / (fixed_head(pattern) if is_deep else pattern)).resolve()


# --- explaining -----------------------------------------------------------------------------------


def _explain(path: Path, text: str, exc: ValidationError) -> list[str]:
    return [_complaint(path, text, error) for error in exc.errors(include_url=False)]


def _complaint(path: Path, text: str, error: Any) -> str:
    location: _Location = error["loc"]
    key = ".".join(str(part) for part in location if part != "[key]")
    where = _where(path, text, location)
    if error["type"] == "extra_forbidden":
        return f"{where}unknown key {key!r}{_nearest(str(location[-1]), _known_keys(location[:-1]))}"
    if error["type"] == "missing":
        return f"{where}{key} is missing"
    message = error["msg"].removeprefix("Value error, ")
    value = error.get("input")
    is_plain = isinstance(value, str | int | float | bool) and not _SECRET_KEYS & set(map(str, location))
    shown = f", not {value!r}" if is_plain and repr(value) not in message else ""
    return f"{where}{key}: {message[:1].lower()}{message[1:]}{shown}"


def _known_keys(location: _Location) -> list[str]:
    """The keys that may stand at a place of the configuration."""
    model: Any = Settings
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel):
            field = model.model_fields.get(str(part))
            model = field.annotation if field else None
        elif getattr(model, "__origin__", None) is dict:
            model = model.__args__[1]
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _nearest(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _where(path: Path, text: str, location: _Location) -> str:
    """`FILE, line N: `, the line being the deepest part of the location that the file spells out."""
    keys = [str(part) for part in location if not isinstance(part, int) and part != "[key]"]
    variable = ENVIRONMENT_PREFIX + "__".join(keys).upper()
    if variable in os.environ:
        return f"environment {variable}: "
    line = _line_of(text, keys)
    return f"{path}, line {line}: " if line else f"{path}: "


_HEADER = re.compile(r"\s*\[\[?\s*(.+?)\s*\]\]?\s*(?:#.*)?$")
_ASSIGNMENT = re.compile(r"\s*([A-Za-z0-9_\"'.-]+)\s*=")


def _line_of(text: str, keys: list[str]) -> int | None:
    best: tuple[int, int] | None = None
    table: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            table = _dotted(header[1])
            spelled = table
        elif assignment := _ASSIGNMENT.match(line):
            spelled = table + _dotted(assignment[1])
        else:
            continue
        depth = len(spelled)
        if spelled == keys[:depth] and (best is None or depth > best[0]):
            best = (depth, number)
    return best[1] if best else None


def _dotted(text: str) -> list[str]:
    return [part.strip().strip("\"'") for part in text.split(".")]
