"""The `s3` backend against servers that lie, break off, refuse or vanish, and against its own death."""

from __future__ import annotations

import io
import json
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from storage_backends import (
    BytesSource,
    ContainerNotFound,
    Corrupted,
    Forbidden,
    ObjectExists,
    ObjectNotFound,
    StorageBackend,
    StorageError,
    StorageFull,
    Unavailable,
    open_backend,
)
from storage_backends.conformance import FailingSource, keys, noise, read
from storage_backends.layers import Retrying
from tests.conformance.crooked_s3 import BUCKET, CrookedS3, running_crooked_s3
from tests.conformance.places import S3Place
from tests.harness.seaweedfs import SeaweedFS

BIG = noise(12 << 20)
GOOD = {"honours_if_none_match": True, "verifies_sha256": True, "verifies_md5": True}


@pytest.fixture
def crooked() -> Iterator[CrookedS3]:
    with running_crooked_s3() as server:
        yield server


@pytest.fixture
def backend(crooked: CrookedS3) -> Iterator[StorageBackend]:
    with closing(open_backend(f"s3://{BUCKET}/p", crooked.options)) as backend:
        yield backend


def behave(crooked: CrookedS3, **behaviour: object) -> None:
    for name, value in behaviour.items():
        setattr(crooked.behaviour, name, value)


# What a server can do


@pytest.mark.parametrize("honours", [False, True])
@pytest.mark.parametrize("verifies", [False, True])
def test_only_what_a_server_was_seen_refusing_is_believed(
    crooked: CrookedS3, backend: StorageBackend, honours: bool, verifies: bool
) -> None:
    behave(crooked, honours_if_none_match=honours, verifies_sha256=verifies)
    capabilities = backend.probe()
    assert capabilities.conditional_put is honours
    assert capabilities.checksums is verifies
    assert not crooked.objects
    assert not crooked.uploads


def test_an_overwriting_server_is_asked_first(crooked: CrookedS3, backend: StorageBackend) -> None:
    backend.put("a", BytesSource(b"first"))
    with pytest.raises(ObjectExists):
        backend.put("a", BytesSource(b"second"))
    with pytest.raises(ObjectExists):
        backend.put("a", BytesSource(BIG))
    assert crooked.objects["p/a"] == b"first"


def test_a_key_taken_while_parts_were_sent_is_not_overwritten(
    crooked: CrookedS3, backend: StorageBackend
) -> None:
    def meanwhile(_token: str) -> None:
        crooked.objects["p/a"] = b"another writer's"

    with pytest.raises(ObjectExists):
        backend.put("a", BytesSource(BIG), on_resume_token=meanwhile)
    assert crooked.objects["p/a"] == b"another writer's"
    assert not crooked.uploads


def test_the_probe_runs_once(crooked: CrookedS3, backend: StorageBackend) -> None:
    behave(crooked, **GOOD)
    backend.put("a", BytesSource(b"1"))
    crooked.requests.clear()
    backend.put("b", BytesSource(b"2"))
    assert crooked.requests == [f"PUT /{BUCKET}/p/b"]


def test_without_permission_to_delete_one_probe_object_stays_unseen(
    crooked: CrookedS3, backend: StorageBackend
) -> None:
    behave(crooked, **GOOD, bad_moments=[("DELETE", 403, "AccessDenied")] * 99)
    backend.put("a", BytesSource(b"1"))
    again = open_backend(f"s3://{BUCKET}/p", crooked.options)
    again.put("b", BytesSource(b"2"))
    again.close()
    assert sorted(crooked.objects) == ["p/.agentkeep-probe", "p/a", "p/b"]
    assert keys(backend) == ["a", "b"]


def test_a_bucket_that_is_not_there_is_not_made(crooked: CrookedS3) -> None:
    with closing(open_backend("s3://elsewhere", crooked.options)) as backend:
        for call in (
            backend.probe,
            lambda: backend.put("a", BytesSource(b"")),
            lambda: backend.put("a", BytesSource(BIG)),
            lambda: backend.stat("a"),
            lambda: backend.open("a"),
            lambda: keys(backend),
        ):
            with pytest.raises(ContainerNotFound):
                call()
    assert not any(request.startswith("PUT") for request in crooked.requests)


# What is proven


@pytest.mark.parametrize("data", [b"small", BIG], ids=["small", "big"])
def test_a_digest_is_reported_only_if_the_server_checked_it(
    crooked: CrookedS3, backend: StorageBackend, data: bytes
) -> None:
    assert backend.put("unchecked", BytesSource(data)).sha256 is None
    behave(crooked, **GOOD)
    with closing(open_backend(f"s3://{BUCKET}/p", crooked.options)) as knowing:
        assert knowing.put("checked", BytesSource(data)).sha256 == BytesSource(data).sha256


