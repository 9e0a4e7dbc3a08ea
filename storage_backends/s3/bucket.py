"""One bucket and prefix, one method per S3 request: keys in, contract errors out.

Owns how a request is spelled and how its answer is read. Must not retry, decide or remember anything.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from storage_backends.base import StorageError, Unavailable
from storage_backends.s3.errors import translated

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

BUFFER_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a multipart upload, as sent or as the server lists it."""

    number: int
    size_bytes: int
    etag: str
    sha256: bytes | None


@dataclass(frozen=True, slots=True)
class Stored:
    size_bytes: int
    modified_at: datetime
    etag: str
    sha256: bytes | None
    """What the server reports as the whole object's digest; whether it ever checked it is not said."""


@dataclass(frozen=True, slots=True)
class Page:
    """Part of one level of a listing: objects, and the directories (with a slash) below."""

    objects: Mapping[str, tuple[int, datetime]]
    directories: Sequence[str]
    next_token: str | None


class Bucket:
    def __init__(self, client: S3Client, *, name: str, prefix: str) -> None:
        """`prefix` is empty or ends in a slash."""
        self._client = client
        self._name = name
        self._prefix = prefix

    def put(
        self, key: str, body: BinaryIO | bytes, *, if_absent: bool, sha256: bytes | None, md5: bytes | None
    ) -> str:
        """Store under `key`; the ETag. A digest that is given is sent for the server to check."""
        extra: dict[str, Any] = _digest_headers(sha256=sha256, md5=md5)
        if if_absent:
            extra["IfNoneMatch"] = "*"
        with translated(f"storing {key}"):
            answer = self._client.put_object(**self._at(key), Body=body, **extra)
        return _etag(answer)

    def head(self, key: str) -> Stored:
        with translated(f"looking at {key}"):
            answer = self._client.head_object(**self._at(key), ChecksumMode="ENABLED")
        return Stored(
            answer["ContentLength"],
            answer["LastModified"].astimezone(UTC),
            _etag(answer),
            _whole_sha256(cast(Any, answer)),
        )

    def get(self, key: str, *, offset: int, length: int | None) -> BinaryIO:
        """A stream of the object's bytes. Raises RangePastEnd."""
        extra: dict[str, Any] = {}
        if offset or length is not None:
            last = "" if length is None else str(offset + length - 1)
            extra["Range"] = f"bytes={offset}-{last}"
        with translated(f"reading {key}"):
            answer = self._client.get_object(**self._at(key), **extra)
        body = cast(Any, answer["Body"])
        if extra and not answer.get("ContentRange", "").startswith(f"bytes {offset}-"):
            body.close()
            raise StorageError(f"reading {key}: the server ignored the range that was asked for")
        raw = _Body(body, key=key, size_bytes=answer["ContentLength"])
        return cast(BinaryIO, io.BufferedReader(raw, BUFFER_BYTES))

    def read_first_byte(self, key: str) -> None:
        """Ask for what `head` would, in a way that an error is answered with its reason."""
        with translated(f"looking at {key}"):
            answer = self._client.get_object(**self._at(key), Range="bytes=0-0")
        answer["Body"].close()

    def delete(self, key: str) -> None:
        with translated(f"deleting {key}"):
            self._client.delete_object(**self._at(key))

    def list_level(self, prefix: str, *, start_after: str, token: str | None, max_keys: int) -> Page:
        """Keys and directories that begin with `prefix`, down to the next slash, in the server's order."""
        extra: dict[str, Any] = {}
        if token is not None:
            extra["ContinuationToken"] = token
        elif start_after:
            extra["StartAfter"] = self._prefix + start_after
        with translated("listing"):
            answer = self._client.list_objects_v2(
                Bucket=self._name, Prefix=self._prefix + prefix, Delimiter="/", MaxKeys=max_keys, **extra
            )
        skip = len(self._prefix)
        more = answer.get("IsTruncated", False)
        if more and not answer.get("NextContinuationToken"):
            raise StorageError("listing: the server says that there is more, but not where")
        return Page(
            {
                item["Key"][skip:]: (item["Size"], item["LastModified"].astimezone(UTC))
                for item in answer.get("Contents", [])
            },
            [item["Prefix"][skip:] for item in answer.get("CommonPrefixes", [])],
            answer["NextContinuationToken"] if more else None,
        )

    def require(self) -> None:
        """Raises ContainerNotFound, and Forbidden where the bucket may not be listed."""
        with translated(f"looking at the bucket {self._name}"):
            self._client.list_objects_v2(Bucket=self._name, Prefix=self._prefix, MaxKeys=1)

    def create_upload(self, key: str, *, checksums: bool) -> str:
        extra: dict[str, Any] = {"ChecksumAlgorithm": "SHA256"} if checksums else {}
        with translated(f"beginning to store {key}"):
            return self._client.create_multipart_upload(**self._at(key), **extra)["UploadId"]

    def upload_part(
        self,
        key: str,
        upload_id: str,
        number: int,
        body: BinaryIO | bytes,
        *,
        sha256: bytes | None,
        md5: bytes | None,
    ) -> str:
        """Send one part; its ETag. A digest that is given is sent for the server to check."""
        extra = _digest_headers(sha256=sha256, md5=md5)
        with translated(f"storing part {number} of {key}"):
            answer = self._client.upload_part(
                **self._at(key), UploadId=upload_id, PartNumber=number, Body=body, **extra
            )
        return _etag(answer)

    def list_parts(self, key: str, upload_id: str) -> dict[int, Part]:
        """What the server holds of an upload. Raises UploadGone."""
        parts: dict[int, Part] = {}
        with translated(f"continuing to store {key}"):
            pages = self._client.get_paginator("list_parts").paginate(**self._at(key), UploadId=upload_id)
            for page in pages:
                for item in page.get("Parts", []):
                    sha256 = _decoded(item.get("ChecksumSHA256"))
                    parts[item["PartNumber"]] = Part(item["PartNumber"], item["Size"], _etag(item), sha256)
        return parts

    def complete_upload(self, key: str, upload_id: str, parts: Sequence[Part], *, if_absent: bool) -> None:
        listed = [_completed(part) for part in parts]
        extra: dict[str, Any] = {"IfNoneMatch": "*"} if if_absent else {}
        with translated(f"finishing to store {key}"):
            self._client.complete_multipart_upload(
                **self._at(key), UploadId=upload_id, MultipartUpload={"Parts": cast(Any, listed)}, **extra
            )

    def abort_upload(self, key: str, upload_id: str) -> None:
        """Raises UploadGone."""
        with translated(f"giving up storing {key}"):
            self._client.abort_multipart_upload(**self._at(key), UploadId=upload_id)

    def has_versioning(self) -> bool:
        with translated(f"asking for the versioning of {self._name}"):
            return self._client.get_bucket_versioning(Bucket=self._name).get("Status") == "Enabled"

    def has_object_lock(self) -> bool:
        with translated(f"asking for the object lock of {self._name}"):
            answer = self._client.get_object_lock_configuration(Bucket=self._name)
        return answer.get("ObjectLockConfiguration", {}).get("ObjectLockEnabled") == "Enabled"

    def close(self) -> None:
        self._client.close()

    def _at(self, key: str) -> dict[str, Any]:
        return {"Bucket": self._name, "Key": self._prefix + key}


