"""A small S3 server in this process that behaves as badly as it is told to.

Shows what no honest server can: overwriting on `If-None-Match`, bytes damaged on arrival, bodies that
end early, bad moments. Knows just the requests that the `s3` backend makes; checks no signatures.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

BUCKET = "crooked"
_STARTED = datetime.now(UTC)  # nothing here is older, or looks younger


@dataclass
class Behaviour:
    """honours_if_none_match, verifies_sha256, verifies_md5: as good servers do
    damages: what arrives under a key with this in it is kept with one byte changed
    serves_at_most_bytes: of any body, whatever its Content-Length said
    bad_moments: (what the request line must contain, status, code), each used up by one request
    plain_etags: ETags are the MD5
    """

    honours_if_none_match: bool = False
    verifies_sha256: bool = False
    verifies_md5: bool = False
    plain_etags: bool = True
    ignores_ranges: bool = False
    damages: str | None = None
    serves_at_most_bytes: int | None = None
    bad_moments: list[tuple[str, int, str]] = field(default_factory=list)


@dataclass
class CrookedS3:
    endpoint_url: str
    behaviour: Behaviour
    requests: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def options(self) -> dict[str, str]:
        return {
            "endpoint_url": self.endpoint_url,
            "addressing_style": "path",
            "access_key_id": "AKCROOKED",
            "secret_access_key": "crooked-secret",
            "part_size_bytes": str(5 << 20),
        }

    def etag(self, data: bytes) -> str:
        digest = hashlib.md5(data).hexdigest()
        return digest if self.behaviour.plain_etags else digest[::-1] + "z"


@contextlib.contextmanager
def running_crooked_s3(behaviour: Behaviour | None = None) -> Iterator[CrookedS3]:
    http_server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server = CrookedS3(f"http://127.0.0.1:{http_server.server_port}", behaviour or Behaviour())
    http_server.crooked = server  # type: ignore[attr-defined]
    http_server.daemon_threads = True
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http_server.shutdown()
        thread.join()
        http_server.server_close()


class _Refusal(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status = status
        self.code = code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    @property
    def s3(self) -> CrookedS3:
        return self.server.crooked  # type: ignore[attr-defined, no-any-return]

    def log_message(self, *_args: object) -> None:
        """Requests are kept, not printed."""

    def handle_expect_100(self) -> bool:
        proceed = super().handle_expect_100()
        self.wfile.flush()  # the client waits for it
        return proceed

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        bucket, _slash, key = unquote(parts.path).lstrip("/").partition("/")
        self.s3.requests.append(f"{self.command} {self.path}")
        try:
            self._have_a_bad_moment()
            if bucket != BUCKET:
                raise _Refusal(404, "NoSuchBucket")
            answer = self._answer_for(query, key)
            with self.s3.lock:
                answer(key, query, body)
        except _Refusal as refusal:
            self._send(refusal.status, f"<Error><Code>{refusal.code}</Code></Error>".encode())
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _handle  # noqa: N815

    def _answer_for(self, query: dict[str, str], key: str) -> Callable[[str, dict[str, str], bytes], None]:
        kind = "bucket" if not key else "upload" if "uploadId" in query else "object"
        if "uploads" in query:
            kind = "uploads"
        name = f"_{kind}_{self.command.lower()}"
        answer: Callable[[str, dict[str, str], bytes], None] | None = getattr(self, name, None)
        if answer is None or "versioning" in query or "object-lock" in query:
            raise _Refusal(501, "NotImplemented")
        return answer

    def _have_a_bad_moment(self) -> None:
        line = f"{self.command} {self.path}"
        for moment in self.s3.behaviour.bad_moments:
            text, status, code = moment
            if text in line:
                self.s3.behaviour.bad_moments.remove(moment)
                raise _Refusal(status, code)

    def _received(self, key: str, body: bytes) -> bytes:
        """What is kept of a body, after the checks that this server makes."""
        behaviour = self.s3.behaviour
        if behaviour.damages is not None and behaviour.damages in key and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        checks = [
            (behaviour.verifies_sha256, "x-amz-checksum-sha256", hashlib.sha256),
            (behaviour.verifies_md5, "Content-MD5", hashlib.md5),
        ]
        for verifies, header, algorithm in checks:
            announced = self.headers.get(header)
            if verifies and announced and base64.b64decode(announced) != algorithm(body).digest():
                raise _Refusal(400, "BadDigest")
        return body

    def _refuse_taken(self, key: str) -> None:
        conditional = self.headers.get("If-None-Match") == "*" and self.s3.behaviour.honours_if_none_match
        if conditional and key in self.s3.objects:
            raise _Refusal(412, "PreconditionFailed")

    def _object_put(self, key: str, _query: dict[str, str], body: bytes) -> None:
        self._refuse_taken(key)
        self.s3.objects[key] = self._received(key, body)
        self._send(200, b"", ETag=f'"{self.s3.etag(self.s3.objects[key])}"')

    def _object_get(self, key: str, _query: dict[str, str], _body: bytes) -> None:
        if key not in self.s3.objects:
            raise _Refusal(404, "NoSuchKey")
        data = self.s3.objects[key]
        headers = {"ETag": f'"{self.s3.etag(data)}"', "Last-Modified": format_datetime(_STARTED, usegmt=True)}
        wanted = self.headers.get("Range")
        if not wanted or self.s3.behaviour.ignores_ranges:
            self._send(200, data, **headers)
            return
        first, _dash, last = wanted.removeprefix("bytes=").partition("-")
        if int(first) >= len(data):
            raise _Refusal(416, "InvalidRange")
        end = min(int(last) + 1 if last else len(data), len(data))
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
        self._send(206, data[int(first) : end], **headers)

    _object_head = _object_get

    def _object_delete(self, key: str, _query: dict[str, str], _body: bytes) -> None:
        self.s3.objects.pop(key, None)
        self._send(204, b"")

    def _bucket_get(self, _key: str, query: dict[str, str], _body: bytes) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token", query.get("start-after", ""))
        names: dict[str, bool] = {}
        for key in sorted(self.s3.objects):
            if key.startswith(prefix):
                position = key.find("/", len(prefix)) if delimiter else -1
                name = key[: position + 1] if position >= 0 else key
                # What comes after a directory in a page's order comes after all that is in it.
                if name > after or (position >= 0 and after.startswith(name) and after != name):
                    names[name] = position < 0
        page = list(names)[: int(query.get("max-keys", "1000"))]
        entries = [_entry(name, self.s3.objects[name]) if names[name] else _directory(name) for name in page]
        if len(page) < len(names):
            entries += [
                "<IsTruncated>true</IsTruncated>",
                f"<NextContinuationToken>{page[-1]}</NextContinuationToken>",
            ]
        self._send(200, f"<ListBucketResult>{''.join(entries)}</ListBucketResult>".encode())

    def _uploads_post(self, _key: str, _query: dict[str, str], _body: bytes) -> None:
        upload_id = uuid.uuid4().hex
        self.s3.uploads[upload_id] = {}
        self._send(200, f"<R><UploadId>{upload_id}</UploadId></R>".encode())

    def _upload(self, query: dict[str, str]) -> dict[int, bytes]:
        try:
            return self.s3.uploads[query["uploadId"]]
        except KeyError:
            raise _Refusal(404, "NoSuchUpload") from None

    def _upload_put(self, key: str, query: dict[str, str], body: bytes) -> None:
        data = self._received(key, body)
        self._upload(query)[int(query["partNumber"])] = data
        self._send(200, b"", ETag=f'"{self.s3.etag(data)}"')

    def _upload_get(self, _key: str, query: dict[str, str], _body: bytes) -> None:
        parts = "".join(
            f"<Part><PartNumber>{number}</PartNumber><Size>{len(data)}</Size>"
            f"<ETag>{self.s3.etag(data)}</ETag></Part>"
            for number, data in sorted(self._upload(query).items())
        )
        self._send(200, f"<ListPartsResult>{parts}</ListPartsResult>".encode())

    def _upload_post(self, key: str, query: dict[str, str], body: bytes) -> None:
        upload = self._upload(query)
        self._refuse_taken(key)
        listed = [
            int(element.text or 0)
            for element in ElementTree.fromstring(body).iter()
            if element.tag.endswith("PartNumber")
        ]
        self.s3.objects[key] = b"".join(upload[number] for number in listed)
        del self.s3.uploads[query["uploadId"]]
        self._send(200, b"<R><ETag>done</ETag></R>")

    def _upload_delete(self, _key: str, query: dict[str, str], _body: bytes) -> None:
        self._upload(query)
        del self.s3.uploads[query["uploadId"]]
        self._send(204, b"")

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            most = self.s3.behaviour.serves_at_most_bytes
            self.wfile.write(body if most is None else body[:most])
            if most is not None and most < len(body):
                self.close_connection = True


def _entry(key: str, data: bytes) -> str:
    return (
        f"<Contents><Key>{escape(key)}</Key><Size>{len(data)}</Size>"
        f"<LastModified>{_STARTED:%Y-%m-%dT%H:%M:%S.000Z}</LastModified></Contents>"
    )


def _directory(name: str) -> str:
    return f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
