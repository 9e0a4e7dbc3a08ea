"""The cut: everything an agent consists of, as of one instant, and an honest record of how far that holds.

    find sources, stage files     slow, ahead, repeated only for what moved
    ── window opens ──────────    milliseconds
    read everything *before*      data_version of each database, refs and HEAD, signatures of hot files
    pin every database            BEGIN and a read: their state is ours from here
    read everything *after*
    ── window closes ─────────
    look at all files once more   each has to be as it was staged
    copy what is pinned, let go

Every before-reading precedes every after-reading (a file that is not hot was first read when it was
staged, and last after the window). So if all are equal, nothing moved between the last of the former and
the first of the latter, and that instant is the cut. If something moved, or changed so shortly before its
reading that a second change could hide in the same clock tick, everything is let go and tried again, a
few times; then the last attempt is kept as `per_source` and says what moved.

Crash model: nothing here outlives the process but files in the caller's scratch directory.
"""

from __future__ import annotations

import dataclasses
import os
import random
import time
from contextlib import ExitStack
from pathlib import Path

from daemon.capture.collect import Capture, CollectOptions, collect
from daemon.capture.sources import OpenSources
from daemon.errors import AgentNotFound
from daemon.model import AgentSpec, Consistency


@dataclasses.dataclass(frozen=True, slots=True)
class CutOptions:
    attempts: int = 8
    backoff_seconds: float = 0.02
    collect: CollectOptions = dataclasses.field(default_factory=CollectOptions)


def take_cut(spec: AgentSpec, scratch: Path, *, options: CutOptions | None = None) -> Capture:
    """Capture an agent into `scratch`, an empty private directory.

    Raises AgentNotFound (nothing where the agent should live) and OSError (our own side: scratch is
    full). Whatever cannot be captured is in the result's `failures`, its raw bytes among the artifacts
    where they can be read.
    """
    if not os.path.isdir(spec.root):  # noqa: PTH112  that of a Path raises where this user may not look
        raise AgentNotFound(
            f"agent {spec.agent_id!r} is not there: {spec.root} is no directory, or not for this user",
            hint="mend `root` in the configuration, or bring the agent back with `agentkeep restore`",
        )
    options = options or CutOptions()
    spec = with_memdir(spec)
    staged = scratch / "staged"
    staged.mkdir()
    with ExitStack() as stack:
        sources = OpenSources(spec, staged, stack)
        consistency, created_at_ms = _hold_one_instant(sources, options)
        capture = Capture(spec=spec, created_at_ms=created_at_ms, consistency=consistency)
        collect(sources, capture, scratch=scratch, options=options.collect)
    if not (capture.artifacts or capture.git or capture.symlinks or capture.failures):
        raise AgentNotFound(
            f"agent {spec.agent_id!r} is not there: nothing of it is in {spec.root}",
            hint="is its file system mounted? An empty snapshot would pass for the newest good one",
        )
    return capture


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


def _hold_one_instant(sources: OpenSources, options: CutOptions) -> tuple[Consistency, int]:
    """Pin all databases at a moment at which nothing moved, or as near to it as the attempts allow; how
    far that went, and that moment in milliseconds since 1970."""
    for attempt in range(1, options.attempts + 1):
        if attempt > 1:
            sources.release()
            _pause(options.backoff_seconds, attempt)
        window_ms, created_at_ms, moved = _attempt(sources)
        if not moved:
            break
    consistency = Consistency(
        level="per_source" if moved else "point_in_time",
        window_ms=window_ms,
        attempts=attempt,
        moved=tuple(sorted(moved)),
    )
    return consistency, created_at_ms


def _attempt(sources: OpenSources) -> tuple[int, int, set[str]]:
    """One try: the window's length, when it was (both in ms), and what moved (nothing: this is the cut)."""
    moved = sources.prepare()
    sources.catch_up()
    opened_ns = time.monotonic_ns()
    before = sources.read()
    created_at_ms = time.time_ns() // 1_000_000
    moved |= sources.pin()
    after = sources.read()
    window_ms = -((opened_ns - time.monotonic_ns()) // 1_000_000)  # rounded up
    moved |= before.differences(after)
    moved |= sources.not_as_staged(before)
    moved |= sources.moved_since_staged()
    return window_ms, created_at_ms, moved


def _pause(backoff_seconds: float, attempt: int) -> None:
    # Jitter, so that a writer with a rhythm of its own is not met at the same point each time.
    longest = backoff_seconds * 2 ** min(attempt - 2, 3)
    time.sleep(random.uniform(longest / 2, longest))  # noqa: S311
