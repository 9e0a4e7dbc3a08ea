"""Staging: private copies of plain files, each provably the bytes that the file had at one instant.

Copies are made ahead of the cut's window, which is the slow part; `refresh` then brings only what moved
up to date. A log that only grew has only its new tail copied. What is written to all the time cannot be
proven by its signature: it is read until two readings in a row are equal (`settle`). Nothing is written
outside the scratch directory, and no access time is moved.

Must not: open a SQLite database (scan.py says why).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from daemon.capture.scan import Signature, open_quietly
from daemon.model import Failure

_APPEND_ONLY = (".jsonl", ".ndjson", ".log")
_JSON_LINES = (".jsonl", ".ndjson")
_COPY_BYTES = 1 << 20
_COMPARED_BYTES = 64 << 10
_LIVE_LOG_NS = 600_000_000_000
_MAX_LINE_BYTES = 16 << 20
_FICLONE = 0x40049409  # linux/fs.h; not in fcntl
_SETTLE_SECONDS = 2.5
_SETTLE_PAUSE_SECONDS = 0.002
_MAX_JSON_BYTES = 16 << 20
_BEING_REWRITTEN_NS = 2_000_000_000
_OUR_SIDE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE)
_TICK_NS = 12_000_000
_COARSE_TICK_NS = 2_100_000_000


@dataclass(slots=True)
class StagedFile:
    """is_proven: the bytes were read twice, equal, around the reading of the signature"""

    copy: Path
    signature: Signature
    staged_at_ns: int
    is_proven: bool = False


class Staging:
    """The staged copies of one agent, by path relative to its root (or absolute, outside of it)."""

    def __init__(self, root: Path, directory: Path) -> None:
        self._root = root
        self._directory = directory
        self._serial = 0
        self.files: dict[str, StagedFile] = {}
        self.failures: dict[str, Failure] = {}

    def refresh(self, wanted: dict[str, Signature]) -> None:
        """Make the copies those of `wanted`: new and changed files copied, vanished ones dropped.

        A file that changes while it is copied is left for the next reading to find. Raises OSError only
        for what goes wrong on our own side (no space in scratch); what cannot be read is in `failures`.
        """
        for path in [path for path in self.files if path not in wanted]:
            self._drop(path)
        for path in [path for path in self.failures if path not in wanted]:
            del self.failures[path]
        self.update(wanted)

    def update(self, wanted: dict[str, Signature]) -> None:
        """As `refresh`, and whatever `wanted` does not name stays as it is."""
        for path, signature in wanted.items():
            if self.is_current(path, signature):
                continue
            self.failures.pop(path, None)
            source = self._root / path
            try:
                with open_quietly(source) as descriptor:
                    self._stage(path, descriptor)
            except FileNotFoundError:
                continue  # the next reading finds it gone
            except OSError as exc:
                if exc.errno in _OUR_SIDE:
                    raise
                self.failures[path] = Failure(
                    source=str(source),
                    reason=f"cannot be read: {exc.strerror}",
                    hint="run agentkeep as the user who owns the agent's files, or exclude this one",
                )

    def is_current(self, path: str, signature: Signature) -> bool:
        """Whether the copy is provably what has this signature."""
        staged = self.files.get(path)
        return (
            staged is not None
            and staged.signature == signature
            and (staged.is_proven or not is_fresh(path, signature, read_at_ns=staged.staged_at_ns))
        )

    def put(self, path: str, signature: Signature, content: bytes) -> None:
        """Keep what was read of a small file, twice and equal, as its copy. Raises OSError (no space)."""
        if self.is_current(path, signature):
            return
        self._serial += 1
        copy = self._directory / f"{self._serial:08d}"
        copy.write_bytes(content)
        self._keep(path, StagedFile(copy, signature, time.time_ns(), is_proven=True))

    def cut_log(self, path: str, signature: Signature) -> bool:
        """Make the copy of a log that grows what it was when it had this signature: its first bytes, all of
        which are still there. False if it is another file by now, shorter, or rewritten.
        """
        staged = self.files.get(path)
        if staged is None or staged.signature.identity != signature.identity:
            return False
        if staged.signature.size_bytes == signature.size_bytes:
            return staged.signature == signature
        try:
            with open_quietly(self._root / path) as source:
                now = Signature.of(os.fstat(source))
                if now.identity != signature.identity or now.size_bytes < signature.size_bytes:
                    return False
                if not _only_grew(path, staged, signature, source):
                    return False
                with staged.copy.open("r+b") as stream:
                    grown = (staged.signature.size_bytes, signature.size_bytes)
                    is_whole = _copy(source, stream.fileno(), offset=grown[0], end=grown[1])
        except OSError as exc:
            if exc.errno in _OUR_SIDE:
                raise
            return False
        if is_whole:
            self.files[path] = StagedFile(staged.copy, signature, staged.staged_at_ns)
        else:  # truncated under us: nothing may be built on this copy
            self._drop(path)
        return is_whole

    def settle(self, paths: Iterable[str]) -> None:
        """Give files that never held still for their signature a copy that is one state all the same: two
        readings in a row are equal, its absence being one. What does not come to that is in `failures`, and
        its copy is dropped.
        """
        for path in paths:
            deadline = time.monotonic() + _SETTLE_SECONDS
            previous, digest = None, self._restage(path)
            while digest is None or digest != previous or self.is_half_written(path):
                if path in self.failures:
                    break
                if time.monotonic() > deadline:
                    if digest is None or digest != previous:
                        self._give_up(path)
                    break
                time.sleep(_SETTLE_PAUSE_SECONDS)
                previous, digest = digest, self._restage(path)

    def _give_up(self, path: str) -> None:
        self._drop(path)
        self.failures[path] = Failure(
            source=str(self._root / path),
            reason=f"rewritten so steadily that no whole copy was had in {_SETTLE_SECONDS:.0f} s",
            hint="hold the agent still with `before` and `after` commands, or exclude the file",
        )

    def _restage(self, path: str) -> str | None:
        """Copy a file anew, whatever its signature; a digest of the copy, "" if there is no file, None if it
        was cut short meanwhile."""
        self._drop(path)
        self.update(signatures(self._root, [path]))
        staged = self.files.get(path)
        if staged is None:
            return None if os.path.lexists(self._root / path) else ""
        with staged.copy.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def is_half_written(self, path: str) -> bool:
        """Whether a JSON file that was written to just now does not parse: its writer is not done."""
        staged = self.files.get(path)
        if staged is None or not path.endswith(".json"):
            return False
        is_young = staged.signature.ctime_ns > staged.staged_at_ns - _BEING_REWRITTEN_NS
        if not is_young or staged.signature.size_bytes > _MAX_JSON_BYTES:
            return False
        return not _is_json(staged.copy.read_bytes())

    def _keep(self, path: str, staged: StagedFile) -> None:
        self._drop(path)
        self.files[path] = staged

    def _drop(self, path: str) -> None:
        if (staged := self.files.pop(path, None)) is not None:
            staged.copy.unlink()

    def _stage(self, path: str, source: int) -> None:
        started_ns = time.time_ns()
        before = Signature.of(os.fstat(source))
        staged = self.files.get(path)
        if staged is not None and _only_grew(path, staged, before, source):
            target, offset = staged.copy, staged.signature.size_bytes
        else:
            self._serial += 1
            target, offset = self._directory / f"{self._serial:08d}", 0
        with target.open("r+b" if offset else "wb") as stream:
            is_whole = _copy(source, stream.fileno(), offset=offset, end=before.size_bytes)
        if staged is not None and staged.copy == target:
            del self.files[path]
        self._keep(path, StagedFile(target, before, started_ns))
        if not is_whole:  # truncated under us: nothing may be built on this copy
            self._drop(path)


def is_append_only(path: str) -> bool:
    return path.endswith(_APPEND_ONLY)


def is_fresh(path: str, signature: Signature, *, read_at_ns: int) -> bool:
    """Whether the file changed so shortly before it was read that another change could hide in the same
    tick of the file system's clock (git calls such an entry "racily clean"). An append shows in the size.
    """
    if is_append_only(path):
        return False
    whole_seconds = signature.mtime_ns % 1_000_000_000 == 0 and signature.ctime_ns % 1_000_000_000 == 0
    tick_ns = _COARSE_TICK_NS if whole_seconds else _TICK_NS
    changed_ns = max(signature.mtime_ns, signature.ctime_ns)
    # A time far in the future is a wrong clock or a planted mtime: ctime alone decides then. If that is far
    # in the future too, the clock went back, and whatever changes now gets another ctime.
    if signature.mtime_ns > read_at_ns + _COARSE_TICK_NS:
        changed_ns = signature.ctime_ns
    return read_at_ns - tick_ns < changed_ns <= read_at_ns + _COARSE_TICK_NS


def _only_grew(path: str, staged: StagedFile, now: Signature, source: int) -> bool:
    """Whether a log is what was staged and more: a longer file that begins otherwise, or is another where
    the copy ends, was rewritten."""
    old_bytes = staged.signature.size_bytes
    if not is_append_only(path) or staged.signature.identity != now.identity:
        return False
    if old_bytes >= now.size_bytes:
        return False
    with staged.copy.open("rb") as copy:
        return all(
            os.pread(source, _COMPARED_BYTES, start)[: old_bytes - start]
            == os.pread(copy.fileno(), _COMPARED_BYTES, start)[: old_bytes - start]
            for start in (0, max(0, old_bytes - _COMPARED_BYTES))
        )


def _copy(source: int, target: int, *, offset: int, end: int) -> bool:
    """Copy bytes [offset, end), by reflink where the file system can, else by reading, holes left as holes;
    whether all of them were there."""
    if offset == 0 and end:
        with contextlib.suppress(OSError):  # not supported here: the ordinary way follows
            fcntl.ioctl(target, _FICLONE, source)
            is_whole = os.fstat(target).st_size >= end
            os.ftruncate(target, end)
            return is_whole
    for start, stop in _extents(source, offset, end):
        while start < stop:
            chunk = os.pread(source, min(_COPY_BYTES, stop - start), start)
            if not chunk:
                return False
            start += _write_at(target, chunk, start)
    is_whole = os.fstat(source).st_size >= end
    os.ftruncate(target, end)
    return is_whole


def _extents(source: int, offset: int, end: int) -> Iterator[tuple[int, int]]:
    """What of [offset, end) is data and no hole, as far as the file system tells (lseek(2), SEEK_DATA)."""
    while offset < end:
        try:
            start = os.lseek(source, offset, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # nothing but a hole from here
                return
            raise
        try:
            offset = os.lseek(source, start, os.SEEK_HOLE)
        except OSError as exc:
            if exc.errno != errno.ENXIO:
                raise
            offset = end  # cut short just now: reading finds that out
        yield start, min(offset, end)


def _write_at(descriptor: int, data: bytes, offset: int) -> int:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
    return len(data)


def whole_lines_bytes(path: str, staged: StagedFile) -> int:
    """How many bytes of a staged log are whole lines. JSON Lines that are being written to are cut at the
    last newline, unless what follows it is a whole JSON value; every other file is taken as it is."""
    copy = staged.copy
    size_bytes = copy.stat().st_size
    is_being_written = staged.signature.ctime_ns > staged.staged_at_ns - _LIVE_LOG_NS
    if not path.endswith(_JSON_LINES) or size_bytes == 0 or not is_being_written:
        return size_bytes
    with copy.open("rb") as stream:
        tail_start = max(0, size_bytes - _MAX_LINE_BYTES)
        stream.seek(tail_start)
        tail = stream.read()
    last_newline = tail.rfind(b"\n")
    if last_newline < 0 and tail_start > 0:
        return size_bytes  # one line of 16 MiB and more: not a log of lines
    rest = tail[last_newline + 1 :]
    if not rest or b"\0" in tail or _is_json(rest):
        return size_bytes
    return tail_start + last_newline + 1


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def signatures(root: Path, paths: Iterable[str]) -> dict[str, Signature]:
    """What stat says of each path that is there."""
    found = {}
    for path in paths:
        try:
            found[path] = Signature.of((root / path).lstat())
        except OSError:
            continue  # not there, or not for us: what is missing is named by its failure
    return found
