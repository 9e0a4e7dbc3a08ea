"""What servers and libraries say, in the contract's words."""

from __future__ import annotations

import http.client

import botocore.exceptions as said
import pytest
import urllib3.exceptions
from botocore.exceptions import ClientError

from storage_backends import (
    ContainerNotFound,
    Corrupted,
    Forbidden,
    ObjectExists,
    ObjectNotFound,
    StorageError,
    StorageFull,
    Unavailable,
)
from storage_backends.s3.errors import RangePastEnd, UploadGone, translated


@pytest.mark.parametrize(
    ("status", "code", "error", "words"),
    [
        (404, "NoSuchKey", ObjectNotFound, "no such object"),
        (404, "404", ObjectNotFound, "not found"),
        (404, "NoSuchBucket", ContainerNotFound, "bucket"),
        (404, "NoSuchUpload", UploadGone, "gone"),
        (412, "PreconditionFailed", ObjectExists, "taken"),
        (412, "412", ObjectExists, "taken"),
        (409, "ConditionalRequestConflict", Unavailable, "another writer"),
        (416, "InvalidRange", RangePastEnd, "past"),
        (403, "InvalidAccessKeyId", Forbidden, "access key id is not known"),
        (403, "SignatureDoesNotMatch", Forbidden, "secret access key"),
        (400, "ExpiredToken", Forbidden, "expired"),
        (403, "AccessDenied", Forbidden, "not allowed"),
        (403, "403", Forbidden, "not allowed"),
        (401, "Unauthorized", Forbidden, "not accepted"),
        (403, "RequestTimeTooSkewed", Forbidden, "clock"),
        (400, "BadDigest", Corrupted, "digest"),
        (400, "XAmzContentChecksumMismatch", Corrupted, "digest"),
        (400, "XAmzContentSHA256Mismatch", Corrupted, "digest"),
        (507, "XMinioStorageFull", StorageFull, "full"),
        (403, "QuotaExceeded", StorageFull, "quota"),
        (507, "507", StorageFull, "full"),
        (503, "SlowDown", Unavailable, "busy"),
        (429, "TooManyRequests", Unavailable, "busy"),
        (500, "InternalError", Unavailable, "busy"),
        (502, "BadGateway", Unavailable, "busy"),
        (400, "RequestTimeout", Unavailable, "waited"),
        (301, "PermanentRedirect", StorageError, "region"),
        (400, "AuthorizationHeaderMalformed", StorageError, "region"),
        (501, "NotImplemented", StorageError, "cannot do"),
        (400, "InvalidArgument", StorageError, "refused"),
        (200, "", StorageError, "refused"),
    ],
)
def test_answers(status: int, code: str, error: type[StorageError], words: str) -> None:
    answer = {
        "Error": {"Code": code, "Message": "AWSAccessKeyId=AKIA StringToSign=hunter2"},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    with pytest.raises(StorageError, match=words) as caught, translated("storing a"):
        raise ClientError(answer, "PutObject")  # type: ignore[arg-type]
    assert type(caught.value) is error
    assert str(caught.value).startswith("storing a: ")
    assert "hunter2" not in str(caught.value)
    assert isinstance(caught.value.__cause__, ClientError)


URL = {"endpoint_url": "http://127.0.0.1:1"}


@pytest.mark.parametrize(
    ("vendor", "error"),
    [
        (said.NoCredentialsError(), Forbidden),
        (said.PartialCredentialsError(provider="env", cred_var="x"), Forbidden),
        (said.CredentialRetrievalError(provider="sso", error_msg="x"), Forbidden),
        (said.UnauthorizedSSOTokenError(), Forbidden),
        (said.EndpointConnectionError(**URL, error="refused"), Unavailable),
        (said.ConnectTimeoutError(**URL), Unavailable),
        (said.ReadTimeoutError(**URL), Unavailable),
        (said.ConnectionClosedError(**URL), Unavailable),
        (said.ProxyConnectionError(proxy_url="http://127.0.0.1:1"), Unavailable),
        (said.HTTPClientError(error="x"), Unavailable),
        (said.ResponseStreamingError(error="x"), Unavailable),
        (said.IncompleteReadError(actual_bytes=1, expected_bytes=2), Unavailable),
        (said.SSLError(**URL, error="EOF occurred"), Unavailable),
        (said.SSLError(**URL, error="[SSL: CERTIFICATE_VERIFY_FAILED]"), StorageError),
        (said.ParamValidationError(report="x"), StorageError),
        (urllib3.exceptions.ProtocolError("broken"), Unavailable),
        (urllib3.exceptions.IncompleteRead(1, 2), Unavailable),
        (http.client.IncompleteRead(b"x"), Unavailable),
        (ConnectionResetError(), Unavailable),
        (TimeoutError(), Unavailable),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value.__name__,
)
def test_libraries(vendor: Exception, error: type[StorageError]) -> None:
    with pytest.raises(StorageError) as caught, translated("reading a"):
        raise vendor
    assert type(caught.value) is error
    assert caught.value.__cause__ is vendor


def test_our_own_errors_and_bugs_pass() -> None:
    for ours in (Corrupted("x"), KeyError("x"), KeyboardInterrupt()):
        with pytest.raises(type(ours)) as caught, translated("reading a"):
            raise ours
        assert caught.value is ours
