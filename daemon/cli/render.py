"""What commands show: human text on a terminal, one JSON document with --json. Computes nothing."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from daemon.errors import AgentkeepError
from daemon.model import GitFacts, Manifest, SnapshotRecord, UploadState, presentable, snapshot_time

if TYPE_CHECKING:
    from config.discovery import Discovery
    from daemon.check import Finding
    from daemon.plan import Plan
    from daemon.restore import RestoreReport

_MARKS = {"ok": "[green]ok[/]", "failed": "[red]failed[/]", "not checked": "[yellow]not checked[/]"}


_PIPE_COLUMNS = 400
_MOST_NAMES = 20


def stdout() -> Console:
    """Wide where nobody has a window to fit: what is piped must not be cut."""
    width = None if sys.stdout.isatty() else _PIPE_COLUMNS
    return Console(highlight=False, emoji=False, soft_wrap=True, width=width)


def stderr() -> Console:
    return Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def _text(text: str, *, style: str = "") -> Text:
    """What came from outside (a manifest, a path, a server) as it may be shown: plain, and nothing in it
    controls the terminal or is invisible."""
    shown = (char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)
    return Text("".join(shown), style=style)


def print_json(document: object) -> None:
    json.dump(document, sys.stdout, indent=2, ensure_ascii=True)
    sys.stdout.write("\n")


def print_error(error: AgentkeepError, *, as_json: bool) -> None:
    """What happened and why on one line, what to do on the next."""
    if as_json:
        print_json(
            {
                "error": {
                    "kind": type(error).__name__,
                    "exit_code": int(error.exit_code),
                    "message": str(error),
                    "hint": error.hint,
                }
            }
        )
    console = stderr()
    console.print(Text("error: ", style="bold red") + _text(str(error)))
    if error.hint:
        console.print(Text("  fix: ", style="bold") + _text(error.hint))


def human_bytes(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def snapshot_document(record: SnapshotRecord) -> dict[str, Any]:
    return {
        "snapshot_id": record.snapshot_id,
        "agent_id": record.key.agent_id,
        "tenant": record.key.tenant,
        "created_at_ms": record.created_at_ms,
        "unchanged_at_ms": record.unchanged_at_ms,
        "label": record.label,
        "complete": record.complete,
        "consistency": record.consistency.model_dump(mode="json"),
        "failures": [failure.model_dump(mode="json") for failure in record.failures],
        "encrypted": record.key.encrypted,
        "size_bytes": record.size_bytes,
        "content_bytes": record.content_bytes,
        "sha256": record.sha256,
        "key": str(record.key),
        "uploads": {name: upload.state.value for name, upload in record.uploads.items()},
        "upload_errors": {
            name: upload.last_error for name, upload in record.uploads.items() if upload.last_error
        },
    }


def snapshots_table(records: list[SnapshotRecord]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("snapshot", "agent", "taken (UTC)", "still so (UTC)", "state", "consistency"):
        table.add_column(column, no_wrap=True)
    table.add_column("bundle", justify="right", no_wrap=True)
    table.add_column("uploads")
    for record in records:
        table.add_row(
            record.snapshot_id,
            _agent_name(record.key.tenant, record.key.agent_id),
            f"{record.created_at:%Y-%m-%d %H:%M:%S}",
            "-" if record.unchanged_at_ms is None else f"{record.current_at:%Y-%m-%d %H:%M:%S}",
            "complete" if record.complete else "[red]incomplete[/]",
            record.consistency.level,
            human_bytes(record.size_bytes),
            ", ".join(f"{name}: {upload.state.value}" for name, upload in record.uploads.items()) or "-",
        )
    return table


def print_upload_errors(records: list[SnapshotRecord]) -> None:
    """Why uploads have not come to their end, the newest reason of each destination."""
    reasons = {
        name: upload.last_error
        for record in records
        for name, upload in record.uploads.items()
        if upload.state != UploadState.CONFIRMED and upload.last_error
    }
    for reason in reasons.values():
        stdout().print(Text("not uploaded  ", style="red") + _text(reason))


def _agent_name(tenant: str, agent_id: str) -> str:
    return agent_id if tenant == "default" else f"{tenant}/{agent_id}"


def print_snapshot(record: SnapshotRecord) -> None:
    """The outcome of a snapshot, failures first in what catches the eye."""
    console = stdout()
    state = "[green]complete[/]" if record.complete else "[bold red]incomplete[/]"
    console.print(f"snapshot [bold]{record.snapshot_id}[/] of agent {record.key.agent_id}: {state}")
    window = f"{record.consistency.level}, window {record.consistency.window_ms} ms"
    console.print(f"  consistency  {window}, attempt {record.consistency.attempts}")
    if record.consistency.moved:
        console.print(_text(f"  moved        {', '.join(record.consistency.moved[:5])}"))
    sizes = f"{human_bytes(record.content_bytes)} in a bundle of {human_bytes(record.size_bytes)}"
    console.print(f"  content      {sizes}{', encrypted' if record.key.encrypted else ''}")
    console.print(f"  key          {record.key}")
    for name, upload in record.uploads.items():
        console.print(Text(f"  upload       {name}: {upload.state.value}"))
    for failure in record.failures:
        console.print(Text("  not captured ", style="red") + _text(f"{failure.source}: {failure.reason}"))
        if failure.hint:
            console.print(_text(f"           fix {failure.hint}"))
        if failure.kept_as:
            console.print(_text(f"          kept {', '.join(failure.kept_as[:3])} (raw bytes)"))


def print_unchanged(record: SnapshotRecord) -> None:
    """A snapshot that was not needed."""
    console = stdout()
    agent = record.key.agent_id
    console.print(
        f"agent {agent} is unchanged since snapshot [bold]{record.snapshot_id}[/]: nothing was written"
    )
    console.print(f"  taken        {record.created_at:%Y-%m-%d %H:%M:%S} UTC; --force takes another")
    for name, upload in record.uploads.items():
        console.print(Text(f"  upload       {name}: {upload.state.value}"))


def print_manifest(manifest: Manifest) -> None:
    console = stdout()
    console.print(f"snapshot [bold]{manifest.snapshot_id}[/]")
    rows = [
        ("agent", _agent_name(manifest.tenant, manifest.agent_id)),
        ("label", manifest.label or "-"),
        ("complete", "yes" if manifest.complete else "NO"),
        ("consistency", f"{manifest.consistency.level}, window {manifest.consistency.window_ms} ms"),
        ("encrypted", "yes" if manifest.encryption else "no"),
        *_git_rows(manifest.git),
        ("made by", f"agentkeep {manifest.tool_versions.get('agentkeep', '?')} ({manifest.created_by})"),
        ("seal", manifest.seal),
    ]
    for name, value in rows:
        console.print(_text(f"  {name:<13}{value}"))
    for failure in manifest.failures:
        console.print(Text("  not captured ", style="red") + _text(f"{failure.source}: {failure.reason}"))
    for excluded in manifest.excluded:
        console.print(_text(f"  left out     {excluded.count} x {excluded.pattern} ({excluded.reason})"))
    for symlink in manifest.symlinks:
        target = base64.b64decode(symlink.target_b64).decode("utf-8", "backslashreplace")
        console.print(_text(f"  symlink      {symlink.path} -> {target}"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("artifact")
    table.add_column("kind")
    table.add_column("size", justify="right")
    table.add_column("sha256")
    for artifact in manifest.artifacts:
        table.add_row(
            _text(artifact.path_in_bundle),
            artifact.kind.value,
            human_bytes(artifact.size_bytes),
            artifact.sha256[:16],
        )
    console.print(table)


def _git_rows(git: GitFacts | None) -> list[tuple[str, str]]:
    if git is None:
        return [("git", "-")]
    rows = [("git", f"{len(git.refs)} refs, HEAD {git.head_oid}")]
    if git.stash:
        rows.append(("stash", f"{len(git.stash)}, the newest: {git.stash[0].message}"))
    for operation in git.operations:
        rows.append(("under way", operation.kind + (f" of {operation.branch}" if operation.branch else "")))
    for worktree in git.worktrees:
        rows.append(("work tree", f"{worktree.path} at {worktree.head or worktree.head_oid}"))
    for submodule in git.submodules:
        rows.append(("submodule", f"{submodule.path} at {submodule.commit}, {submodule.url or 'no URL'}"))
    for name, url in git.remotes.items():
        rows.append(("remote", f"{name} {url}"))
    if git.shallow:
        rows.append(("shallow", f"history ends at {len(git.shallow)} commits"))
    if git.partial:
        rows.append(("partial", f"{git.missing_objects} objects were not there to capture"))
    return rows


def found_document(found: Discovery, text: str, path: Path | None) -> dict[str, Any]:
    return {
        "agents": [
            {"agent_id": agent.agent_id, "profile": agent.profile, "root": str(agent.root)}
            for agent in found.agents
        ],
        "looked_at": [presentable(place) for place in found.looked_at],
        "config_file": None if path is None else str(path),
        "configuration": text,
    }


def print_found(found: Discovery, path: Path) -> None:
    console = stdout()
    for agent in found.agents:
        console.print(_text(f"{agent.agent_id}: {agent.profile} in {agent.root}"))
    console.print(_text(f"written to {path}; next: agentkeep --config {path} check"))


def plan_document(plan: Plan) -> dict[str, Any]:
    spec = plan.spec

    def entries(found: tuple[Any, ...]) -> list[dict[str, Any]]:
        return [
            {"path": presentable(entry.path), "kind": entry.kind, "size_bytes": entry.size_bytes}
            for entry in found
        ]

    return {
        "agent_id": spec.agent_id,
        "tenant": spec.tenant,
        "root": presentable(str(spec.root)),
        "memdir": None if spec.memdir is None else presentable(spec.relative(spec.memdir)),
        "git": plan.has_repository,
        "size_bytes": plan.size_bytes,
        "totals": {
            kind: {"count": total.count, "size_bytes": total.size_bytes}
            for kind, total in plan.totals.items()
        },
        "symlinks": plan.symlinks,
        "databases": entries(plan.databases),
        "biggest": entries(plan.biggest),
        "states": [
            {
                "name": state.name,
                "kind": state.kind,
                "where": presentable(state.where),
                "there": state.is_there,
            }
            for state in plan.states
        ],
        "emptied_tables": list(spec.secret_tables),
        "left_out": [
            {
                "reason": left_out.reason,
                "pattern": presentable(left_out.pattern),
                "count": left_out.count,
                "examples": [presentable(example) for example in left_out.examples],
            }
            for left_out in plan.left_out
        ],
        "failures": [failure.model_dump(mode="json") for failure in plan.failures],
    }


def print_plan(plan: Plan) -> None:
    console = stdout()
    spec = plan.spec
    console.print(_text(f"agent {_agent_name(spec.tenant, spec.agent_id)} in {spec.root}"))
    for label, value in _plan_rows(plan):
        console.print(_text(f"  {label:<13}{value}"))
    for entry in plan.databases:
        console.print(_text(f"  database     {entry.path}, {human_bytes(entry.size_bytes)}"))
    for state in plan.states:
        there = "" if state.is_there else ", not there"
        console.print(_text(f"  state value  {state.name}: {state.kind} of {state.where}{there}"))
    for entry in plan.biggest:
        console.print(_text(f"  biggest      {human_bytes(entry.size_bytes)} {entry.path} ({entry.kind})"))
    for left_out in plan.left_out:
        why = f"{left_out.count} x {left_out.pattern} ({left_out.reason})"
        console.print(_text(f"  left out     {why}: {', '.join(left_out.examples)}"))
    for failure in plan.failures[:_MOST_NAMES]:
        console.print(Text("  would fail   ", style="red") + _text(f"{failure.source}: {failure.reason}"))
        if failure.hint:
            console.print(_text(f"           fix {failure.hint}"))
    if len(plan.failures) > _MOST_NAMES:
        console.print(f"  and {len(plan.failures) - _MOST_NAMES} more; --json names them all")


def _plan_rows(plan: Plan) -> list[tuple[str, str]]:
    spec = plan.spec
    counted = [(f"{kind}s", total) for kind, total in plan.totals.items() if total.count]
    rows = [(label, f"{total.count}, {human_bytes(total.size_bytes)}") for label, total in counted]
    if spec.memdir is not None:
        git = "git repository, all refs" if plan.has_repository else "no git repository"
        rows.append(("memdir", f"{spec.relative(spec.memdir)} ({git})"))
    if plan.symlinks:
        rows.append(("symlinks", str(plan.symlinks)))
    if spec.secret_tables:
        rows.append(("emptied", f"tables {', '.join(spec.secret_tables)}"))
    commands = (("before", spec.before), ("after", spec.after))
    rows += [(when, " ".join(command)) for when, command in commands if command]
    if spec.require_point_in_time:
        rows.append(("one instant", "required: no snapshot rather than one that is per_source"))
    return rows


def print_levels(levels: list[tuple[str, str, str]]) -> None:
    console = stdout()
    for name, status, detail in levels:
        console.print(Text.from_markup(f"  {name:<11}{_MARKS[status]}  ") + _text(detail))


def print_restored(report: RestoreReport) -> None:
    console = stdout()
    manifest = report.manifest
    size = human_bytes(report.content_bytes)
    console.print(_text(f"restored {manifest.snapshot_id} of agent {manifest.agent_id} to {report.target}"))
    console.print(f"  {report.artifacts} artifacts, {size}, every one verified", markup=False)
    console.print(f"  taken at {snapshot_time(manifest.snapshot_id):%Y-%m-%d %H:%M:%S} UTC", markup=False)
    console.print(f"  consistency {manifest.consistency.level}", markup=False)
    if not manifest.complete:
        console.print("  [bold red]the snapshot is incomplete[/], these were not captured:")
    for failure in manifest.failures:
        console.print(_text(f"    {failure.source}: {failure.reason}"))
    for problem in report.unsound:
        console.print(Text("  damaged when it was captured: ", style="bold red") + _text(problem))
    for name in report.not_put_back[:_MOST_NAMES]:
        console.print(_text(f"  not put back: {name}"))
    if len(report.not_put_back) > _MOST_NAMES:
        console.print(f"  and {len(report.not_put_back) - _MOST_NAMES} more; --json names them all")


def print_findings(findings: list[Finding]) -> None:
    console = stdout()
    marks = {"ok": "[green]ok      [/]", "warning": "[yellow]warning [/]", "failure": "[red]failure [/]"}
    for finding in findings:
        console.print(Text.from_markup(marks[finding.level]) + _text(f"{finding.subject}: {finding.message}"))
        if finding.hint:
            console.print(_text(f"    fix: {finding.hint}"))


@contextmanager
def progress_bar(what: str, total_bytes: Callable[[], int]) -> Iterator[Callable[[int], None] | None]:
    """A bar on stderr, on a terminal only; what it gives is told the bytes so far."""
    console = stderr()
    if not console.is_terminal:
        yield None
        return
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(what, *columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total_bytes())
        yield lambda done_bytes: progress.update(task, completed=done_bytes)
