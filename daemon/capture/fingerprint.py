"""Whether anything of an agent changed since it was captured, told without opening a database or reading
a file: one digest over refs and over what stat says of everything else.

Equal digests mean that a new snapshot would hold the same. Different ones prove nothing: a checkpoint moves
an mtime and no content.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from daemon.capture.files import signatures
from daemon.capture.scan import Scan, Signature
from daemon.model import AgentSpec, GitFacts

_SIDECARS = ("-wal", "-journal")


def fingerprint(
    spec: AgentSpec,
    scan: Scan,
    *,
    files: Mapping[str, Signature],
    databases: Mapping[str, Signature],
    git: GitFacts | None,
    values: Mapping[str, object],
) -> str:
    """The digest. files: of the scan, and those of state values; databases: with their sidecars, as
    `database_signatures` gives them; values: what the commands of state values printed."""
    digest = hashlib.sha256(repr((spec, git)).encode("utf-8", "backslashreplace"))
    modes = {path: mark.mode for path, mark in scan.marks.items()}
    for facts in (files, databases, modes, scan.directories, scan.symlinks, values):
        for item in sorted(facts.items()):
            digest.update(repr(item).encode("utf-8", "backslashreplace"))
        digest.update(b"\0")
    return digest.hexdigest()


def database_signatures(root: Path, paths: Iterable[str]) -> dict[str, Signature]:
    """What stat says of databases and of what lies beside them. An empty WAL is none: connections that only
    read leave it. As root SQLite gives a WAL to the database's owner at each opening, which moves its ctime.
    """
    paths = list(paths)
    sidecars = signatures(root, [path + suffix for path in paths for suffix in _SIDECARS])
    found = {path: signature for path, signature in sidecars.items() if signature.size_bytes > 0}
    if os.geteuid() == 0:
        found = {path: replace(item, ctime_ns=item.mtime_ns) for path, item in found.items()}
    return signatures(root, paths) | found
