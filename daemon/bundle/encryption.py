"""Encryption with age: streams in, streams out. The only module that touches pyrage.

The host holds recipients (public keys). Identities come from a file or stdin, for one call.
pyrage pulls from a reader and pushes to a writer, so it runs on a thread of its own behind a pipe.

Source: the age file format, https://age-encryption.org/v1.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

import pyrage

from daemon.bundle.frames import Sink
from daemon.errors import ConfigError, MalformedBundle, RefusedError, UsageError, WrongIdentity

_MAX_IDENTITY_BYTES = 1 << 20


def parse_recipients(texts: Sequence[str]) -> list[Any]:
    """Public keys, `age1...` or `ssh-ed25519 ...`/`ssh-rsa ...`. Raises ConfigError for the first bad one."""
    parsed: list[Any] = []
    for text in texts:
        kind = pyrage.ssh.Recipient if text.startswith("ssh-") else pyrage.x25519.Recipient
        try:
            parsed.append(kind.from_str(text))
        except pyrage.RecipientError as exc:
            raise ConfigError(
                f"not an age recipient: {text[:16]}… ({exc})",
                hint="a recipient is a public key: `age1...`, as `agentkeep keygen` prints it, or an ssh key",
            ) from exc
    return parsed


def parse_identities(data: bytes) -> list[Any]:
    """Secret keys of an identity file: `AGE-SECRET-KEY-1...` lines and comments, or an OpenSSH private key.

    Raises UsageError, which names no byte of the file.
    """
    if len(data) > _MAX_IDENTITY_BYTES:
        raise UsageError("the identity file is far too large to be one")
    text = data.decode("utf-8", "replace")
    try:
        if text.startswith("-----BEGIN"):
            return [pyrage.ssh.Identity.from_buffer(data)]
        lines = [line.strip() for line in text.splitlines()]
        identities = [pyrage.x25519.Identity.from_str(line) for line in lines if line and line[0] != "#"]
    except pyrage.IdentityError:
        identities = []
    if not identities:
        raise UsageError(
            "the identity file holds no age identity",
            hint="it has a line AGE-SECRET-KEY-1..., as `agentkeep keygen` or `age-keygen` writes it",
        )
    return identities


def new_identity() -> tuple[str, str]:
    """A new key pair: the identity (secret) and its recipient (public)."""
    identity = pyrage.x25519.Identity.generate()
    return str(identity), str(identity.to_public())


@contextmanager
def encrypting(sink: Sink, recipients: Sequence[Any]) -> Iterator[Sink]:
    """A stream whose bytes reach `sink` encrypted; whole once the block is left without an error."""
    if not recipients:
        raise RefusedError("encryption without a recipient would be none", hint="configure recipients")
    read_end, write_end = _pipe()
    target = _Remembering(sink)

    def encrypt() -> None:
        try:
            pyrage.encrypt_io(read_end, target, list(recipients))
        except Exception as exc:  # pyrage makes an error of its own of the sink's
            raise target.error or exc from exc

    work = _Worker(encrypt, read_end)
    with write_end:
        try:
            yield _WholeWrites(write_end)
        except BrokenPipeError:
            work.join()  # says why nobody reads any more
            raise
        except BaseException:
            work.abandon(write_end)
            raise
    work.join()


@contextmanager
def decrypting(stream: Any, identities: Sequence[Any]) -> Iterator[BinaryIO]:
    """The plain bytes of an age stream. Reading raises WrongIdentity or MalformedBundle."""
    read_end, write_end = _pipe()
    source, target = _Remembering(stream), _Remembering(write_end)

    def decrypt() -> None:
        try:
            pyrage.decrypt_io(source, target, list(identities))
        except (pyrage.DecryptError, OSError) as exc:
            raise source.error or target.error or _explain(exc) from exc

    work = _Worker(decrypt, write_end)
    try:
        with read_end:
            yield _CheckedReader(read_end, work)  # type: ignore[misc]
    except BaseException:
        work.wait()  # nobody but the caller reads `stream` once this is left
        raise
    work.join(ignoring=BrokenPipeError)


def _explain(exc: Exception) -> Exception:
    if "No matching keys" in str(exc):
        return WrongIdentity(
            "none of the given identities opens this bundle",
            hint="it was encrypted to another recipient: try the identity that was current when it was made",
        )
    return MalformedBundle(f"the encrypted bundle is damaged or truncated: {exc}")


def _pipe() -> tuple[BinaryIO, BinaryIO]:
    read_end, write_end = os.pipe()
    return os.fdopen(read_end, "rb", buffering=1 << 20), os.fdopen(write_end, "wb", buffering=0)


class _Worker:
    """A call on a thread, which closes its end of the pipe when it is done and keeps its error for `join`."""

    def __init__(self, call: Callable[[], None], end: BinaryIO) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call, end), name="age", daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], None], end: BinaryIO) -> None:
        try:
            call()
        except BaseException as exc:  # noqa: BLE001  handed to whoever joins
            self._error = exc
        finally:
            with suppress(OSError):
                end.close()

    def wait(self) -> None:
        self._thread.join()

    def join(self, *, ignoring: type[BaseException] | None = None) -> None:
        self._thread.join()
        if self._error is not None and not (ignoring and isinstance(self._error, ignoring)):
            raise self._error

    def abandon(self, end: BinaryIO) -> None:
        """The caller failed: the thread is let run out, its result is of no interest."""
        with suppress(OSError):
            end.close()
        self._thread.join()


class _WholeWrites:
    """Writes all it is given: a write to a bare pipe may end early when a signal arrives."""

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe

    def write(self, data: bytes, /) -> int:
        view = memoryview(data)
        while view:
            view = view[self._pipe.write(view) :]
        return len(data)


class _Remembering:
    """A stream that keeps the error it raised, since pyrage turns it into text on the way."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: BaseException | None = None

    def read(self, size_bytes: int = -1, /) -> Any:
        return self._remember(self._stream.read, size_bytes)

    def write(self, data: bytes, /) -> Any:
        return self._remember(self._stream.write, data)

    def flush(self) -> None:
        """Nothing is held back here."""

    def _remember(self, call: Callable[[Any], Any], argument: Any) -> Any:
        try:
            return call(argument)
        except BaseException as exc:
            self.error = exc
            raise


class _CheckedReader:
    """Reads a pipe; at its end raises what the writing thread raised, so that no error looks like an end."""

    def __init__(self, stream: BinaryIO, work: _Worker) -> None:
        self._stream = stream
        self._work = work

    def read(self, size_bytes: int = -1, /) -> bytes:
        data = self._stream.read(size_bytes)
        if len(data) < size_bytes or size_bytes < 0:
            self._work.join()
        return data
