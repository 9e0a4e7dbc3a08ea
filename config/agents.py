"""From an agent's settings to what capture is told: patterns relative to one root, nothing left open."""

from __future__ import annotations

import os
import tomllib
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from config.settings import AgentSettings, Name, StateSettings
from daemon.errors import ConfigError
from daemon.model import AgentSpec, StateSource, fixed_head, has_wildcard

_COMMON = "common"


class ProfileState(StateSettings):
    """A state value of a profile: never a command, those come from the local configuration."""

    command: None = None
    restore_command: None = None


class Profile(BaseModel):
    """How one kind of agent lays out what it knows. Patterns and paths are relative to the agent's root.

    marks: globs (braces too) that all find something in a directory that is such an agent's root
    roots: where such an agent usually lives; `~` and environment variables are expanded
    state: values that need not be there
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    summary: str = ""
    memdir: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    secret_tables: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()
    state: dict[Name, ProfileState] = Field(default_factory=dict)
    require_point_in_time: bool = False


def profile_names() -> list[str]:
    shipped = files("config").joinpath("profiles").iterdir()
    names = (entry.name.removesuffix(".toml") for entry in shipped if entry.name.endswith(".toml"))
    return sorted(name for name in names if name != _COMMON)


def load_profile(name: str) -> Profile:
    """Raises ConfigError, which lists the known ones."""
    known = profile_names()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        raise ConfigError(
            f"no profile {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            hint=f"known profiles: {', '.join(known)}",
        )
    return _shipped(name)


@cache
def _shipped(name: str) -> Profile:
    text = files("config").joinpath("profiles", f"{name}.toml").read_text(encoding="utf-8")
    try:
        return Profile.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, ValidationError) as exc:
        raise ConfigError(f"the profile {name!r} is damaged: {exc}") from exc


def agent_spec(agent_id: str, settings: AgentSettings) -> AgentSpec:
    """Raises ConfigError: unknown profile; a path outside the root, beginning with the key it is about."""
    root = settings.root or _common_root(settings)
    profile_name = settings.profile_name
    profile = load_profile(profile_name) if profile_name else Profile()
    common = _shipped(_COMMON)
    sqlite = _relative(settings.sqlite, root, "sqlite")
    plain = _relative(settings.files, root, "files")
    memdir = root / settings.memdir if settings.memdir else None
    if memdir is not None and (not memdir.is_relative_to(root) or ".." in memdir.relative_to(root).parts):
        raise ConfigError(f"memdir: {memdir} lies outside the agent's root {root}")
    named = [pattern for pattern in (*sqlite, *plain) if not has_wildcard(pattern)]
    if memdir is not None and memdir != root:
        named.append(str(memdir.relative_to(root)))
    heads = [fixed_head(pattern) for pattern in plain if has_wildcard(pattern)]
    required = [*named, *(head for head in dict.fromkeys(heads) if head != ".")]
    keeps_secrets = settings.include_secrets
    point_in_time = settings.require_point_in_time
    return AgentSpec(
        tenant=settings.tenant,
        agent_id=agent_id,
        root=root,
        include=(*profile.include, *plain, *sqlite),
        memdir=memdir,
        memdir_candidates=profile.memdir,
        sqlite=sqlite,
        required=tuple(required),
        named=tuple(named),
        exclude=(*common.exclude, *profile.exclude, *settings.exclude),
        secrets=() if keeps_secrets else (*common.secrets, *profile.secrets),
        secret_tables=() if keeps_secrets else profile.secret_tables,
        states=_states(profile, settings, root),
        walk_all=profile_name is not None,
        before=settings.before or (),
        after=settings.after or (),
        command_timeout_seconds=settings.command_timeout_seconds,
        require_point_in_time=profile.require_point_in_time if point_in_time is None else point_in_time,
        max_file_bytes=settings.max_file_bytes,
        max_agent_bytes=settings.max_agent_bytes,
    )


def _states(profile: Profile, settings: AgentSettings, root: Path) -> tuple[StateSource, ...]:
    """The profile's values, then the agent's own; one of the same name takes the other's place."""
    known = {name: state.source(name, root, optional=True) for name, state in profile.state.items()}
    return tuple(
        (known | {name: state.source(name, root) for name, state in settings.state.items()}).values()
    )


def _common_root(settings: AgentSettings) -> Path:
    """The deepest directory that holds all sources that are spelled out."""
    heads = []
    for key, pattern in settings.spelled_out:
        head = Path(pattern if key == "memdir" else fixed_head(pattern)).expanduser()
        if not head.is_absolute():
            raise ConfigError(
                f"{key}: {pattern!r} is relative, and there is no `root` that it could be relative to",
                hint="write absolute paths, or give the agent a `root`",
            )
        heads.append(head)
    return Path(os.path.commonpath(heads))


def _relative(patterns: tuple[str, ...], root: Path, key: str) -> tuple[str, ...]:
    found = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_absolute() and not path.is_relative_to(root):
            raise ConfigError(f"{key}: {pattern} lies outside the agent's root {root}")
        relative = str(path.relative_to(root)) if path.is_absolute() else str(path)
        if ".." in Path(relative).parts:
            raise ConfigError(f"{key}: {pattern} leads out of the agent's root with '..'")
        found.append(relative)
    return tuple(found)
