"""The shape of the configuration, and nothing else: what keys there are, of what type, with what default.

Precedence: environment (`AGENTKEEP_...`, `__` between levels), then systemd credentials of the same
names, then the file. Unknown keys are refused.
"""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    NestedSecretsSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from daemon.bundle.encryption import parse_recipients
from daemon.errors import ConfigError
from daemon.model import StateSource, is_valid_name
from daemon.schedule import Schedule, parse_schedule

ENVIRONMENT_PREFIX = "AGENTKEEP_"
_NAME_RULE = "use a-z, 0-9, _ and -, 1 to 64 characters, with a letter or digit at both ends"


def _check_name(name: str) -> str:
    if not is_valid_name(name):
        raise ValueError(f"not a valid name: {name!r}; {_NAME_RULE}{_guess(name)}")
    return name


def _guess(name: str) -> str:
    near = nearest_name(name)
    return f"; did you mean {near!r}?" if near else ""


def nearest_name(text: str) -> str | None:
    """The agent id or tenant that is most like `text`, if any is."""
    near = re.sub(r"[^a-z0-9_-]+", "-", text.lower())[:64].strip("_-")
    return near if is_valid_name(near) else None


def _expand(path: Path) -> Path:
    return path.expanduser()


def _check_schedule(text: str) -> str:
    parse_schedule(text)
    return text


def _check_recipients(recipients: tuple[str, ...]) -> tuple[str, ...]:
    try:
        parse_recipients(recipients)
    except ConfigError as exc:
        raise ValueError(str(exc)) from exc
    return recipients


def _check_absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError(f"it has to be an absolute path, not {str(path)!r}")
    return path


def _check_command(command: tuple[str, ...]) -> tuple[str, ...]:
    if not command or not command[0]:
        raise ValueError("a command is a list: its program, then its arguments")
    program = Path(command[0]).expanduser()
    if len(program.parts) > 1 and not program.is_absolute():
        raise ValueError(f"it has to be a program's name or its absolute path, not {command[0]!r}")
    return (str(program), *command[1:])


