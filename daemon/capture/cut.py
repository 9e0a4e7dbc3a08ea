"""The cut: everything an agent consists of, as of one instant, and an honest record of how far that holds.

    run `before`                  the agent's own way to hold still, if it has one
    find sources, stage files     slow, ahead, repeated only for what moved
    ── window opens ──────────    milliseconds
    read everything *before*      data_version of each database, refs and HEAD, hot files
    pin every database            BEGIN and a read: their state is ours from here
    read the lengths of logs      twice: equal ones are those of one instant
    read everything *after*
    ── window closes ─────────
    copy what keeps its writer    databases without WAL
    look at all files once more   each has to be as it was staged
    copy what is pinned, let go
    run `after`

Every before-reading precedes every after-reading (a file that is not hot was first read when it was
staged, and last after the window), and the instant of the logs' lengths lies between them. So if all are
equal, nothing but the logs moved meanwhile, and that instant is the cut. If something moved, or changed so
shortly before its reading that a second change could hide in the same clock tick, everything is let go and
tried again, a few times; then the last attempt is kept as `per_source` and says what moved.

Crash model: nothing here outlives the process but files in the caller's scratch directory.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from daemon.capture.collect import Capture, collect
from daemon.capture.copies import CopyOptions, DatabaseCopies
from daemon.capture.freeze import Frozen
from daemon.capture.sources import OpenSources
from daemon.errors import AgentNotFound, NotOneInstant
from daemon.model import AgentSpec, Consistency


@dataclasses.dataclass(frozen=True, slots=True)
class CutOptions:
    attempts: int = 8
    backoff_seconds: float = 0.02
    copies: CopyOptions = dataclasses.field(default_factory=CopyOptions)


def take_cut(spec: AgentSpec, scratch: Path, *, options: CutOptions | None = None) -> Capture:
    """Capture an agent into `scratch`, an empty private directory. Raises as `take_cut_unless`."""
    capture = take_cut_unless(None, spec, scratch, options=options)
    assert capture is not None
    return capture


def take_cut_unless(
    is_known: Callable[[str], bool] | None,
    spec: AgentSpec,
    scratch: Path,
    *,
    options: CutOptions | None = None,
) -> Capture | None:
    """Capture an agent into `scratch`, an empty private directory; None if its fingerprint is a known one, of
    an earlier capture that would be no different. To tell takes milliseconds, however large the agent is.

    Raises AgentNotFound (nothing where the agent should live), NotOneInstant (and `spec` wants no less),
    RefusedError (larger than `spec` allows) and OSError (our own side: scratch is full). Whatever cannot be
    captured is in the result's `failures`, its raw bytes among the artifacts where they can be read.
    """
    require_root(spec)
    options = options or CutOptions()
    spec = with_memdir(spec)
    staged, copied = scratch / "staged", scratch / "sqlite"
    for directory in (staged, copied):
        directory.mkdir()
    copy_options = dataclasses.replace(options.copies, secret_tables=spec.secret_tables)
    with ExitStack() as stack:
        frozen = stack.enter_context(Frozen(spec))
        sources = OpenSources(spec, staged, stack)
        if is_known is not None and (now := sources.fingerprint_now()) is not None and is_known(now):
            frozen.thaw()
            if not frozen.failures:  # else it has to be seen, and only a snapshot is
                return None
        copies = DatabaseCopies(copied, copy_options)
        held = _hold_one_instant(sources, copies, options)
        capture = Capture(spec=spec, created_at_ms=held.created_at_ms, consistency=held.consistency)
        collect(sources, copies, capture, scratch=scratch, held_since=held.since, let_go=frozen.thaw)
    capture.failures += frozen.failures
    if not (capture.artifacts or capture.git or capture.symlinks or capture.failures):
        raise AgentNotFound(
            f"agent {spec.agent_id!r} is not there: nothing of it is in {spec.root}",
            hint="is its file system mounted? An empty snapshot would pass for the newest good one",
        )
    if spec.require_point_in_time and capture.consistency.level != "point_in_time":
        raise NotOneInstant(
            f"agent {spec.agent_id!r} never held still: {', '.join(capture.consistency.moved[:5])} moved in"
            f" each of {capture.consistency.attempts} attempts, and point_in_time is required",
            hint="try again when it is less busy, let `before` and `after` hold it still, or do without"
            " `require_point_in_time`",
        )
    return capture


def require_root(spec: AgentSpec) -> None:
    """Raises AgentNotFound if there is nothing where the agent should live."""
    if not os.path.isdir(spec.root):  # noqa: PTH112  that of a Path raises where this user may not look
        raise AgentNotFound(
            f"agent {spec.agent_id!r} is not there: {spec.root} is no directory, or not for this user",
            hint="mend `root` in the configuration, or bring the agent back with `agentkeep restore`",
        )


def with_memdir(spec: AgentSpec) -> AgentSpec:
    """`spec` with the first of its candidates that is a git repository now, if it names no memdir."""
    candidates = spec.memdir_candidates
    if spec.memdir is not None:
        candidates = (spec.relative(spec.memdir),) if _is_beyond_a_link(spec.root, spec.memdir) else ()
    for candidate in candidates:
        memdir = spec.root / candidate
        if not os.path.exists(memdir / ".git"):  # noqa: PTH110  False also where we may not look
            continue
        if not _is_beyond_a_link(spec.root, memdir):
            return dataclasses.replace(spec, memdir=memdir)
        resolved = memdir.resolve()
        if resolved.is_relative_to(spec.root.resolve()):
            inside = resolved.relative_to(spec.root.resolve())
            return dataclasses.replace(spec, memdir=spec.root / inside)
        # What a link out of the root leads to is not captured: that has to be said, and named.
        return dataclasses.replace(spec, memdir=None, required=(*spec.required, candidate))
    return spec


def _is_beyond_a_link(root: Path, path: Path) -> bool:
    return root.resolve() / path.relative_to(root) != path.resolve()


@dataclasses.dataclass(frozen=True, slots=True)
class _Held:
    """All databases are pinned (or copied), as of an instant, or as near to one as the attempts allowed.

    since: when the window opened, of the monotonic clock
    """

    consistency: Consistency
    created_at_ms: int
    since: float


def _hold_one_instant(sources: OpenSources, copies: DatabaseCopies, options: CutOptions) -> _Held:
    for number in range(1, options.attempts + 1):
        if number > 1:
            sources.release()
            copies.discard()
            _pause(options.backoff_seconds, number)
        attempt = _attempt(sources, copies, is_last=number == options.attempts)
        if not attempt.moved:
            break
    moved = attempt.moved | sources.unprovable
    sources.settle(moved)
    consistency = Consistency(
        level="per_source" if moved else "point_in_time",
        window_ms=attempt.window_ms,
        attempts=number,
        moved=tuple(sorted(moved)),
    )
    return _Held(consistency, attempt.created_at_ms, attempt.since)


@dataclasses.dataclass(frozen=True, slots=True)
class _Attempt:
    """moved: nothing means that this is the cut"""

    since: float
    window_ms: int
    created_at_ms: int
    moved: set[str]


def _attempt(sources: OpenSources, copies: DatabaseCopies, *, is_last: bool) -> _Attempt:
    """One try. What comes after the window is left out if there will be another anyway."""
    moved = sources.prepare()
    sources.catch_up()
    since = time.monotonic()
    before = sources.read()
    created_at_ms = time.time_ns() // 1_000_000
    moved |= sources.pin()
    logs, unsteady = sources.read_logs()
    after = sources.read()
    window_ms = math.ceil((time.monotonic() - since) * 1000)
    moved |= unsteady | before.differences(after)
    if is_last or not moved:
        moved |= sources.keep(before, logs)
        copies.copy_pinned(sources.waited_for(), held_since=since)
        sources.read_outside_rows()
        moved |= sources.moved_since_staged()
    return _Attempt(since, window_ms, created_at_ms, moved)


def _pause(backoff_seconds: float, attempt: int) -> None:
    # Jitter, so that a writer with a rhythm of its own is not met at the same point each time.
    longest = backoff_seconds * 2 ** min(attempt - 2, 3)
    time.sleep(random.uniform(longest / 2, longest))  # noqa: S311
