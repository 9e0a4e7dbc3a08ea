"""Objects in an S3 bucket, of any provider: `s3://bucket/prefix`.

Owns the client, the options, and the choice of request for each operation of the contract. What a
provider can do is tried on the first put (`traits`), remembered, and relied on from then on:
where it checks SHA-256, every request carries one; where it does not, Content-MD5 goes along and the
ETag is compared; where it ignores `If-None-Match`, the key is looked up first. Must not retry:
that is a layer (`layers.Retrying`).

Crash model: S3's own. A put in one piece is there or not; one in parts is invisible until completed.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, BinaryIO, ClassVar, Self

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ProfileNotFound

from storage_backends.base import (
    Capabilities,
    ContainerNotFound,
    Forbidden,
    InvalidDestination,
    ObjectExists,
    ObjectInfo,
    ObjectNotFound,
    Source,
    StorageBackend,
    StorageError,
    Unavailable,
    validate_key,
    validate_range,
)
from storage_backends.s3 import upload
from storage_backends.s3.bucket import Bucket
from storage_backends.s3.errors import RangePastEnd
from storage_backends.s3.listing import walk
from storage_backends.s3.options import OPTION_NAMES, S3Options, parse
from storage_backends.s3.traits import Traits, probe_parts, probe_puts

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

CONNECT_TIMEOUT_SECONDS = 10
READ_TIMEOUT_SECONDS = 60
PAGE_KEYS = 1000


class S3Backend(StorageBackend):
    option_names: ClassVar[frozenset[str]] = OPTION_NAMES

    def __init__(self, options: S3Options) -> None:
        """Raises InvalidDestination."""
        self._options = options
        self._bucket = Bucket(make_client(options), name=options.bucket, prefix=options.prefix)
        self._lock = threading.Lock()
        self._put_traits: Traits | None = None
        self._part_traits: Traits | None = None
        self._bucket_seen = False

    def __repr__(self) -> str:
        return f"S3Backend(bucket={self._options.bucket!r}, prefix={self._options.prefix!r})"

    @classmethod
    def from_url(cls, url: str, options: Mapping[str, str]) -> Self:
        return cls(parse(url, options))

    def probe(self) -> Capabilities:
        self._bucket.require()
        puts = probe_puts(self._bucket, checksums=self._options.checksums)
        parts = probe_parts(self._bucket, puts=puts)
        with self._lock:
            self._put_traits, self._part_traits = puts, parts
        return Capabilities(
            conditional_put=puts.refuses_taken and parts.refuses_taken,
            checksums=puts.verifies_sha256 and parts.verifies_sha256,
            versioning=_is_so(self._bucket.has_versioning),
            object_lock=_is_so(self._bucket.has_object_lock),
            resumable_put=True,
        )

    def put(
        self,
        key: str,
        source: Source,
        *,
        resume: str | None = None,
        on_resume_token: Callable[[str], None] | None = None,
    ) -> ObjectInfo:
        validate_key(key)
        if source.size_bytes <= self._options.part_size_bytes:
            traits = self._traits_of_puts()
            if not traits.refuses_taken:
                self._require_free(key)
            upload.put_whole(self._bucket, key, source, traits=traits)
            proven = traits.verifies_sha256
        else:
            traits = self._traits_of_parts()
            self._require_free(key)  # spares sending all of it for nothing
            proven = upload.put_in_parts(
                self._bucket,
                key,
                source,
                traits=traits,
                part_size_bytes=self._options.part_size_bytes,
                resume=resume,
                on_resume_token=on_resume_token,
                before_completion=lambda: None if traits.refuses_taken else self._require_free(key),
            )
        return ObjectInfo(key, source.size_bytes, datetime.now(UTC), source.sha256 if proven else None)

    def open(self, key: str, *, offset: int = 0, length: int | None = None) -> BinaryIO:
        validate_key(key)
        validate_range(offset=offset, length=length)
        if length == 0:
            self.stat(key)
            return io.BytesIO()
        try:
            return self._bucket.get(key, offset=offset, length=length)
        except RangePastEnd:
            return io.BytesIO()

    def stat(self, key: str) -> ObjectInfo:
        """`sha256` is set once this backend has seen, at a put or `probe`, that the server checks it, and
        for objects that were put in one piece."""
        validate_key(key)
        try:
            stored = self._bucket.head(key)
        except ObjectNotFound:
            self._require_bucket()
            raise
        except Forbidden:
            with suppress(RangePastEnd):
                self._bucket.read_first_byte(key)  # an answer to HEAD has no room for the reason
            raise
        believed = self._put_traits is not None and self._put_traits.verifies_sha256
        sha256 = stored.sha256.hex() if stored.sha256 is not None and believed else None
        return ObjectInfo(key, stored.size_bytes, stored.modified_at, sha256)

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        return walk(self._bucket, prefix=prefix, start_after=start_after, page_keys=PAGE_KEYS)

    def delete(self, key: str) -> None:
        validate_key(key)
        with suppress(ObjectNotFound):
            self._bucket.delete(key)

    def discard(self, key: str, resume: str) -> None:
        validate_key(key)
        upload.discard(self._bucket, key, resume)

    def close(self) -> None:
        self._bucket.close()

    def _traits_of_puts(self) -> Traits:
        with self._lock:
            if self._put_traits is None:
                # Before anything is sent: some servers make a bucket that is not there.
                with suppress(Forbidden):
                    self._bucket.require()
                self._put_traits = probe_puts(self._bucket, checksums=self._options.checksums)
            return self._put_traits

    def _traits_of_parts(self) -> Traits:
        puts = self._traits_of_puts()
        with self._lock:
            if self._part_traits is None:
                self._part_traits = probe_parts(self._bucket, puts=puts)
            return self._part_traits

    def _require_free(self, key: str) -> None:
        with suppress(ObjectNotFound):
            self._bucket.head(key)
            raise ObjectExists(f"{key} is already stored")

    def _require_bucket(self) -> None:
        """A HEAD says 404 of a missing object and of a missing bucket alike. Raises ContainerNotFound."""
        if not self._bucket_seen:
            with suppress(Forbidden, Unavailable):
                self._bucket.require()
                self._bucket_seen = True


def _is_so(ask: Callable[[], bool]) -> bool:
    """False also where the server does not know the question, or these credentials may not ask it."""
    try:
        return ask()
    except (Unavailable, ContainerNotFound):
        raise
    except StorageError:
        return False


def make_client(options: S3Options) -> S3Client:
    """The one client, without retries of its own. Contacts nothing. Raises InvalidDestination."""
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_SECONDS,
        read_timeout=READ_TIMEOUT_SECONDS,
        retries={"total_max_attempts": 1},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": options.addressing_style},
        user_agent_extra="agentkeep",
    )
    try:
        session = boto3.session.Session(
            aws_access_key_id=options.access_key_id,
            aws_secret_access_key=options.secret_access_key,
            aws_session_token=options.session_token,
            profile_name=options.profile,
            region_name=options.region,
        )
        client: S3Client = session.client(
            "s3",
            # Providers of their own take any region, but a signature needs one.
            region_name=session.region_name or ("us-east-1" if options.endpoint_url else None),
            endpoint_url=options.endpoint_url,
            verify=options.ca_file,
            config=config,
        )
    except (BotoCoreError, ValueError) as exc:
        raise InvalidDestination(f"no S3 client can be made: {_reason(exc)}") from exc
    return client


def _reason(exc: BotoCoreError | ValueError) -> str:
    # A ValueError of botocore quotes what it was given.
    return str(exc) if isinstance(exc, ProfileNotFound) else type(exc).__name__