_UNITS = {"B": 1} | {
    unit: base**power
    for power, letter in enumerate("kMGT", start=1)
    for unit, base in ((f"{letter}B", 1000), (f"{letter.upper()}iB", 1024))
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*\Z")


def _bytes_of(value: object) -> object:
    """`"2 GiB"` and the like in bytes; what is no text is left for the type to judge."""
    if not isinstance(value, str):
        return value
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    match = _SIZE.match(value)
    unit = match[2].lower() or "b" if match else ""
    if match is None or unit not in units:
        near = get_close_matches(unit, units, n=1, cutoff=0.5)
        spelled = next((known for known in _UNITS if [known.lower()] == near), None)
        guess = f"; did you mean {f'{match[1]} {spelled}'!r}?" if match and spelled else ""
        raise ValueError(f"not a size: {value!r}; write bytes, or a number with {', '.join(_UNITS)}{guess}")
    return int(float(match[1]) * units[unit])


Name = Annotated[str, AfterValidator(_check_name)]
UserPath = Annotated[Path, AfterValidator(_expand)]
AbsolutePath = Annotated[UserPath, AfterValidator(_check_absolute)]
Command = Annotated[tuple[str, ...], AfterValidator(_check_command)]
Size = Annotated[int, BeforeValidator(_bytes_of), Field(strict=True, gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class StateSettings(_Section):
    """One state value: `{ file = ... }`, `{ sqlite = ..., query = ... }`, or `{ command = [...] }`."""

    file: UserPath | None = None
    sqlite: UserPath | None = None
    query: str | None = None
    command: Command | None = None
    restore_command: Command | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> StateSettings:
        if [self.file, self.sqlite, self.command].count(None) != 2:
            raise ValueError("a state value has either `file`, or `sqlite` with `query`, or `command`")
        if (self.sqlite is None) != (self.query is None):
            raise ValueError("`sqlite` and `query` go together")
        if self.restore_command is not None and self.command is None:
            raise ValueError("`restore_command` goes with `command`: other values are put back as they were")
        return self

    def source(self, name: str, root: Path, *, optional: bool = False) -> StateSource:
        return StateSource(
            name=name,
            file=None if self.file is None else root / self.file,
            sqlite=None if self.sqlite is None else root / self.sqlite,
            query=self.query,
            command=self.command or (),
            restore_command=self.restore_command or (),
            optional=optional,
        )


class AgentSettings(_Section):
    """One agent: a root with a profile, or sources spelled out. Relative paths are relative to the root."""

    tenant: Name = "default"
    profile: str | None = None
    root: AbsolutePath | None = None
    memdir: UserPath | None = None
    sqlite: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    include_secrets: bool = False
    max_file_bytes: Size | None = None
    max_agent_bytes: Size | None = None
    require_point_in_time: bool | None = None
    before: Command | None = None
    after: Command | None = None
    command_timeout_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    state: dict[Name, StateSettings] = Field(default_factory=dict)
    schedule: Annotated[str, AfterValidator(_check_schedule)] = "every 1h"
    jitter_seconds: Annotated[int, Field(ge=0)] | None = None
    destinations: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _has_sources(self) -> AgentSettings:
        if self.root is None and not (self.memdir or self.sqlite or self.files):
            raise ValueError("an agent needs a `root`, or sources: `memdir`, `sqlite`, `files`")
        if self.profile is not None and self.root is None:
            raise ValueError("a `profile` needs a `root`, which its patterns are relative to")
        return self

    @property
    def profile_name(self) -> str | None:
        """Sources spelled out need no profile; a bare root gets the generic one."""
        return self.profile or (None if self.sqlite or self.files or self.root is None else "generic")

    @property
    def spelled_out(self) -> list[tuple[str, str]]:
        """Every source that is spelled out: its key and its path or pattern."""
        memdir = [] if self.memdir is None else [("memdir", str(self.memdir))]
        return [
            *memdir,
            *(("sqlite", pattern) for pattern in self.sqlite),
            *(("files", pattern) for pattern in self.files),
        ]

    def parsed_schedule(self) -> Schedule:
        return parse_schedule(self.schedule, jitter_seconds=self.jitter_seconds)


class DestinationSettings(_Section):
    """Where bundles go. `options` is for backends of other packages; the rest is for `s3`."""

    url: str
    endpoint_url: str | None = None
    region: str | None = None
    addressing_style: str | None = None
    ca_file: UserPath | None = None
    access_key_id: str | None = None
    secret_access_key: SecretStr | None = None
    session_token: SecretStr | None = None
    profile: str | None = None
    options: dict[str, str] = Field(default_factory=dict, repr=False)

    def backend_options(self) -> dict[str, str]:
        """What was given, as a backend takes it: plain text, so not to be shown."""
        given: dict[str, Any] = {
            name: getattr(self, name) for name in type(self).model_fields if name not in ("url", "options")
        }
        plain = {
            name: value.get_secret_value() if isinstance(value, SecretStr) else str(value)
            for name, value in given.items()
            if value is not None
        }
        return {**plain, **self.options}


class EncryptionSettings(_Section):
    recipients: Annotated[tuple[str, ...], AfterValidator(_check_recipients)] = ()


class BundleSettings(_Section):
    compression_level: Annotated[int, Field(ge=1, le=19)] = 3


def _default_state_dir() -> Path:
    """systemd's StateDirectory=, else the place for root, else the place for a user."""
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/agentkeep")
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "agentkeep"


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    state_dir: AbsolutePath = Field(default_factory=_default_state_dir)
    lock_timeout_seconds: Annotated[float, Field(ge=0)] = 30.0
    upload_interval_seconds: Annotated[float, Field(gt=0)] = 30.0
    concurrency: Annotated[int, Field(ge=1, le=64)] = 2
    agents: dict[Name, AgentSettings] = Field(default_factory=dict)
    destinations: dict[Name, DestinationSettings] = Field(default_factory=dict)
    encryption: EncryptionSettings = Field(default_factory=EncryptionSettings)
    bundle: BundleSettings = Field(default_factory=BundleSettings)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003  the signature is pydantic-settings'
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        sources: list[PydanticBaseSettingsSource] = [env_settings]
        if credentials := os.environ.get("CREDENTIALS_DIRECTORY"):
            sources.append(
                NestedSecretsSettingsSource(
                    file_secret_settings,
                    secrets_dir=credentials,
                    secrets_prefix=ENVIRONMENT_PREFIX,
                    secrets_nested_delimiter="__",
                    secrets_dir_missing="ok",
                )
            )
        return (*sources, init_settings)
