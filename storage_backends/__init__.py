"""Where bundles live: one contract (`base`), the backends that keep it, and the way from a URL to one.

Owns the choice of a backend by URL scheme and the refusal of what it does not understand. Must not
import daemon or config, nor a backend before its scheme is asked for (boto3 is slow to import).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from storage_backends.base import (
    BytesSource,
    Capabilities,
    ContainerNotFound,
    Corrupted,
    FileSource,
    Forbidden,
    InvalidDestination,
    InvalidKey,
    ObjectExists,
    ObjectInfo,
    ObjectNotFound,
    Source,
    StorageBackend,
    StorageError,
    StorageFull,
    Unavailable,
    validate_key,
)

ENTRY_POINT_GROUP = "agentkeep.storage_backends"

# The shipped ones do not depend on installed metadata, and no other package can take their place.
_SHIPPED = {
    "s3": ("storage_backends.s3", "S3Backend"),
    "file": ("storage_backends.filesystem", "FilesystemBackend"),
    "memory": ("storage_backends.memory", "MemoryBackend"),
}


def known_schemes() -> tuple[str, ...]:
    """URL schemes that `open_backend` understands here, sorted."""
    return tuple(sorted({*_SHIPPED, *_third_party()}))


def option_names(scheme: str) -> frozenset[str]:
    """Options that a scheme's backend takes besides the URL. Raises InvalidDestination."""
    return _backend_class(scheme).option_names


def open_backend(url: str, options: Mapping[str, str]) -> StorageBackend:
    """The backend for `url`; contacts nothing. Raises InvalidDestination, which never quotes the URL
    or an option's value whole: either may hold a secret."""
    scheme, separator, _rest = url.partition("://")
    if not separator:
        raise InvalidDestination("a destination's URL begins with a scheme, such as s3:// or file:///")
    backend_class = _backend_class(scheme)
    for name in options:
        if name not in backend_class.option_names:
            raise InvalidDestination(
                f"{scheme} destinations have no option {name!r}{_nearest(name, backend_class.option_names)}"
            )
    return backend_class.from_url(url, options)


def _backend_class(scheme: str) -> type[StorageBackend]:
    if scheme in _SHIPPED:
        module, name = _SHIPPED[scheme]
        loaded = getattr(import_module(module), name)
    else:
        loaded = _load_third_party(scheme)
    if not (isinstance(loaded, type) and issubclass(loaded, StorageBackend)):
        raise InvalidDestination(f"what is registered for {scheme}:// is not a StorageBackend")
    return loaded


def _load_third_party(scheme: str) -> object:
    entry_point = _third_party().get(scheme)
    if entry_point is None:
        known = known_schemes()
        raise InvalidDestination(
            f"no storage backend for {scheme[:40]!r}{_nearest(scheme, known)}; known: {', '.join(known)}"
        )
    try:
        return entry_point.load()
    except (ImportError, AttributeError) as exc:
        raise InvalidDestination(f"the storage backend for {scheme}:// cannot be loaded: {exc}") from exc


def _third_party() -> dict[str, EntryPoint]:
    found = entry_points(group=ENTRY_POINT_GROUP)
    return {entry_point.name: entry_point for entry_point in found if entry_point.name not in _SHIPPED}


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


__all__ = [
    "BytesSource",
    "Capabilities",
    "ContainerNotFound",
    "Corrupted",
    "FileSource",
    "Forbidden",
    "InvalidDestination",
    "InvalidKey",
    "ObjectExists",
    "ObjectInfo",
    "ObjectNotFound",
    "Source",
    "StorageBackend",
    "StorageError",
    "StorageFull",
    "Unavailable",
    "known_schemes",
    "open_backend",
    "option_names",
    "validate_key",
]
