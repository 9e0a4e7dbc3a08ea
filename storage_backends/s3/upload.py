"""Sending a source to a bucket, in one piece or in parts, and going on after an interruption.

Owns the resume token and the promise that nothing is stored whose bytes do not have the source's
digest: every part is hashed just before it is sent, alone (for the server to check) and as a part of
the whole (checked here before the upload is completed). Memory is a few buffers: a part is read from
the source twice, never held.

Crash model: until its completion, an upload in parts is invisible. Its token lets another process go
on; without anybody to keep a token, it is aborted when the put fails. A process that is killed may
leave one, which a lifecycle rule of the bucket removes (docs/BACKENDS.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace

from storage_backends.base import Corrupted, ObjectExists, Source, StorageError
from storage_backends.s3.body import Digests, hash_part, require_digest, send
from storage_backends.s3.bucket import Bucket, Part
from storage_backends.s3.errors import UploadGone
from storage_backends.s3.traits import Traits

MAX_PARTS = 10_000
IN_FLIGHT = 2
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ResumeToken:
    """Where an upload in parts can go on, and of what: printable JSON."""

    upload_id: str
    key: str
    size_bytes: int
    sha256: str
    part_size_bytes: int
    checksums: bool

    def text(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> ResumeToken | None:
        """None for anything that is not a token of ours."""
        try:
            token = cls(**json.loads(text))
        except (ValueError, TypeError):
            return None
        texts = (token.upload_id, token.key, token.sha256)
        numbers = (token.size_bytes, token.part_size_bytes)
        well_formed = (
            all(isinstance(text, str) and text for text in texts)
            and all(type(number) is int and number > 0 for number in numbers)
            and isinstance(token.checksums, bool)
        )
        return token if well_formed else None

    def fits(self, key: str, source: Source, *, traits: Traits) -> bool:
        mine = (self.key, self.size_bytes, self.sha256, self.checksums)
        right_size = self.size_bytes <= self.part_size_bytes * MAX_PARTS
        return right_size and mine == (key, source.size_bytes, source.sha256, traits.verifies_sha256)


def put_whole(bucket: Bucket, key: str, source: Source, *, traits: Traits) -> None:
    """One PutObject. Raises ObjectExists, Corrupted, what the source raises, ..."""
    with closing(source.open()) as stream:
        whole = hashlib.sha256()
        digests = hash_part(stream, source.size_bytes, whole=whole, md5_too=not traits.verifies_sha256)
        require_digest(source, stream, whole.hexdigest(), key=key)
    etag = send(
        source,
        0,
        source.size_bytes,
        lambda body: bucket.put(
            key,
            body,
            if_absent=traits.refuses_taken,
            sha256=digests.sha256 if traits.verifies_sha256 else None,
            md5=None if traits.verifies_sha256 else digests.md5,
        ),
    )
    if not _arrived(etag, digests, traits=traits):
        with contextlib.suppress(StorageError):
            bucket.delete(key)  # ours: it was stored a moment ago
        raise Corrupted(f"storing {key}: the server's MD5 of what arrived is not that of what was sent")


def put_in_parts(
    bucket: Bucket,
    key: str,
    source: Source,
    *,
    traits: Traits,
    part_size_bytes: int,
    resume: str | None,
    on_resume_token: Callable[[str], None] | None,
    before_completion: Callable[[], None],
) -> bool:
    """A multipart upload; whether the server has checked the SHA-256 of every part.

    before_completion: called when only the completion is left; what it raises ends the upload.
    """
    token, held = _continue(bucket, key, source, traits=traits, resume=resume) or (
        _begin(bucket, key, source, traits=traits, part_size_bytes=part_size_bytes),
        {},
    )
    kept = on_resume_token is not None
    try:
        if on_resume_token is not None:
            on_resume_token(token.text())
        parts, proven = _send_parts(bucket, token, source, held=held, traits=traits)
        before_completion()
        bucket.complete_upload(key, token.upload_id, parts, if_absent=traits.refuses_taken)
    except BaseException as exc:
        # What cannot or need not go on is freed; what can, and somebody knows how, is left.
        if not kept or isinstance(exc, (Corrupted, ObjectExists)):
            with contextlib.suppress(StorageError):
                bucket.abort_upload(key, token.upload_id)
        raise
    return proven


def discard(bucket: Bucket, key: str, resume: str) -> None:
    token = ResumeToken.parse(resume)
    if token is None or token.key != key:
        return
    try:
        bucket.abort_upload(key, token.upload_id)
    except UploadGone:
        return
    except StorageError as exc:
        if type(exc) is not StorageError:  # that: an id that the server does not even recognise as one
            raise


def part_size_for(size_bytes: int, *, wanted_bytes: int) -> int:
    """The wanted size, or as many whole MiB as keep the number of parts within what S3 allows."""
    least = -(-size_bytes // MAX_PARTS)
    return max(wanted_bytes, -(-least // _MIB) * _MIB)


def _begin(bucket: Bucket, key: str, source: Source, *, traits: Traits, part_size_bytes: int) -> ResumeToken:
    upload_id = bucket.create_upload(key, checksums=traits.verifies_sha256)
    size_bytes = source.size_bytes
    part_size_bytes = part_size_for(size_bytes, wanted_bytes=part_size_bytes)
    return ResumeToken(upload_id, key, size_bytes, source.sha256, part_size_bytes, traits.verifies_sha256)


def _continue(
    bucket: Bucket, key: str, source: Source, *, traits: Traits, resume: str | None
) -> tuple[ResumeToken, dict[int, Part]] | None:
    token = ResumeToken.parse(resume) if resume is not None else None
    if token is None or not token.fits(key, source, traits=traits):
        return None
    try:
        return token, bucket.list_parts(key, token.upload_id)
    except UploadGone:
        return None
    except StorageError as exc:
        if type(exc) is not StorageError:
            raise
        return None  # an id that the server does not even recognise as one


def _send_parts(
    bucket: Bucket, token: ResumeToken, source: Source, *, held: dict[int, Part], traits: Traits
) -> tuple[list[Part], bool]:
    """Hash every part in order, send those that the server does not hold yet, a few at a time.

    The parts, and whether the server is known to have checked the SHA-256 of each.
    """
    proven = traits.verifies_sha256
    done: list[Part] = []
    in_flight: deque[Future[Part]] = deque()
    whole = hashlib.sha256()
    md5_too = bool(held) or not traits.verifies_sha256
    with closing(source.open()) as stream, ThreadPoolExecutor(IN_FLIGHT) as senders:
        try:
            for number, offset in enumerate(range(0, token.size_bytes, token.part_size_bytes), start=1):
                length = min(token.part_size_bytes, token.size_bytes - offset)
                digests = hash_part(stream, length, whole=whole, md5_too=md5_too)
                part = held.get(number)
                if part is not None and _same(part, digests, length=length):
                    proven = proven and part.sha256 is not None
                    # An upload with checksums is completed with all of them, listed or not.
                    sha256 = digests.sha256 if token.checksums else None
                    done.append(replace(part, sha256=sha256))
                    continue
                if len(in_flight) == IN_FLIGHT:
                    done.append(in_flight.popleft().result())
                job = _PartJob(bucket, token, source, traits, number, offset, length, digests)
                in_flight.append(senders.submit(job.run))
            require_digest(source, stream, whole.hexdigest(), key=token.key)
            done.extend(future.result() for future in in_flight)
        finally:
            for future in in_flight:
                future.cancel()
    return sorted(done, key=lambda part: part.number), proven


@dataclass(frozen=True, slots=True)
class _PartJob:
    bucket: Bucket
    token: ResumeToken
    source: Source
    traits: Traits
    number: int
    offset: int
    length: int
    digests: Digests

    def run(self) -> Part:
        sha256 = self.digests.sha256 if self.traits.verifies_sha256 else None
        etag = send(
            self.source,
            self.offset,
            self.length,
            lambda body: self.bucket.upload_part(
                self.token.key,
                self.token.upload_id,
                self.number,
                body,
                sha256=sha256,
                md5=None if sha256 else self.digests.md5,
            ),
        )
        if not _arrived(etag, self.digests, traits=self.traits):
            raise Corrupted(f"storing {self.token.key}: part {self.number} did not arrive as it was sent")
        return Part(self.number, self.length, etag, sha256)


def _same(part: Part, digests: Digests, *, length: int) -> bool:
    """Whether a part that the server lists is what would be sent. An ETag that is no MD5 never is."""
    if part.size_bytes != length:
        return False
    if part.sha256 is not None:
        return part.sha256 == digests.sha256
    return digests.md5 is not None and part.etag == digests.md5.hex()


def _arrived(etag: str, digests: Digests, *, traits: Traits) -> bool:
    """As far as the answer can tell: the server checked it, or its ETag is what it should be, or is none
    that says anything."""
    if traits.verifies_sha256 or not traits.etag_is_md5 or digests.md5 is None:
        return True
    return etag == digests.md5.hex()
