"""Everything that would make a backup fail, found before it does. So far: what the main road needs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from daemon.capture.scan import Scanner
from daemon.destinations import Destination
from daemon.errors import AgentkeepError, ExitCode
from daemon.model import AgentSpec


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
    scan = Scanner(spec).scan()
    findings = [
        Finding(subject, "failure", f"{failure.source}: {failure.reason}", failure.hint)
        for failure in [*scan.failures.values(), *scan.suspects.values()]
    ]
    foreign = [path for path, found in scan.databases.items() if found.owner != os.geteuid()]
    findings += [
        Finding(
            subject,
            "failure",
            f"{spec.root / path} belongs to another user",
            "run agentkeep as the agent's user: another user's connection leaves files it cannot write",
        )
        for path in foreign
    ]
    if not findings:
        counts = f"{len(scan.databases)} databases, {len(scan.files)} files"
        findings.append(Finding(subject, "ok", f"{spec.root}: {counts}"))
    return findings


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