@pytest.mark.parametrize("check", ["verifies_sha256", "verifies_md5", "plain_etags"])
@pytest.mark.parametrize("data", [b"small", BIG], ids=["small", "big"])
def test_damage_on_the_way_is_found(
    crooked: CrookedS3, backend: StorageBackend, check: str, data: bytes
) -> None:
    behave(crooked, plain_etags=False)
    behave(crooked, damages="damaged", **{check: True})
    with pytest.raises(Corrupted):
        backend.put("damaged", BytesSource(data))
    assert not crooked.objects
    assert not crooked.uploads


def test_checksums_can_be_switched_off(crooked: CrookedS3) -> None:
    behave(crooked, **GOOD)
    with closing(open_backend(f"s3://{BUCKET}/p", {**crooked.options, "checksums": "off"})) as backend:
        assert backend.probe().checksums is False
        assert backend.put("a", BytesSource(b"1")).sha256 is None


# Bodies and bad moments


@pytest.mark.parametrize("size_bytes", [10, 1_000_000])
def test_a_body_that_ends_early_is_no_end(
    crooked: CrookedS3, backend: StorageBackend, size_bytes: int
) -> None:
    crooked.objects["p/a"] = noise(size_bytes)
    behave(crooked, serves_at_most_bytes=size_bytes - 3)
    for offset in (0, 2):
        with closing(backend.open("a", offset=offset)) as stream, pytest.raises(Unavailable):
            stream.read()
        with closing(backend.open("a", offset=offset)) as stream, pytest.raises(Unavailable):
            list(iter(lambda: stream.read(4096), b""))


def test_a_server_that_ignores_ranges_is_not_believed(crooked: CrookedS3, backend: StorageBackend) -> None:
    crooked.objects["p/a"] = noise(100)
    behave(crooked, ignores_ranges=True)
    with pytest.raises(StorageError, match="range"):
        backend.open("a", offset=50)


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (503, "SlowDown", Unavailable),
        (500, "InternalError", Unavailable),
        (507, "", StorageFull),
        (409, "ConditionalRequestConflict", Unavailable),
        (403, "AccessDenied", Forbidden),
        (403, "RequestTimeTooSkewed", Forbidden),
        (400, "Strange", StorageError),
        (501, "NotImplemented", StorageError),
    ],
)
def test_a_bad_moment_is_one_error_and_no_retry(
    crooked: CrookedS3, backend: StorageBackend, status: int, code: str, error: type[StorageError]
) -> None:
    behave(crooked, bad_moments=[("GET", status, code), ("HEAD", status, code), ("GET", status, code)])
    for call in (lambda: backend.open("a"), lambda: backend.stat("a")):
        with pytest.raises(StorageError) as caught:
            call()
        assert isinstance(caught.value, error)


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and not listening
        options = {"endpoint_url": f"http://127.0.0.1:{taken.getsockname()[1]}"}
        options |= {"access_key_id": "AK", "secret_access_key": "s3cr3t"}
        backend = open_backend(f"s3://{BUCKET}", options)
        with closing(backend), pytest.raises(Unavailable) as caught:
            backend.probe()
    assert "s3cr3t" not in str(caught.value)


# Parts


def test_a_resumed_put_sends_only_what_is_missing(crooked: CrookedS3, backend: StorageBackend) -> None:
    token = _interrupted(backend)
    crooked.requests.clear()
    backend.put("a", BytesSource(BIG), resume=token)
    assert crooked.objects["p/a"] == BIG
    assert _parts_sent(crooked) == [3]


def test_a_part_that_is_not_as_it_should_be_is_sent_again(
    crooked: CrookedS3, backend: StorageBackend
) -> None:
    token = _interrupted(backend)
    [parts] = crooked.uploads.values()
    parts[1] = parts[1][:-1]
    parts[2] = b"?" + parts[2][1:]
    crooked.requests.clear()
    backend.put("a", BytesSource(BIG), resume=token)
    assert crooked.objects["p/a"] == BIG
    assert sorted(_parts_sent(crooked)) == [1, 2, 3]


def test_without_anybody_to_keep_a_token_nothing_is_left(crooked: CrookedS3, backend: StorageBackend) -> None:
    with pytest.raises(OSError, match="on fire"):
        backend.put("a", FailingSource(BIG, fails_at=11 << 20))
    assert not crooked.uploads
    behave(crooked, bad_moments=[("partNumber=2", 503, "SlowDown")])
    with pytest.raises(Unavailable):
        backend.put("a", BytesSource(BIG))
    assert not crooked.uploads


def test_a_retried_put_goes_on_by_itself(crooked: CrookedS3, backend: StorageBackend) -> None:
    backend.probe()
    crooked.requests.clear()
    behave(crooked, bad_moments=[("partNumber=3", 503, "SlowDown"), ("partNumber=3", 500, "InternalError")])
    retrying = Retrying(backend, attempts=3, sleep=lambda _seconds: None)
    retrying.put("a", BytesSource(BIG))
    assert crooked.objects["p/a"] == BIG
    assert sorted(_parts_sent(crooked)) == [1, 2, 3, 3, 3]


