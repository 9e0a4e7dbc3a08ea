"""From the configuration to what the commands work with. The only place where settings meet the rest."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import Configuration, find_config_file, load
from daemon.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from daemon.destinations import Destination
    from daemon.locate import Places
    from daemon.snapshots import Sealing, Store

MAX_IDENTITY_BYTES = 1 << 20


@dataclass
class Host:
    """This host as the command line sees it. A configuration is read when a command first needs it."""

    config_file: Path | None = None
    as_json: bool = False

    @cached_property
    def configuration(self) -> Configuration:
        """Raises ConfigError."""
        return load(find_config_file(self.config_file))

    @cached_property
    def configuration_if_any(self) -> Configuration | None:
        """None on a host that has none; one that is named or broken is still an error."""
        try:
            path = find_config_file(self.config_file)
        except ConfigError:
            if self.config_file is not None:
                raise
            return None
        self.config_file = path
        return self.configuration

    @cached_property
    def store(self) -> Store:
        from daemon.snapshots import Store

        settings = self.configuration.settings
        return Store(settings.state_dir, lock_timeout_seconds=settings.lock_timeout_seconds)

    @cached_property
    def destinations(self) -> dict[str, Destination]:
        from daemon.destinations import Destination

        return {
            name: Destination(name, settings.url, settings.backend_options())
            for name, settings in self.configuration.settings.destinations.items()
        }

    @cached_property
    def sealing(self) -> Sealing:
        from daemon.snapshots import Sealing

        settings = self.configuration.settings
        return Sealing(
            recipients=settings.encryption.recipients,
            compression_level=settings.bundle.compression_level,
        )

    def places(self) -> Places:
        """Where bundles may be: nowhere but where their names say, on a host without configuration."""
        from daemon.locate import Places

        if self.configuration_if_any is None:
            return Places(None, {}, ())
        agents = [(spec.tenant, agent_id) for agent_id, spec in self.configuration.agents.items()]
        return Places(self.store, self.destinations, agents)

    def places_for(self, name: str) -> Places:
        """A URL says all there is to say: what it names is had without a state directory too."""
        from daemon.locate import Places

        return Places(None, {}, ()) if "://" in name else self.places()

    def url_options(self, name: str, given: Mapping[str, str | None]) -> dict[str, str]:
        """Options for a bundle's URL: those of the configured destination that it lies at, then the flags."""
        options: dict[str, str] = {}
        if "://" in name and self.configuration_if_any is not None:
            base = name.rsplit("/", 5)[0].rstrip("/")
            for destination in self.destinations.values():
                if destination.url.rstrip("/") == base:
                    options = dict(destination.options)
        return options | {key: value for key, value in given.items() if value is not None}


def read_identities(path: str | None) -> Sequence[Any]:
    """Identities from a file, or from stdin for `-`; none for None. Raises UsageError."""
    from daemon.bundle.encryption import parse_identities

    if path is None:
        return ()
    try:
        if path == "-":
            data = sys.stdin.buffer.read(MAX_IDENTITY_BYTES + 1)
        else:
            with Path(path).open("rb") as stream:
                data = stream.read(MAX_IDENTITY_BYTES + 1)
    except OSError as exc:
        raise UsageError(f"cannot read the identity {path}: {exc.strerror}") from exc
    return parse_identities(data)
