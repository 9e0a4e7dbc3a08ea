"""From whatever a user typed to one bundle somewhere: a local file or an object at a destination.

A name is: an id, a unique prefix of one, `latest`, `latest@TIME`, a local path, a bare bucket key, or a
URL. What is found is only named here; opening it proves nothing, verify.py and restore do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from daemon.bundle.sibling import MAX_SIBLING_BYTES, parse_sibling
from daemon.destinations import Destination, translating_storage_errors
from daemon.errors import (
    AgentkeepError,
    RefusedError,
    SiblingMissing,
    SnapshotNotFound,
    StorageUnavailable,
    UsageError,
)
from daemon.model import (
    SIBLING_SUFFIX,
    BundleKey,
    agent_prefix,
    is_snapshot_id,
    snapshot_time,
)
from daemon.snapshots import Store
from storage_backends import ObjectNotFound, StorageBackend

LATEST = "latest"
AGE_MAGIC = b"age-encryption.org/v1"


class Bundle(ABC):
    """One bundle where it lies. `key` is None for a local file whose place says nothing."""

    key: BundleKey | None
    name: str

    @abstractmethod
    def open(self) -> BinaryIO:
        """The bytes at rest; the caller closes it. Raises SnapshotNotFound."""

    @abstractmethod
    def size_bytes(self) -> int:
        """Raises SnapshotNotFound."""

    @abstractmethod
    def sibling_data(self) -> bytes | None:
        """The sibling's bytes, or None if there is none."""

    @property
    @abstractmethod
    def file_name(self) -> str: ...

    @property
    @abstractmethod
    def is_encrypted(self) -> bool: ...

    def expected_sha256(self) -> str:
        """The digest that the sibling names. Raises SiblingMissing, SiblingMismatch, SnapshotNotFound."""
        data = self.sibling_data()
        if data is None:
            self.size_bytes()  # a bundle that is not there at all is another error
            raise SiblingMissing(
                f"{self.name} has no {SIBLING_SUFFIX} sibling, so its bytes cannot be checked",
                hint="fetch the sibling too, or take another copy of the bundle",
            )
        return parse_sibling(data)