class _Body(io.RawIOBase):
    """An answer's body that raises Unavailable rather than ending early."""

    def __init__(self, body: Any, *, key: str, size_bytes: int) -> None:
        super().__init__()
        self._body = body
        self._key = key
        self._remaining_bytes = size_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        with memoryview(buffer).cast("B") as view:  # type: ignore[arg-type]
            if not self._remaining_bytes or not len(view):
                return 0
            with translated(f"reading {self._key}"):
                chunk = self._body.read(min(len(view), self._remaining_bytes))
            view[: len(chunk)] = chunk
        if not chunk:
            raise Unavailable(f"reading {self._key}: it broke off {self._remaining_bytes} bytes early")
        self._remaining_bytes -= len(chunk)
        return len(chunk)

    def close(self) -> None:
        if not self.closed:
            self._body.close()
        super().close()


def encoded(digest: bytes) -> str:
    return base64.b64encode(digest).decode("ascii")


def _digest_headers(*, sha256: bytes | None, md5: bytes | None) -> dict[str, Any]:
    headers: dict[str, Any] = {}
    if sha256 is not None:
        headers["ChecksumSHA256"] = encoded(sha256)
    if md5 is not None:
        headers["ContentMD5"] = encoded(md5)
    return headers


def _completed(part: Part) -> dict[str, Any]:
    completed: dict[str, Any] = {"PartNumber": part.number, "ETag": f'"{part.etag}"'}
    if part.sha256 is not None:
        completed["ChecksumSHA256"] = encoded(part.sha256)
    return completed


def _etag(answer: Mapping[str, Any]) -> str:
    return str(answer.get("ETag", "")).strip('"')


def _decoded(checksum: str | None) -> bytes | None:
    """A SHA-256 in base64; None for what is none, such as a composite (`...-3`)."""
    try:
        digest = base64.b64decode(checksum or "", validate=True)
    except ValueError:
        return None
    return digest if len(digest) == 32 else None


def _whole_sha256(answer: Mapping[str, Any]) -> bytes | None:
    # Some servers leave the `-3` off a composite; then the ETag (`...-3`) still tells.
    composite = answer.get("ChecksumType") == "COMPOSITE" or "-" in _etag(answer)
    return None if composite else _decoded(answer.get("ChecksumSHA256"))
