"""What an S3 server really does, found out by trying it on two tiny objects.

Owns the probe keys. Some servers ignore `If-None-Match: *` and overwrite, or keep a checksum header
without looking at it, so neither a name nor a documented feature is believed: a server is taken to
refuse only what it was seen refusing. A wrong verdict in the other direction (another host removed
the probe object meanwhile) costs a request per put, never safety.

Credentials that may not delete leave the probe objects behind, once; they are never listed.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from storage_backends.base import (
    ContainerNotFound,
    Corrupted,
    Forbidden,
    ObjectExists,
    ObjectNotFound,
    StorageError,
    StorageFull,
    Unavailable,
)
from storage_backends.s3.bucket import Bucket, Part

PROBE_KEY = ".agentkeep-probe"
WRONG_DIGEST_KEY = ".agentkeep-probe-digest"
_BODY = b"agentkeep looks at what this storage can do\n"
_SHA256 = hashlib.sha256(_BODY).digest()
_WRONG_SHA256 = hashlib.sha256(b"other bytes").digest()
_MD5_HEX = hashlib.md5(_BODY, usedforsecurity=False).hexdigest()
_ATTEMPTS = 4
# These say nothing about what the server can do.
_NO_VERDICT = (ContainerNotFound, Forbidden, StorageFull, Unavailable)


@dataclass(frozen=True, slots=True)
class Traits:
    """Of one kind of request (a put in one piece, or in parts).

    refuses_taken: `If-None-Match: *` on a key that is taken is refused
    verifies_sha256: bytes that do not have the SHA-256 sent with them are refused
    etag_is_md5: the ETag is the MD5 of what arrived
    """

    refuses_taken: bool
    verifies_sha256: bool
    etag_is_md5: bool


def probe_puts(bucket: Bucket, *, checksums: bool) -> Traits:
    """Raises ContainerNotFound, Forbidden, Unavailable."""
    try:
        refuses_taken, etag = _put_until_refused(bucket)
        verifies_sha256 = checksums and _refuses(
            lambda: bucket.put(
                WRONG_DIGEST_KEY, _BODY, if_absent=refuses_taken, sha256=_WRONG_SHA256, md5=None
            ),
            with_error=Corrupted,
        )
    finally:
        _remove(bucket, PROBE_KEY, WRONG_DIGEST_KEY)
    return Traits(refuses_taken, verifies_sha256, etag_is_md5=etag == _MD5_HEX)


def probe_parts(bucket: Bucket, *, puts: Traits) -> Traits:
    """The same for multipart uploads, where servers may behave differently."""
    with contextlib.suppress(ObjectExists):
        bucket.put(PROBE_KEY, _BODY, if_absent=puts.refuses_taken, sha256=None, md5=None)
    upload_id, accepts_sha256 = _create_upload(bucket, checksums=puts.verifies_sha256)
    try:
        verifies_sha256 = accepts_sha256 and _refuses(
            lambda: bucket.upload_part(PROBE_KEY, upload_id, 1, _BODY, sha256=_WRONG_SHA256, md5=None),
            with_error=Corrupted,
        )
        sha256 = _SHA256 if verifies_sha256 else None
        etag = bucket.upload_part(PROBE_KEY, upload_id, 1, _BODY, sha256=sha256, md5=None)
        part = Part(1, len(_BODY), etag, sha256)
        refuses_taken = _refuses(
            lambda: bucket.complete_upload(PROBE_KEY, upload_id, [part], if_absent=True),
            with_error=ObjectExists,
        )
    finally:
        with contextlib.suppress(StorageError):
            bucket.abort_upload(PROBE_KEY, upload_id)
        _remove(bucket, PROBE_KEY)
    return Traits(refuses_taken, verifies_sha256, etag == _MD5_HEX)


def _put_until_refused(bucket: Bucket) -> tuple[bool, str]:
    """Whether a conditional put of a key that is taken is refused, and the probe object's ETag.

    The very first may be refused, by what an earlier probe left. Some must be repeated: between two
    of ours, another host that probes may remove the object.
    """
    etag = ""
    for _attempt in range(_ATTEMPTS):
        try:
            etag = bucket.put(PROBE_KEY, _BODY, if_absent=True, sha256=None, md5=None)
        except ObjectExists:
            return True, etag or _etag_of_left_over(bucket)
        except _NO_VERDICT:
            raise
        except StorageError:  # the header itself is not understood
            return False, bucket.put(PROBE_KEY, _BODY, if_absent=False, sha256=None, md5=None)
    return False, etag


def _etag_of_left_over(bucket: Bucket) -> str:
    with contextlib.suppress(ObjectNotFound):
        return bucket.head(PROBE_KEY).etag
    return ""


def _refuses(attempt: Callable[[], object], *, with_error: type[StorageError]) -> bool:
    try:
        attempt()
    except with_error:
        return True
    except _NO_VERDICT:
        raise
    except StorageError:
        return False
    return False


def _create_upload(bucket: Bucket, *, checksums: bool) -> tuple[str, bool]:
    """The upload's id, and whether it was made to take SHA-256 checksums."""
    if checksums:
        try:
            return bucket.create_upload(PROBE_KEY, checksums=True), True
        except _NO_VERDICT:
            raise
        except StorageError:  # the server does not take them in parts
            pass
    return bucket.create_upload(PROBE_KEY, checksums=False), False


def _remove(bucket: Bucket, *keys: str) -> None:
    for key in keys:
        with contextlib.suppress(StorageError):
            bucket.delete(key)