@dataclass(slots=True)
class LocalBundle(Bundle):
    path: Path
    key: BundleKey | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        return str(self.path)

    @property
    def file_name(self) -> str:
        return self.path.name

    @property
    def is_encrypted(self) -> bool:
        """By the first bytes, so that a file may have any name."""
        with self.open() as stream:
            return stream.read(len(AGE_MAGIC)) == AGE_MAGIC

    def open(self) -> BinaryIO:
        try:
            return self.path.open("rb")
        except OSError as exc:
            raise SnapshotNotFound(f"cannot read {self.path}: {exc.strerror}") from exc

    def size_bytes(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError as exc:
            raise SnapshotNotFound(f"cannot read {self.path}: {exc.strerror}") from exc

    def sibling_data(self) -> bytes | None:
        path = self.path.with_name(self.path.name + SIBLING_SUFFIX)
        try:
            with path.open("rb") as stream:
                return stream.read(MAX_SIBLING_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise SiblingMissing(f"cannot read {path}: {exc.strerror}") from exc


@dataclass(slots=True)
class RemoteBundle(Bundle):
    backend: StorageBackend
    destination: str
    key: BundleKey

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.destination}: {self.key}"

    @property
    def file_name(self) -> str:
        return self.key.file_name

    @property
    def is_encrypted(self) -> bool:
        return self.key.encrypted

    def open(self) -> BinaryIO:
        return self.backend.open(str(self.key))

    def size_bytes(self) -> int:
        return self.backend.stat(str(self.key)).size_bytes

    def sibling_data(self) -> bytes | None:
        try:
            with self.backend.open(self.key.sibling, length=MAX_SIBLING_BYTES + 1) as stream:
                return stream.read()
        except ObjectNotFound:
            return None


@dataclass(frozen=True, slots=True)
class Places:
    """Where to look. On a host without configuration there is no store and nothing configured.

    agents: (tenant, agent id) of every configured agent
    """

    store: Store | None
    destinations: Mapping[str, Destination]
    agents: Sequence[tuple[str, str]] = ()


IsComplete = Callable[[Bundle], bool]


@contextmanager
def located(
    name: str,
    places: Places,
    *,
    agent_id: str | None = None,
    url_options: Mapping[str, str] | None = None,
    is_complete: IsComplete | None = None,
) -> Iterator[Bundle]:
    """The one bundle that `name` means, for the time of a block.

    agent_id: for `latest`, when there are several; url_options: the backend's options for a URL.
    is_complete: for `latest` on a host whose catalog does not know the agent; reads a bundle through.
    Raises SnapshotNotFound, UsageError, and what a destination raises.
    """
    if "://" in name:
        with _at_url(name, url_options or {}) as bundle:
            yield bundle
    elif name == LATEST or name.startswith(LATEST + "@"):
        with _latest(name, places, agent_id, is_complete) as bundle:
            yield bundle
    elif (key := BundleKey.parse(name)) is not None:
        with _by_key(key, places) as bundle:
            yield bundle
    elif "/" in name or "." in name:
        yield _at_path(Path(name))
    else:
        with _by_id(name, places) as bundle:
            yield bundle


@contextmanager
def _at_url(url: str, options: Mapping[str, str]) -> Iterator[Bundle]:
    base, *segments = url.rsplit("/", 5)  # from the end: a destination's prefix may hold a "tenants" too
    key = BundleKey.parse("/".join(segments))
    if key is None or "://" not in base:
        raise UsageError(
            "the URL does not end in a bundle's key",
            hint="a bundle's URL: s3://BUCKET/PREFIX/tenants/TENANT/snapshots/AGENT/ID.tar.zst",
        )
    destination = Destination(base, base, options)
    with destination.opened() as backend:
        yield RemoteBundle(backend, base, key)


def _at_path(path: Path) -> LocalBundle:
    if not path.is_file():
        raise SnapshotNotFound(f"no such file: {path}", hint="a bucket key begins with tenants/")
    if path.name.endswith(SIBLING_SUFFIX):
        raise UsageError(f"{path.name} is a sibling", hint="name the bundle itself, without .sha256")
    return LocalBundle(path)


@contextmanager
def _by_id(prefix: str, places: Places) -> Iterator[Bundle]:
    if places.store is None:
        raise UsageError(
            f"{prefix!r} names nothing on a host without a configuration",
            hint="name a bundle by path or URL, or give --config",
        )
    try:
        key = places.store.catalog.find(prefix).key
    except SnapshotNotFound:
        if not is_snapshot_id(prefix):
            raise
        key = None
    if key is not None:
        with _by_key(key, places) as bundle:
            yield bundle
        return
    # Not made on this host, perhaps: each agent's place at each destination is worth a look.
    keys = [
        BundleKey(tenant, agent, prefix, encrypted)
        for tenant, agent in places.agents
        for encrypted in (False, True)
    ]
    with _first_remote(keys, places) as found:
        if found is None:
            raise SnapshotNotFound(
                f"no snapshot {prefix} on this host or at its destinations",
                hint="`agentkeep list` shows what there is; name one of another agent by its URL",
            )
        yield found


@contextmanager
def _by_key(key: BundleKey, places: Places) -> Iterator[Bundle]:
    """The local copy if it is there, else the first destination that has it."""
    local = places.store.path_of(key) if places.store is not None else None
    if local is not None and local.is_file():
        yield LocalBundle(local, key)
        return
    with _first_remote([key], places) as bundle:
        if bundle is None:
            looked = ", ".join(["this host", *places.destinations]) if places.store else "nowhere"
            raise SnapshotNotFound(
                f"no bundle under the key {key} (looked at: {looked})",
                hint="give the whole URL, or --config with the destination that has it",
            )
        yield bundle


@contextmanager
def _first_remote(keys: Sequence[BundleKey], places: Places) -> Iterator[Bundle | None]:
    """The first destination that has one of the keys. One that cannot be asked does not keep the bundle
    from being found at the next; only where none has it, that is the answer."""
    unasked: AgentkeepError | None = None
    for destination in places.destinations.values():
        with ExitStack() as stack:
            try:
                backend = stack.enter_context(destination.opened())
                with translating_storage_errors(destination.name):
                    found = next((key for key in keys if _exists(backend, key)), None)
            except (StorageUnavailable, RefusedError) as exc:
                unasked = unasked or exc
                continue
            if found is not None:
                yield RemoteBundle(backend, destination.name, found)
                return
    if unasked is not None:
        raise unasked
    yield None


def _exists(backend: StorageBackend, key: BundleKey) -> bool:
    try:
        backend.stat(str(key))
    except ObjectNotFound:
        return False
    return True


@contextmanager
def _latest(
    name: str, places: Places, agent_id: str | None, is_complete: IsComplete | None
) -> Iterator[Bundle]:
    not_after = _parse_time(name.partition("@")[2]) if "@" in name else None
    tenant, agent = _the_agent(places, agent_id)
    assert places.store is not None
    not_after_ms = int(not_after.timestamp() * 1000) if not_after else None
    record = places.store.catalog.latest(tenant, agent, not_after_ms=not_after_ms)
    if record is not None:
        with _by_key(record.key, places) as bundle:
            yield bundle
        return
    if places.store.catalog.last_attempt_ms(tenant, agent) is None:
        with _latest_remote(places, tenant, agent, not_after, is_complete) as found:
            if found is not None:
                yield found
                return
    raise SnapshotNotFound(
        f"agent {agent!r} has no complete snapshot"
        + (f" at or before {not_after:%FT%TZ}" if not_after else ""),
        hint="`agentkeep list` shows what there is; an incomplete one is named by its id",
    )


@contextmanager
def _latest_remote(
    places: Places, tenant: str, agent: str, not_after: datetime | None, is_complete: IsComplete | None
) -> Iterator[Bundle | None]:
    """The newest complete bundle at all destinations; whether it is complete only the bundle itself says.

    All of them have to answer: one that does not may have a newer one.
    """
    candidates: list[tuple[BundleKey, Destination]] = []
    for destination in places.destinations.values():
        with destination.opened() as backend:
            for info in backend.list(agent_prefix(tenant, agent)):
                key = BundleKey.parse(info.key)
                if key and (not_after is None or snapshot_time(key.snapshot_id) <= not_after):
                    candidates.append((key, destination))
    for key, destination in sorted(candidates, key=lambda item: item[0].snapshot_id, reverse=True):
        with destination.opened() as backend:
            bundle = RemoteBundle(backend, destination.name, key)
            if is_complete is None or is_complete(bundle):
                yield bundle
                return
    yield None


def _the_agent(places: Places, agent_id: str | None) -> tuple[str, str]:
    if places.store is None or not places.agents:
        raise UsageError(
            "`latest` needs a configuration that names agents",
            hint="name the bundle by path, key or URL, or give --config",
        )
    if agent_id is None:
        if len(places.agents) > 1:
            raise UsageError("`latest` of which agent?", hint="give --agent")
        return places.agents[0]
    return next(agent for agent in places.agents if agent[1] == agent_id)


def _parse_time(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as exc:
        raise UsageError(
            f"not a time: {text!r}", hint="write it like latest@2026-11-01T10:00Z or latest@2026-11-01"
        ) from exc
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
