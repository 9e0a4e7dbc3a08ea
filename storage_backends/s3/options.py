"""From a URL and options to what the S3 backend needs, or to a refusal that quotes no secret.

Owns the meaning of every option. Contacts nothing, reads no file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast
from urllib.parse import urlsplit

from storage_backends.base import InvalidDestination, is_valid_key

_MIB = 1 << 20
DEFAULT_PART_SIZE_BYTES = 16 * _MIB
MIN_PART_SIZE_BYTES = 5 * _MIB  # S3's own limit, but for the last part
MAX_PART_SIZE_BYTES = 5 << 30
MAX_PREFIX_BYTES = 120  # with a key's 900 within S3's 1024
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}\Z")

OPTION_NAMES = frozenset(
    {
        "access_key_id",
        "addressing_style",
        "ca_file",
        "checksums",
        "endpoint_url",
        "part_size_bytes",
        "profile",
        "region",
        "secret_access_key",
        "session_token",
    }
)


@dataclass(frozen=True, slots=True)
class S3Options:
    """prefix is empty or ends in a slash; None leaves a choice to the AWS configuration chain."""

    bucket: str
    prefix: str
    endpoint_url: str | None = None
    region: str | None = None
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    ca_file: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    profile: str | None = None
    part_size_bytes: int = DEFAULT_PART_SIZE_BYTES
    checksums: bool = True


def parse(url: str, options: Mapping[str, str]) -> S3Options:
    """Raises InvalidDestination."""
    bucket, prefix = _bucket_and_prefix(url)
    given = {name: value for name, value in options.items() if value}
    return S3Options(
        bucket,
        prefix,
        endpoint_url=_endpoint_url(given.get("endpoint_url")),
        region=given.get("region"),
        addressing_style=cast(
            Literal["auto", "path", "virtual"],
            _one_of("addressing_style", given, choices=("auto", "path", "virtual")),
        ),
        ca_file=_ca_file(given.get("ca_file")),
        part_size_bytes=_part_size_bytes(given.get("part_size_bytes")),
        checksums=_one_of("checksums", given, choices=("auto", "off")) == "auto",
        **_credentials(given),
    )


def _bucket_and_prefix(url: str) -> tuple[str, str]:
    rest = url.removeprefix("s3://")
    if rest == url or "@" in rest or "?" in rest or "#" in rest:
        # Not quoted: before the @ there may be a secret.
        raise InvalidDestination(
            "an S3 destination is s3://BUCKET/PREFIX; credentials are options or come from the environment"
        )
    bucket, _slash, prefix = rest.partition("/")
    if not _BUCKET.match(bucket):
        raise InvalidDestination(f"not a bucket's name: {bucket[:70]!r}")
    prefix = prefix.rstrip("/")
    if prefix and (not is_valid_key(prefix) or len(prefix) > MAX_PREFIX_BYTES):
        raise InvalidDestination(
            f"the prefix in s3://{bucket}/... must be names of letters, digits, '.', '_', '-' joined by"
            f" single slashes, at most {MAX_PREFIX_BYTES} bytes"
        )
    return bucket, prefix + "/" if prefix else ""


def _endpoint_url(text: str | None) -> str | None:
    if text is None:
        return None
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError as exc:
        raise InvalidDestination("endpoint_url is not a URL") from exc
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidDestination("endpoint_url must begin with https:// or http:// and name a host")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InvalidDestination("endpoint_url must not hold credentials, a query or a fragment")
    return text


def _ca_file(text: str | None) -> str | None:
    if text is not None and not Path(text).is_file():
        raise InvalidDestination(f"ca_file is not there: {text}")
    return text


def _part_size_bytes(text: str | None) -> int:
    if text is None:
        return DEFAULT_PART_SIZE_BYTES
    if (
        not text.isascii()
        or not text.isdigit()
        or not MIN_PART_SIZE_BYTES <= int(text) <= MAX_PART_SIZE_BYTES
    ):
        raise InvalidDestination(
            f"part_size_bytes must be a number from {MIN_PART_SIZE_BYTES} to {MAX_PART_SIZE_BYTES}"
        )
    return int(text)


def _credentials(given: Mapping[str, str]) -> dict[str, str | None]:
    names = ("access_key_id", "secret_access_key", "session_token", "profile")
    access_key_id, secret_access_key, session_token, profile = map(given.get, names)
    if (access_key_id is None) != (secret_access_key is None):
        raise InvalidDestination("access_key_id and secret_access_key go together")
    if session_token is not None and access_key_id is None:
        raise InvalidDestination("session_token needs access_key_id and secret_access_key")
    if profile is not None and access_key_id is not None:
        raise InvalidDestination("either profile or access_key_id, not both")
    return dict(zip(names, (access_key_id, secret_access_key, session_token, profile), strict=True))


def _one_of(name: str, given: Mapping[str, str], *, choices: tuple[str, ...]) -> str:
    """The first choice is the default."""
    value = given.get(name, choices[0])
    if value not in choices:
        raise InvalidDestination(f"{name} must be one of: {', '.join(choices)}")
    return value
