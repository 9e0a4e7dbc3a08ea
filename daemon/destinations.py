"""Destinations: named storage backends, and the one place where their errors become ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from daemon.errors import (
    AgentkeepError,
    ConfigError,
    IntegrityError,
    RefusedError,
    SnapshotNotFound,
    StorageUnavailable,
)
from storage_backends import (
    ContainerNotFound,
    Corrupted,
    Forbidden,
    InvalidDestination,
    InvalidKey,
    ObjectNotFound,
    StorageBackend,
    StorageError,
    StorageFull,
    open_backend,
)
from storage_backends.layers import Retrying


@dataclass(slots=True)
class Destination:
    """A named place for bundles. `options` may hold secrets and is never shown."""

    name: str
    url: str
    options: Mapping[str, str] = field(repr=False, default_factory=dict)

    @contextmanager
    def opened(self) -> Iterator[StorageBackend]:
        """A backend for the time of a job; storage errors leave it as ours."""
        with translating_storage_errors(self.name):
            backend = Retrying(open_backend(self.url, self.options))
            try:
                yield backend
            finally:
                backend.close()


@contextmanager
def translating_storage_errors(destination: str) -> Iterator[None]:
    """Most specific first; what happened is the backend's message, what to do is ours."""
    try:
        yield
    except StorageError as exc:
        raise _translated(exc, destination) from exc


def _translated(exc: StorageError, destination: str) -> AgentkeepError:
    message = f"{destination}: {exc}"
    match exc:
        case ObjectNotFound():
            return SnapshotNotFound(message, hint="`agentkeep list` shows what has been uploaded where")
        case Forbidden():
            return RefusedError(
                message, hint="check the credentials and what they may do; trying again will not help"
            )
        case ContainerNotFound():
            return StorageUnavailable(
                message, hint="make the bucket (or mount the directory), or mend the URL"
            )
        case StorageFull():
            return StorageUnavailable(message, hint="free space at the destination or raise its quota")
        case Corrupted():
            return IntegrityError(message, hint="try again; if it stays, test this host's memory and network")
        case InvalidDestination():
            return ConfigError(message)
        case InvalidKey():
            return SnapshotNotFound(message, hint="a bundle's key is as `agentkeep list` shows it")
        case _:
            return StorageUnavailable(
                message, hint="bundles stay in the outbox and are sent when it answers again"
            )
