"""What S3 servers, botocore and urllib3 say, in the contract's words: the one place for it.

Must not decide what to do about an error. Messages carry the server's code and what it means to an
operator; they never carry a credential, a signature or a request.
"""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Iterator

import urllib3.exceptions
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoAuthTokenError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
    SSLError,
    SSOError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as NoConnectionError

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


class UploadGone(Unavailable):
    """The multipart upload was aborted, completed or expired. Putting again starts a new one."""


class RangePastEnd(StorageError):
    """The first byte asked for is at or past the object's end."""


_WRONG_PLACE = "the region or the endpoint does not fit this bucket"
_TOO_BUSY = "the server is busy or failing"

# By the server's code first: it says more than the status. A HEAD's answer has no body, so its
# "code" is the status.
_BY_CODE: dict[str, tuple[type[StorageError], str]] = {
    "NoSuchBucket": (ContainerNotFound, "the bucket does not exist"),
    "InvalidBucketName": (ContainerNotFound, "no bucket can have this name"),
    "NoSuchKey": (ObjectNotFound, "no such object"),
    "NoSuchUpload": (UploadGone, "the multipart upload is gone"),
    "InvalidRange": (RangePastEnd, "the range begins past the end"),
    "PreconditionFailed": (ObjectExists, "the key is already taken"),
    # Somebody else is storing this very key now: whether it will be taken is not known yet.
    "ConditionalRequestConflict": (Unavailable, "another writer is storing this key"),
    "OperationAborted": (Unavailable, "another operation on this is in progress"),
    "RequestTimeTooSkewed": (Forbidden, "this host's clock differs too much from the server's; set the time"),
    "InvalidAccessKeyId": (Forbidden, "the access key id is not known there"),
    "SignatureDoesNotMatch": (Forbidden, "the secret access key does not belong to the access key id"),
    "ExpiredToken": (Forbidden, "the session token has expired"),
    "InvalidToken": (Forbidden, "the session token is not valid"),
    "TokenRefreshRequired": (Forbidden, "the session token has to be refreshed"),
    "AccessDenied": (Forbidden, "the credentials are not allowed to do this"),
    "PermanentRedirect": (StorageError, _WRONG_PLACE),
    "AuthorizationHeaderMalformed": (StorageError, _WRONG_PLACE),
    "IllegalLocationConstraintException": (StorageError, _WRONG_PLACE),
    "NotImplemented": (StorageError, "the server cannot do this"),
    "IncompleteBody": (Unavailable, "the connection broke while sending"),
    "RequestTimeout": (Unavailable, "the server waited too long for data"),
    **dict.fromkeys(
        (
            "BadDigest",
            "InvalidDigest",
            "ChecksumMismatch",
            "XAmzContentChecksumMismatch",
            "XAmzContentSHA256Mismatch",
        ),
        (Corrupted, "what arrived does not have the digest that was announced"),
    ),
    **dict.fromkeys(
        (
            "QuotaExceeded",
            "QuotaExceededException",
            "InsufficientStorage",
            "StorageFull",
            "XMinioStorageFull",
            "XMinioAdminBucketQuotaExceeded",
        ),
        (StorageFull, "the storage is full or its quota used up"),
    ),
    **dict.fromkeys(
        (
            "SlowDown",
            "ServiceUnavailable",
            "InternalError",
            "RequestLimitExceeded",
            "Throttling",
            "ThrottlingException",
            "TooManyRequests",
        ),
        (Unavailable, _TOO_BUSY),
    ),
}

_BY_STATUS: dict[int, tuple[type[StorageError], str]] = {
    301: (StorageError, _WRONG_PLACE),
    401: (Forbidden, "the credentials were not accepted"),
    403: (Forbidden, "the credentials are not allowed to do this"),
    404: (ObjectNotFound, "not found"),
    408: (Unavailable, _TOO_BUSY),
    409: (Unavailable, "another operation on this is in progress"),
    412: (ObjectExists, "the key is already taken"),
    416: (RangePastEnd, "the range begins past the end"),
    425: (Unavailable, _TOO_BUSY),
    429: (Unavailable, _TOO_BUSY),
    501: (StorageError, "the server cannot do this"),
    507: (StorageFull, "the storage is full or its quota used up"),
}


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turns vendor errors into the contract's, most specific first. `doing` begins the message."""
    try:
        yield
    except ClientError as exc:
        raise _from_answer(doing, exc) from exc
    except (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError) as exc:
        raise Forbidden(f"{doing}: no usable credentials were found") from exc
    except (NoAuthTokenError, TokenRetrievalError, SSOError) as exc:
        raise Forbidden(f"{doing}: the sign-on session has expired or cannot be used") from exc
    except SSLError as exc:
        raise _from_tls(doing, exc) from exc
    except (ReadTimeoutError, urllib3.exceptions.TimeoutError, TimeoutError) as exc:
        raise Unavailable(f"{doing}: the server did not answer in time") from exc
    except NoConnectionError as exc:
        raise Unavailable(f"{doing}: cannot connect to the server ({type(exc).__name__})") from exc
    except (HTTPClientError, IncompleteReadError, urllib3.exceptions.HTTPError) as exc:
        raise Unavailable(f"{doing}: the connection broke ({type(exc).__name__})") from exc
    except (http.client.HTTPException, OSError) as exc:
        raise Unavailable(f"{doing}: the connection broke ({type(exc).__name__})") from exc
    except BotoCoreError as exc:
        raise StorageError(f"{doing}: {type(exc).__name__}") from exc


def _from_answer(doing: str, exc: ClientError) -> StorageError:
    code = str(exc.response.get("Error", {}).get("Code", ""))
    status = int(exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    error, meaning = _BY_CODE.get(code) or _BY_STATUS.get(status) or _by_kind_of_status(status)
    return error(f"{doing}: {meaning} ({code[:60] or status})")


def _by_kind_of_status(status: int) -> tuple[type[StorageError], str]:
    if status >= 500:
        return Unavailable, _TOO_BUSY
    return StorageError, "the server refused"


def _from_tls(doing: str, exc: SSLError) -> StorageError:
    if "CERTIFICATE_VERIFY_FAILED" in str(exc):
        return StorageError(f"{doing}: the server's certificate is not trusted (ca_file names another CA)")
    return Unavailable(f"{doing}: the TLS connection failed")
