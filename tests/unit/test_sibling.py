"""The sibling: one spelling, that of `sha256sum`, and no other."""

from __future__ import annotations

import hashlib
import io
import subprocess
from pathlib import Path

import pytest

from daemon.bundle.sibling import MAX_SIBLING_BYTES, HashingReader, HashingSink, parse_sibling, sibling_bytes
from daemon.errors import SiblingMismatch

DIGEST = hashlib.sha256(b"content").hexdigest()
NAME = "019ab1b5-7e00-7abc-8def-0123456789ab.tar.zst"
SPELLED = f"{DIGEST}  {NAME}\n".encode()


def test_the_one_spelling_is_that_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"content")
    by_tool = subprocess.run(["sha256sum", NAME], cwd=tmp_path, check=True, capture_output=True).stdout
    assert sibling_bytes(DIGEST, NAME) == SPELLED == by_tool


def test_sha256sum_checks_it(tmp_path: Path) -> None:
    (tmp_path / "x.sha256").write_bytes(sibling_bytes(DIGEST, NAME))
    (tmp_path / NAME).write_bytes(b"content")
    check = ["sha256sum", "--check", "--strict", "x.sha256"]
    assert subprocess.run(check, cwd=tmp_path, check=False).returncode == 0
    (tmp_path / NAME).write_bytes(b"Content")
    assert subprocess.run(check, cwd=tmp_path, check=False, capture_output=True).returncode == 1


def test_it_is_read_back() -> None:
    assert parse_sibling(SPELLED) == DIGEST


SPELLINGS = {
    "nothing": b"",
    "the digest alone": DIGEST.encode(),
    "the digest and a newline": DIGEST.encode() + b"\n",
    "no newline": SPELLED[:-1],
    "two newlines": SPELLED + b"\n",
    "CRLF": SPELLED[:-1] + b"\r\n",
    "one space": SPELLED.replace(b"  ", b" "),
    "three spaces": SPELLED.replace(b"  ", b"   "),
    "a tab": SPELLED.replace(b"  ", b"\t"),
    "binary mode": SPELLED.replace(b"  ", b" *"),
    "capitals": SPELLED[:64].upper() + SPELLED[64:],
    "a digit less": SPELLED[1:],
    "a digit more": b"0" + SPELLED,
    "another digest": b"g" + SPELLED[1:],
    "space in front": b" " + SPELLED,
    "a byte order mark": b"\xef\xbb\xbf" + SPELLED,
    "an escaped line": b"\\" + SPELLED,
    "the BSD form": f"SHA256 ({NAME}) = {DIGEST}\n".encode(),
    "a path": SPELLED.replace(NAME.encode(), b"../" + NAME.encode()),
    "a name with a space": SPELLED.replace(NAME.encode(), b"a b.tar.zst"),
    "a name that is not ASCII": SPELLED.replace(NAME.encode(), "é.tar.zst".encode()),
    "no name": f"{DIGEST}  \n".encode(),
    "two lines": SPELLED * 2,
    "a comment": b"# made by somebody\n" + SPELLED,
    "a NUL": SPELLED[:-1] + b"\0\n",
    "UTF-16": SPELLED.decode().encode("utf-16"),
    "more than any sibling has": SPELLED[:-1] + b"x" * MAX_SIBLING_BYTES + b"\n",
}


@pytest.mark.parametrize("data", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_no_other_spelling_is_accepted(data: bytes) -> None:
    with pytest.raises(SiblingMismatch) as caught:
        parse_sibling(data)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("name", ["", "a b", "a/b", "new\nline", "back\\slash", "é.tar.zst", "x" * 201])
def test_a_name_that_sha256sum_would_escape_is_not_written(name: str) -> None:
    with pytest.raises(ValueError, match="not a file name"):
        sibling_bytes(DIGEST, name)


def test_a_reader_knows_the_digest_of_everything_whoever_read_it() -> None:
    told: list[int] = []
    with HashingReader(io.BytesIO(b"content"), progress=told.append) as reader:
        assert reader.read(3) == b"con"
        assert reader.finish() == DIGEST
        assert reader.size_bytes == 7
    assert told[0] == 3
    assert told[-1] == 7


def test_a_sink_knows_the_digest_of_what_it_passed_on() -> None:
    target = io.BytesIO()
    sink = HashingSink(target)
    sink.write(b"con")
    sink.write(b"tent")
    assert (target.getvalue(), sink.sha256, sink.size_bytes) == (b"content", DIGEST, 7)
