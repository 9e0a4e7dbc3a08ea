"""From an agent's settings to what capture is told: patterns relative to one root, nothing left open."""

from __future__ import annotations

import os
import tomllib
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from config.settings import AgentSettings
from daemon.errors import ConfigError
from daemon.model import AgentSpec, fixed_head, has_wildcard


class Profile(BaseModel):
    """How one kind of agent lays out what it knows. Patterns are relative to the agent's root."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    memdir: tuple[str, ...] = ()
    include: tuple[str, ...] = ("**",)
    exclude: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()


def profile_names() -> list[str]:
    shipped = files("config").joinpath("profiles").iterdir()
    return sorted(entry.name.removesuffix(".toml") for entry in shipped if entry.name.endswith(".toml"))


@cache
def load_profile(name: str) -> Profile:
    """Raises ConfigError, which lists the known ones."""
    known = profile_names()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        raise ConfigError(
            f"no profile {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            hint=f"known profiles: {', '.join(known)}",
        )
    text = files("config").joinpath("profiles", f"{name}.toml").read_text(encoding="utf-8")
    try:
        return Profile.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, ValidationError) as exc:
        raise ConfigError(f"the profile {name!r} is damaged: {exc}") from exc


def agent_spec(agent_id: str, settings: AgentSettings) -> AgentSpec:
    """Raises ConfigError: unknown profile; a path outside the root, beginning with the key it is about."""
    root = settings.root or _common_root(settings)
    profile_name = settings.profile_name
    profile = load_profile(profile_name) if profile_name else Profile(include=())
    sqlite = _relative(settings.sqlite, root, "sqlite")
    plain = _relative(settings.files, root, "files")
    memdir = root / settings.memdir if settings.memdir else None
    if memdir is not None and (not memdir.is_relative_to(root) or ".." in memdir.relative_to(root).parts):
        raise ConfigError(f"memdir: {memdir} lies outside the agent's root {root}")
    required = [pattern for pattern in (*sqlite, *plain) if not has_wildcard(pattern)]
    heads = [fixed_head(pattern) for pattern in plain if has_wildcard(pattern)]
    required += [head for head in dict.fromkeys(heads) if head != "."]
    if memdir is not None and memdir != root:
        required.append(str(memdir.relative_to(root)))
    return AgentSpec(
        tenant=settings.tenant,
        agent_id=agent_id,
        root=root,
        include=(*profile.include, *plain, *sqlite),
        memdir=memdir,
        memdir_candidates=profile.memdir,
        sqlite=sqlite,
        required=tuple(required),
        exclude=(*profile.exclude, *settings.exclude),
        secrets=profile.secrets,
        states=tuple(state.source(name, root) for name, state in settings.state.items()),
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
