"""age, as streams: everything arrives, every failure is told, and secrets are not quoted."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from daemon.bundle.encryption import (
    decrypting,
    encrypting,
    new_identity,
    parse_identities,
    parse_recipients,
)
from daemon.errors import ConfigError, MalformedBundle, RefusedError, UsageError, WrongIdentity
from storage_backends import Unavailable
from tests.property.honest import KeyPair, new_key_pair

CHUNK = 64 << 10  # age's own
CONTENT = os.urandom(300_000)


def encrypted(content: bytes, *recipients: Any) -> bytes:
    sink = io.BytesIO()
    with encrypting(sink, recipients) as stream:
        stream.write(content)
    return sink.getvalue()


def decrypted(data: bytes, *identities: Any) -> bytes:
    with decrypting(io.BytesIO(data), identities) as stream:
        return stream.read(-1)


def age(*arguments: str, stdin: bytes) -> bytes:
    return subprocess.run(["age", *arguments], input=stdin, check=True, capture_output=True).stdout


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 300_000])
def test_what_is_encrypted_comes_back(size: int, keys: KeyPair) -> None:
    data = encrypted(CONTENT[:size], *keys.recipients)
    assert decrypted(data, *keys.identities) == CONTENT[:size]
    assert CONTENT[:32] not in data


def test_each_of_several_recipients_opens_it(keys: KeyPair) -> None:
    other = new_key_pair()
    data = encrypted(CONTENT, *keys.recipients, *other.recipients)
    assert decrypted(data, *keys.identities) == decrypted(data, *other.identities) == CONTENT


def test_the_right_one_of_several_identities_is_found(keys: KeyPair) -> None:
    data = encrypted(CONTENT, *keys.recipients)
    assert decrypted(data, *new_key_pair().identities, *keys.identities) == CONTENT


def test_an_ssh_key_does_as_well() -> None:
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    data = encrypted(CONTENT, *parse_recipients([public]))
    assert decrypted(data, *parse_identities(secret)) == CONTENT


def test_the_age_tool_reads_what_we_write_and_we_what_it_writes(keys: KeyPair, tmp_path: Path) -> None:
    identity = tmp_path / "identity"
    identity.write_text(keys.identity + "\n")
    ours = encrypted(CONTENT, *keys.recipients)
    assert age("-d", "-i", str(identity), stdin=ours) == CONTENT
    assert decrypted(age("-r", keys.recipient, stdin=CONTENT), *keys.identities) == CONTENT


@pytest.fixture
def signals_all_the_time() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("signals_all_the_time")
def test_a_signal_in_the_middle_of_a_write_loses_no_byte(keys: KeyPair) -> None:
    """A write to a full pipe ends early when a signal arrives, and says how far it came."""
    content = CONTENT * 20
    sink = io.BytesIO()

    class Slow:
        def write(self, data: bytes, /) -> int:
            time.sleep(0.0002)  # lets the pipe fill up
            return sink.write(data)

    with encrypting(Slow(), keys.recipients) as stream:
        stream.write(content)
    assert decrypted(sink.getvalue(), *keys.identities) == content


# --- failures -------------------------------------------------------------------------------------


def test_no_recipients_is_no_encryption() -> None:
    with pytest.raises(RefusedError), encrypting(io.BytesIO(), []):
        pass


def test_another_identity_does_not_open_it(keys: KeyPair) -> None:
    with pytest.raises(WrongIdentity) as caught:
        decrypted(encrypted(CONTENT, *keys.recipients), *new_key_pair().identities)
    assert caught.value.exit_code == 65
    assert caught.value.hint


@pytest.mark.parametrize("size", [0, 100, 2 * CHUNK])
def test_a_cut_is_never_taken_for_the_end(size: int, keys: KeyPair) -> None:
    data = encrypted(CONTENT[:size], *keys.recipients)
    payload_at = data.index(b"\n---") + 4
    for length in [*range(0, payload_at + 70, 7), *range(payload_at + 70, len(data), 4099), len(data) - 1]:
        with pytest.raises(MalformedBundle):
            decrypted(data[:length], *keys.identities)


def test_a_cut_at_the_border_of_two_chunks_is_never_taken_for_the_end(keys: KeyPair) -> None:
    data = encrypted(CONTENT[: 2 * CHUNK], *keys.recipients)
    with pytest.raises(MalformedBundle):
        decrypted(data[: -CHUNK - 16], *keys.identities)


@pytest.mark.parametrize("extra", [b"\0", b"x" * 16, b"x" * (CHUNK + 16), bytes(3 * CHUNK)], ids=len)
def test_more_after_the_end_is_refused(extra: bytes, keys: KeyPair) -> None:
    for size in (10, CHUNK):
        with pytest.raises(MalformedBundle):
            decrypted(encrypted(CONTENT[:size], *keys.recipients) + extra, *keys.identities)


def test_what_the_sink_raises_comes_out_as_it_was(keys: KeyPair) -> None:
    class Full:
        def write(self, data: bytes, /) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def write_much() -> None:
        with encrypting(Full(), keys.recipients) as stream:
            for _ in range(100):
                stream.write(CONTENT)

    with pytest.raises(OSError, match="No space left") as caught:
        write_much()
    assert caught.value.errno == errno.ENOSPC


def test_what_the_source_raises_comes_out_as_it_was(keys: KeyPair) -> None:
    class Breaking(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 2 * CHUNK:
                raise Unavailable("the line went dead")
            return super().read(size)

    data = encrypted(CONTENT, *keys.recipients)
    with pytest.raises(Unavailable, match="went dead"), decrypting(Breaking(data), keys.identities) as stream:
        stream.read(-1)


def test_what_the_caller_raises_comes_out_as_it_was(keys: KeyPair) -> None:
    class Enough(Exception): ...

    def write() -> None:
        with encrypting(io.BytesIO(), keys.recipients) as stream:
            stream.write(CONTENT)
            raise Enough

    def read() -> None:
        with decrypting(io.BytesIO(encrypted(CONTENT, *keys.recipients)), keys.identities) as stream:
            stream.read(10)
            raise Enough

    for interrupted in (write, read):
        with pytest.raises(Enough):
            interrupted()


def test_whoever_has_read_enough_may_leave(keys: KeyPair) -> None:
    with decrypting(io.BytesIO(encrypted(CONTENT, *keys.recipients)), keys.identities) as stream:
        assert stream.read(10) == CONTENT[:10]


@pytest.mark.parametrize("failing", [False, True], ids=["read enough", "gave up"])
def test_nobody_reads_the_source_once_it_has_been_left(failing: bool, keys: KeyPair) -> None:
    """Else its caller, who goes on to hash the rest, would miss some of it."""
    data = encrypted(CONTENT * 10, *keys.recipients)
    left = threading.Event()
    read_too_late = threading.Event()

    class Watched(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            time.sleep(0.0005)
            if left.is_set():
                read_too_late.set()
            return super().read(size)

    for _ in range(10):
        left.clear()
        try:
            with decrypting(Watched(data), keys.identities) as stream:
                stream.read(1)
                if failing:
                    raise MalformedBundle("what was read makes no sense")
        except MalformedBundle:
            assert failing
        left.set()
        assert not [thread for thread in threading.enumerate() if thread.name == "age"]
    assert not read_too_late.is_set()


# --- keys -----------------------------------------------------------------------------------------


def test_a_new_pair_belongs_together() -> None:
    identity, recipient = new_identity()
    assert identity.startswith("AGE-SECRET-KEY-1")
    assert recipient.startswith("age1")
    data = encrypted(b"x", *parse_recipients([recipient]))
    assert decrypted(data, *parse_identities(identity.encode())) == b"x"


def test_an_identity_file_may_hold_comments_and_several(keys: KeyPair) -> None:
    other, _ = new_identity()
    text = f"# created: today\r\n# public key: {keys.recipient}\n\n  {other}  \n{keys.identity}"
    assert decrypted(encrypted(b"x", *keys.recipients), *parse_identities(text.encode())) == b"x"


NO_IDENTITIES = {
    "nothing": "",
    "a comment": "# only a comment\n",
    "text": "hunter2",
    "a letter more": "{identity}x",
    "a bad line": "{identity}\nhunter2",
    "a recipient": "{recipient}",
    "a broken ssh key": "-----BEGIN hunter2",
}


@pytest.mark.parametrize("text", NO_IDENTITIES.values(), ids=NO_IDENTITIES.keys())
def test_what_is_no_identity_is_refused_without_a_word_of_it(text: str, keys: KeyPair) -> None:
    data = text.format(identity=keys.identity, recipient=keys.recipient).encode()
    with pytest.raises(UsageError) as caught:
        parse_identities(data)
    assert "hunter2" not in f"{caught.value} {caught.value.hint}"
    assert keys.identity[16:] not in f"{caught.value} {caught.value.hint}"


def test_a_huge_identity_file_is_refused(keys: KeyPair) -> None:
    with pytest.raises(UsageError, match="too large"):
        parse_identities(keys.identity.encode() + b"\n#" + b" " * (1 << 20))


@pytest.mark.parametrize(
    "text", ["", "age1", "age1qqqq", "ssh-ed25519", "ssh-rsa AAAA", "AGE1X", "somebody@example.org"]
)
def test_what_is_no_recipient_is_a_mistake_in_the_configuration(text: str, keys: KeyPair) -> None:
    with pytest.raises(ConfigError, match="not an age recipient") as caught:
        parse_recipients([keys.recipient, text])
    assert caught.value.exit_code == 78
    assert "age1" in caught.value.hint


def test_an_identity_in_the_place_of_a_recipient_is_not_quoted(keys: KeyPair) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipients([keys.identity])
    assert keys.identity[16:] not in f"{caught.value} {caught.value.hint}"
