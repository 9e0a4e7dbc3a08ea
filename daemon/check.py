"""Everything that would make a backup fail, found before it does. So far: what the main road needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from daemon.capture.git import LiveRepository, RepositoryUnreadable
from daemon.capture.scan import LINK_OUT
from daemon.capture.sqlite import DatabaseUnreadable, HotJournal, LiveDatabase
from daemon.destinations import Destination
from daemon.errors import AgentkeepError, ExitCode
from daemon.model import AgentSpec, Failure
from daemon.plan import DATABASE, plan_snapshot


@dataclass(frozen=True, slots=True)
class Finding:
    subject: str
    level: Literal["ok", "warning", "failure"]
    message: str
    hint: str = ""
    exit_code: ExitCode = ExitCode.CONFIG

    @property
    def is_failure(self) -> bool:
        return self.level == "failure"


def check_host(
    agents: Iterable[AgentSpec],
    destinations: Iterable[Destination],
    *,
    missing: Mapping[str, list[str]],
    recipients: tuple[str, ...],
) -> list[Finding]:
    """Look at every agent and try every destination; raises nothing for what it finds."""
    findings: list[Finding] = []
    for spec in agents:
        findings += _check_agent(spec, missing[spec.agent_id])
    names = 0
    for destination in destinations:
        names += 1
        findings.append(_check_destination(destination))
    if not names:
        findings.append(
            Finding("destinations", "warning", "none: bundles stay on this host", "add [destinations.NAME]")
        )
    if not recipients:
        findings.append(
            Finding(
                "encryption",
                "warning",
                "off: whoever can read the bucket can read the agents' memory",
                "`agentkeep keygen --out FILE`, then [encryption] recipients",
            )
        )
    return findings


def _check_agent(spec: AgentSpec, missing: list[str]) -> list[Finding]:
    subject = f"agent {spec.agent_id}"
    if missing:
        return [Finding(subject, "failure", complaint, "mend the path") for complaint in missing]
    plan = plan_snapshot(spec)
    problems = list(plan.failures)
    problems += filter(None, (_try_database(spec.root / entry.path) for entry in plan.databases))
    problems += filter(None, [_try_repository(plan.spec.memdir)] if plan.has_repository else [])
    outward = [
        Finding(
            subject, "warning", f"{path} is a link: {left.reason}", "copy what it leads to into the agent"
        )
        for left in plan.left_out
        if (left.reason, left.pattern) == LINK_OUT
        for path in left.examples
    ]
    if problems:
        return outward + [
            Finding(subject, "failure", f"{failure.source}: {failure.reason}", failure.hint, ExitCode.PARTIAL)
            for failure in {failure.source: failure for failure in problems}.values()
        ]
    repository = f", git in {plan.spec.memdir}" if plan.has_repository else ""
    files = sum(total.count for kind, total in plan.totals.items() if kind != DATABASE)
    counts = f"{len(plan.databases)} databases, {files} files{repository}"
    return [Finding(subject, "ok", f"{spec.root}: {counts}"), *outward]


def _try_database(path: Path) -> Failure | None:
    """Whether it can be opened and its schema read; its pages are checked when it is captured."""
    try:
        LiveDatabase(path).close()
    except HotJournal:  # rolled back in a copy when it is captured
        return None
    except DatabaseUnreadable as exc:
        return Failure(source=str(path), reason=str(exc), hint=exc.hint)
    return None


def _try_repository(memdir: Path | None) -> Failure | None:
    assert memdir is not None
    try:
        with closing(LiveRepository(memdir)) as repository:
            repository.reading()
    except RepositoryUnreadable as exc:
        return Failure(source=str(memdir), reason=str(exc), hint=exc.hint)
    return None


def _check_destination(destination: Destination) -> Finding:
    subject = f"destination {destination.name}"
    try:
        with destination.opened() as backend:
            able = backend.probe()
    except AgentkeepError as exc:
        return Finding(subject, "failure", str(exc), exc.hint, exc.exit_code)
    facts = {
        "put-if-absent": able.conditional_put,
        "checksums": able.checksums,
        "versioning": able.versioning,
        "object lock": able.object_lock,
        "resumable uploads": able.resumable_put,
    }
    has = ", ".join(name for name, is_there in facts.items() if is_there) or "nothing extra"
    lacks = ", ".join(name for name, is_there in facts.items() if not is_there)
    return Finding(subject, "ok", f"{destination.url}: has {has}" + (f"; lacks {lacks}" if lacks else ""))