def test_a_source_that_changes_under_way_is_refused(crooked: CrookedS3, backend: StorageBackend) -> None:
    """Between being hashed and being sent: only the server's check can tell."""
    behave(crooked, **GOOD)

    class Changing:
        size_bytes = len(BIG)
        sha256 = BytesSource(BIG).sha256
        opened = 0

        def open(self, offset: int = 0) -> io.BytesIO:
            self.opened += 1
            return io.BytesIO(BIG[offset:] if self.opened == 1 else b"!" + BIG[offset + 1 :])

    with pytest.raises(Corrupted):
        backend.put("a", Changing())
    assert not crooked.objects
    assert not crooked.uploads


def _interrupted(backend: StorageBackend) -> str:
    tokens: list[str] = []
    with pytest.raises(OSError, match="on fire"):
        backend.put("a", FailingSource(BIG, fails_at=11 << 20), on_resume_token=tokens.append)
    return tokens[-1]


def _parts_sent(crooked: CrookedS3) -> list[int]:
    sent = [request for request in crooked.requests if request.startswith("PUT") and "partNumber=" in request]
    return [
        int(request.partition("partNumber=")[2].partition("&")[0]) for request in sent if "/p/a?" in request
    ]


# A real server


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"secret_access_key": "wrong-s3cr3t"}, "secret access key"),
        ({"access_key_id": "AKUNKNOWN"}, "access key id"),
    ],
)
def test_wrong_credentials_say_which(seaweedfs_place: S3Place, options: dict[str, str], message: str) -> None:
    wrong = {**seaweedfs_place.options, **options}
    with closing(open_backend(seaweedfs_place.url, wrong)) as backend:
        for call in (
            backend.probe,
            lambda: backend.put("a", BytesSource(b"")),
            lambda: backend.stat("a"),
            lambda: backend.open("a"),
            lambda: keys(backend),
            lambda: backend.delete("a"),
        ):
            with pytest.raises(Forbidden, match=message) as caught:
                call()
            shown = str(caught.value) + repr(backend)
            assert not any(secret in shown for secret in (wrong["secret_access_key"], "s3cr3t"))


def test_credentials_that_may_not_delete_still_back_up(
    seaweedfs: SeaweedFS, seaweedfs_place: S3Place
) -> None:
    options = {**seaweedfs_place.options, **seaweedfs.options(seaweedfs.keeper)}
    with closing(open_backend(seaweedfs_place.url, options)) as backend:
        assert backend.probe().conditional_put
        assert backend.put("a", BytesSource(b"kept")).sha256 is not None
        backend.put("big", BytesSource(BIG))
        assert keys(backend) == ["a", "big"]
        with pytest.raises(Forbidden):
            backend.delete("a")
        assert read(backend, "a") == b"kept"


def test_versioning_and_object_lock_are_seen(seaweedfs: SeaweedFS) -> None:
    bucket = f"lock-{secrets.token_hex(4)}"
    with closing(seaweedfs.client()) as client:
        client.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=True)
    with closing(open_backend(f"s3://{bucket}/p", seaweedfs.options())) as backend:
        capabilities = backend.probe()
        assert capabilities.object_lock
        assert capabilities.versioning
        backend.put("a", BytesSource(b"1"))
        with pytest.raises(ObjectExists):
            backend.put("a", BytesSource(b"2"))
        backend.delete("a")
        with pytest.raises(ObjectNotFound):
            backend.stat("a")


_PUT_AND_HANG = """
import json, sys, time
from storage_backends import open_backend
from storage_backends.conformance import noise
from storage_backends.base import BytesSource
import io

class Hanging(io.BytesIO):
    def read(self, size=-1):
        if self.tell() >= 11 << 20:
            print("hanging", flush=True)
            time.sleep(600)
        return super().read(size)

class Source(BytesSource):
    def open(self, offset=0):
        stream = Hanging(self.data)
        stream.seek(offset)
        return stream

place = json.loads(sys.stdin.readline())
backend = open_backend(place["url"], place["options"])
backend.put("a", Source(noise(12 << 20)), on_resume_token=lambda token: print(token, flush=True))
"""


def test_another_process_goes_on_after_sigkill(seaweedfs_place: S3Place, pytestconfig: pytest.Config) -> None:
    place = seaweedfs_place
    with subprocess.Popen(
        [sys.executable, "-c", _PUT_AND_HANG],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(pytestconfig.rootpath),
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"url": place.url, "options": place.options}) + "\n")
        process.stdin.flush()
        token = process.stdout.readline().strip()
        assert process.stdout.readline().strip() == "hanging"
        process.send_signal(signal.SIGKILL)
    with closing(open_backend(place.url, place.options)) as backend:
        assert keys(backend) == []
        backend.put("a", BytesSource(BIG), resume=token)
        assert read(backend, "a") == BIG
        backend.discard("a", token)
        assert keys(backend) == ["a"]
