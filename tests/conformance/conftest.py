"""Servers for the storage tests: one of each per test process, started when first asked for."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import boto3
import pytest

from tests.conformance.places import S3Place
from tests.harness.seaweedfs import SeaweedFS, running_seaweedfs

BUCKET = "agentkeep-test"


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    with running_seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="session")
def moto_options() -> Iterator[dict[str, str]]:
    from moto.server import ThreadedMotoServer  # slow to import

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {
        "endpoint_url": f"http://{host}:{port}",
        "region": "us-east-1",
        "addressing_style": "path",
        "access_key_id": "moto",
        "secret_access_key": "moto-secret",
    }
    client = boto3.client(
        "s3",
        endpoint_url=options["endpoint_url"],
        region_name="us-east-1",
        aws_access_key_id="moto",
        aws_secret_access_key="moto-secret",
    )
    client.create_bucket(Bucket=BUCKET)
    client.close()
    yield options
    server.stop()


@pytest.fixture
def seaweedfs_place(seaweedfs: SeaweedFS) -> S3Place:
    return S3Place(f"s3://{seaweedfs.bucket}/{secrets.token_hex(6)}", _small_parts(seaweedfs.options()))


@pytest.fixture
def moto_place(moto_options: dict[str, str]) -> S3Place:
    return S3Place(f"s3://{BUCKET}/{secrets.token_hex(6)}", _small_parts(moto_options))


def _small_parts(options: dict[str, str]) -> dict[str, str]:
    return {**options, "part_size_bytes": str(5 << 20)}
