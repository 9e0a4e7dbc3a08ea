"""A bundle into scratch, trusted only when everything has been proven: sibling, container, seal, digests,
whose it is, and then what is inside: every database, every state value.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from daemon.bundle.reader import read_bundle
from daemon.bundle.sibling import HashingReader
from daemon.capture.sqlite import needs_the_application
from daemon.durable import translating_os_errors
from daemon.errors import IntegrityError, LocalWriteError, MalformedBundle, RefusedError, SiblingMismatch
from daemon.locate import Bundle
from daemon.model import ArtifactKind, Header, Manifest, from_member_name
from daemon.verify import check_place

_ROOMS = ("git", "memory_files", "sqlite", "files", "state", "opaque")
_SPARE_BYTES = 64 << 20
Progress = Callable[[int], None]


def unpack(
    bundle: Bundle,
    scratch: Path,
    *,
    identities: Sequence[Any],
    check_header: Callable[[Header], None] | None = None,
    progress: Progress | None = None,
) -> tuple[Manifest, tuple[str, ...]]:
    """Stream a bundle into `scratch`, an empty private directory, each artifact under its real name.

    What is proven is that these are the bytes that were captured. What they were like then is a second
    question: databases that fail SQLite's integrity check are given back by name, with what it said.
    progress is told how many bytes at rest have been read. Raises IntegrityError's classes,
    RefusedError (no identity), LocalWriteError (no room, before anything is unpacked).
    """
    encrypted = bundle.is_encrypted
    if encrypted and not identities:
        raise RefusedError(
            f"{bundle.name} is encrypted", hint="give --identity FILE, or --identity - to read it from stdin"
        )
    expected = bundle.expected_sha256()

    def on_header(header: Header) -> None:
        if check_header is not None:
            check_header(header)
        _check_room(header, scratch)

    with (
        translating_os_errors("unpack below", scratch),
        ExitStack() as open_files,
        HashingReader(bundle.open(), progress=progress) as stream,
    ):
        receiver = _Receiver(scratch, open_files)
        contents = read_bundle(
            stream, encrypted=encrypted, identities=identities, on_header=on_header, receive=receiver
        )
        actual = stream.finish()
    if actual != expected:
        raise SiblingMismatch(
            f"{bundle.name} is not what its sibling says: SHA-256 {actual}, not {expected}",
            hint="nothing was restored; take another copy or snapshot",
        )
    check_place(bundle.key, contents.manifest)
    return contents.manifest, tuple(_check_contents(contents.manifest, scratch))


class _Receiver:
    """Gives each artifact a new private file; the one before is closed then."""

    def __init__(self, scratch: Path, open_files: ExitStack) -> None:
        self._scratch = scratch
        self._open_files = open_files

    def __call__(self, name: str, _size_bytes: int) -> BinaryIO:
        self._open_files.close()
        path = self._scratch / member_path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            stream = os.fdopen(os.open(path, flags, 0o600), "wb")
        except (FileExistsError, NotADirectoryError) as exc:
            raise MalformedBundle(f"two members want one place: {name[:200]!r}") from exc
        return self._open_files.enter_context(stream)


def member_path(name: str) -> Path:
    """Where a member goes below scratch. Raises MalformedBundle for a room that the format does not have."""
    room, _, inner = name.partition("/")
    path = from_member_name(inner)  # the reader has checked that the name is safe
    is_repository_part = room == "memory_files" and path.split("/")[0] == ".git"
    if room not in _ROOMS or not path or is_repository_part:
        raise MalformedBundle(f"a member lies where none may: {name[:200]!r}")
    return Path(room, path)


def _check_room(header: Header, scratch: Path) -> None:
    free = os.statvfs(scratch)
    free_bytes = free.f_bavail * free.f_frsize
    # Twice, since a repository is put together beside its bundle.
    needed_bytes = header.ceilings.total_bytes + _SPARE_BYTES
    if free_bytes < needed_bytes:
        raise LocalWriteError(
            f"not enough room beside {scratch.parent}: {needed_bytes >> 20} MiB needed,"
            f" {free_bytes >> 20} MiB free",
            hint="restore to a larger file system",
        )


def _check_contents(manifest: Manifest, scratch: Path) -> Iterator[str]:
    """Databases and state values are what they are called. Opaque ones are not looked into."""
    for artifact in manifest.artifacts:
        path = scratch / member_path(artifact.path_in_bundle)
        if artifact.kind == ArtifactKind.SQLITE:
            if (problem := _check_database(path)) is not None:
                yield f"{artifact.path_in_bundle}: {problem}"
        elif artifact.kind == ArtifactKind.STATE:
            _check_json(path, artifact.path_in_bundle)


def _check_database(path: Path) -> str | None:
    """What SQLite has against a database, if anything."""
    uri = f"file:{quote(os.fsencode(path))}?mode=ro&immutable=1"  # ours alone: no WAL, no sidecars wanted
    try:
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            connection.execute("PRAGMA trusted_schema=OFF")
            connection.execute("PRAGMA cell_size_check=ON")
            problems = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(3)")]
    except sqlite3.Error as exc:
        if needs_the_application(exc):
            return None
        problems = [str(exc)]
    return None if problems == ["ok"] else " ".join("; ".join(problems).split())[:300]


def _check_json(path: Path, name: str) -> None:
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError) as exc:
        raise IntegrityError(f"{name} is not valid JSON") from exc
