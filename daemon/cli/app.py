"""The commands. Each parses, calls one thing, renders it, and returns an exit code.

Heavy modules (boto3, pygit2, APScheduler) are imported by the commands that need them, so that `--help`
and `list` answer at once.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from daemon import __version__
from daemon.cli import render
from daemon.cli.wiring import Host, read_identities
from daemon.errors import AgentkeepError, AgentNotFound, ConfigError, ExitCode, UsageError

if TYPE_CHECKING:
    from daemon.locate import Bundle
    from daemon.restore import RestoreReport

# The daemon may be uploading there just now.
_UPLOAD_PATIENCE_SECONDS = 600.0

app = typer.Typer(
    name="agentkeep",
    help="Keeps the memory of AI agents safe: snapshots, verifiable bundles, recovery by bucket key.",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

AgentArgument = Annotated[str | None, typer.Argument(help="The agent's id; needed if there are several.")]
AgentOption = Annotated[str | None, typer.Option("--agent", help="The agent, for `latest`.")]
SnapshotArgument = Annotated[
    str,
    typer.Argument(
        metavar="SNAP", help="An id, a unique prefix, latest, latest@TIME, a path, a bucket key or a URL."
    ),
]
IdentityOption = Annotated[
    str | None, typer.Option("--identity", metavar="FILE", help="age identity; - reads it from stdin.")
]
EndpointOption = Annotated[
    str | None, typer.Option("--endpoint-url", metavar="URL", help="For an s3:// URL: the server.")
]
RegionOption = Annotated[str | None, typer.Option("--region", help="For an s3:// URL.")]
CaFileOption = Annotated[
    str | None, typer.Option("--ca-file", metavar="FILE", help="For an s3:// URL: trusted certificates.")
]


# The base of what typer raises for a bad command line; it exports only the leaves.
_BadCommandLine: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"agentkeep {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option("--config", metavar="FILE", help="Configuration.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,  # noqa: ARG001
) -> None:
    host: Host = context.obj
    host.config_file = config
    host.as_json = as_json


@app.command()
def snapshot(
    context: typer.Context,
    agent: AgentArgument = None,
    label: Annotated[str | None, typer.Option("--label", help="A note kept with the snapshot.")] = None,
    no_upload: Annotated[bool, typer.Option("--no-upload", help="Leave the upload to the daemon.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Take one even if nothing has changed.")] = False,
    require_point_in_time: Annotated[
        bool, typer.Option("--require-point-in-time", help="Fail rather than take one that is per_source.")
    ] = False,
) -> int:
    """Take a snapshot now, unless nothing has changed since the last one, and wait for its upload."""
    from daemon.snapshots import take_snapshot
    from daemon.transfer import drain_outbox

    host: Host = context.obj
    spec = host.configuration.agent(agent)
    # Without its root there is no agent; a single source that is gone is named, and the rest is sealed.
    is_there = os.path.isdir(spec.root)  # noqa: PTH112  False also where we may not look
    if not is_there and (missing := host.configuration.missing_paths(spec.agent_id)):
        raise ConfigError("\n".join(missing), hint="mend the path, or bring the agent back with restore")
    names = host.configuration.destinations_of(spec.agent_id)
    destinations = [host.destinations[name] for name in names]
    if require_point_in_time:
        spec = dataclasses.replace(spec, require_point_in_time=True)
    record = take_snapshot(
        host.store,
        spec,
        sealing=host.sealing,
        destinations=names,
        label=label,
        unless_unchanged=not force and label is None,  # a label is for a snapshot of its own
    )
    is_unchanged = record.unchanged_at_ms is not None
    failed: list[AgentkeepError] = []
    if not no_upload:
        report = drain_outbox(
            host.store, destinations, only=record.snapshot_id, patience_seconds=_UPLOAD_PATIENCE_SECONDS
        )
        failed = [error for _, _, error in report.failed]
        record = host.store.catalog.find(record.snapshot_id)
    if host.as_json:
        render.print_json(render.snapshot_document(record) | {"unchanged": is_unchanged})
    else:
        if is_unchanged:
            render.print_unchanged(record)
        else:
            render.print_snapshot(record)
        for error in failed:
            render.print_error(error, as_json=False)
    if not record.complete:
        return ExitCode.PARTIAL
    return failed[0].exit_code if failed else ExitCode.OK


@app.command("list")
def list_snapshots(context: typer.Context, agent: AgentArgument = None) -> int:
    """List the snapshots that this host has taken, oldest first."""
    host: Host = context.obj
    spec = host.configuration.agent(agent) if agent is not None else None
    records = host.store.catalog.snapshots(
        tenant=spec.tenant if spec else None, agent_id=spec.agent_id if spec else None
    )
    if host.as_json:
        render.print_json({"snapshots": [render.snapshot_document(record) for record in records]})
    elif records:
        render.stdout().print(render.snapshots_table(records))
        render.print_upload_errors(records)
    else:
        render.stdout().print("no snapshots yet: `agentkeep snapshot` takes one")
    return ExitCode.OK


@app.command()
def show(
    context: typer.Context,
    snap: Annotated[
        str | None, typer.Argument(metavar="SNAP", help="A snapshot; with --plan an agent.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="What a snapshot of AGENT would hold, and why.")
    ] = False,
    agent: AgentOption = None,
    identity: IdentityOption = None,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    ca_file: CaFileOption = None,
) -> int:
    """Show what is in a snapshot, proven on the way; or, with --plan, what would be in one."""
    from daemon.verify import read_manifest

    host: Host = context.obj
    if plan:
        return _show_plan(host, snap or agent)
    if snap is None:
        raise UsageError("show which snapshot?", hint="`agentkeep list` names them; --plan AGENT needs none")
    identities = read_identities(identity)
    with _located(host, snap, agent, identities, _flags(endpoint_url, region, ca_file)) as bundle:
        manifest = read_manifest(bundle, identities=identities)
    if host.as_json:
        render.print_json(manifest.model_dump(mode="json"))
    else:
        render.print_manifest(manifest)
    return ExitCode.OK


@app.command()
def verify(
    context: typer.Context,
    snap: SnapshotArgument,
    agent: AgentOption = None,
    identity: IdentityOption = None,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    ca_file: CaFileOption = None,
) -> int:
    """Prove a bundle, level by level; deeper with --identity if it is encrypted."""
    from daemon.verify import verify as verify_bundle

    host: Host = context.obj
    identities = read_identities(identity)
    with _located(host, snap, agent, identities, _flags(endpoint_url, region, ca_file)) as bundle:
        report = verify_bundle(bundle, identities=identities)
    if host.as_json:
        render.print_json(
            {
                "bundle": report.bundle,
                "size_bytes": report.size_bytes,
                "sha256": report.sha256,
                "sound": report.is_sound,
                "fully_checked": report.is_fully_checked,
                "complete": report.manifest.complete if report.manifest else None,
                "levels": [
                    {"level": level.name, "status": level.status, "detail": level.detail}
                    for level in report.levels
                ],
            }
        )
    else:
        console = render.stdout()
        console.print(f"{report.bundle}, {render.human_bytes(report.size_bytes)}", markup=False)
        render.print_levels([(level.name, level.status, level.detail) for level in report.levels])
        if report.manifest is not None and not report.manifest.complete:
            console.print("  [yellow]the snapshot is incomplete:[/] `agentkeep show` names what is missing")
    return ExitCode.OK if report.is_sound else ExitCode.INTEGRITY


@app.command()
def export(
    context: typer.Context,
    snap: SnapshotArgument,
    to: Annotated[str, typer.Option("--to", metavar="PATH", help="A directory, or the file's name.")],
    agent: AgentOption = None,
    identity: IdentityOption = None,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    ca_file: CaFileOption = None,
) -> int:
    """Download a bundle and its sibling, verified on the way."""
    from daemon.transfer import export as export_bundle

    host: Host = context.obj
    identities = read_identities(identity)
    with (
        _located(host, snap, agent, identities, _flags(endpoint_url, region, ca_file)) as bundle,
        render.progress_bar("exporting", bundle.size_bytes) as progress,
    ):
        # `--to new/` can only mean a directory, though it is not there yet.
        target = Path(to) / bundle.file_name if to.endswith("/") else Path(to)
        path = export_bundle(bundle, target, progress=progress)
    if host.as_json:
        render.print_json({"path": str(path), "size_bytes": path.stat().st_size})
    else:
        render.stdout().print(
            f"{path}, {render.human_bytes(path.stat().st_size)}, matches its sibling", markup=False
        )
    return ExitCode.OK


@app.command()
def restore(
    context: typer.Context,
    snap: SnapshotArgument,
    to: Annotated[Path | None, typer.Option("--to", metavar="DIR", help="A new or empty directory.")] = None,
    agent: Annotated[
        str | None, typer.Option("--agent", help="Bring this agent back to where it lived.")
    ] = None,
    identity: IdentityOption = None,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    ca_file: CaFileOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask. Nothing live is replaced anyway.")] = False,  # noqa: ARG001
) -> int:
    """Bring a snapshot back: into an empty directory, or as an agent that has no state yet."""
    from daemon.restore import restore_agent, restore_to_directory

    host: Host = context.obj
    if to is None and agent is None:
        raise UsageError("restore to where?", hint="give --to DIR, or --agent AGENT")
    identities = read_identities(identity)
    with (
        _located(host, snap, agent, identities, _flags(endpoint_url, region, ca_file)) as bundle,
        render.progress_bar("restoring", bundle.size_bytes) as progress,
    ):
        if to is not None:
            report = restore_to_directory(bundle, to, identities=identities, progress=progress)
        else:
            spec = host.configuration.agent(agent)
            report = restore_agent(bundle, spec, identities=identities, progress=progress)
    _render_restored(host, report)
    return ExitCode.OK if report.is_whole else ExitCode.PARTIAL


@app.command()
def upload(context: typer.Context) -> int:
    """Send what waits in the outbox, now."""
    from daemon.transfer import drain_outbox

    host: Host = context.obj
    report = drain_outbox(host.store, host.destinations.values(), patience_seconds=_UPLOAD_PATIENCE_SECONDS)
    if host.as_json:
        render.print_json(
            {
                "confirmed": [{"snapshot_id": s, "destination": d} for s, d in report.confirmed],
                "failed": [
                    {"snapshot_id": s, "destination": d, "reason": str(error), "hint": error.hint}
                    for s, d, error in report.failed
                ],
            }
        )
    else:
        for snapshot_id, destination in report.confirmed:
            render.stdout().print(f"{snapshot_id} is at {destination}", markup=False)
        for _, _, error in report.failed:
            render.print_error(error, as_json=False)
        if not report.confirmed and not report.failed:
            render.stdout().print("nothing waits")
    return report.failed[0][2].exit_code if report.failed else ExitCode.OK


@app.command()
def run(context: typer.Context) -> int:
    """Run the daemon in the foreground: snapshots on schedule, uploads, until SIGTERM."""
    from daemon.service import AgentJob, Service
    from daemon.telemetry.logs import log_to_stderr

    host: Host = context.obj
    configuration = host.configuration
    if not configuration.agents:
        raise ConfigError(f"{configuration.path} names no agent", hint="add a section [agents.NAME]")
    log_to_stderr()
    jobs = [
        AgentJob(
            spec, configuration.settings.agents[name].parsed_schedule(), configuration.destinations_of(name)
        )
        for name, spec in configuration.agents.items()
    ]
    service = Service(
        host.store,
        jobs,
        host.destinations,
        sealing=host.sealing,
        upload_interval_seconds=configuration.settings.upload_interval_seconds,
        concurrency=configuration.settings.concurrency,
    )
    return service.run()


@app.command()
def check(context: typer.Context) -> int:
    """Find what would make a backup fail: paths, databases, destinations."""
    from daemon.check import check_host

    host: Host = context.obj
    configuration = host.configuration
    findings = check_host(
        configuration.agents.values(),
        host.destinations.values(),
        missing={name: configuration.missing_paths(name) for name in configuration.agents},
        recipients=host.sealing.recipients,
    )
    failed = [finding for finding in findings if finding.is_failure]
    if host.as_json:
        render.print_json(
            {
                "ok": not failed,
                "findings": [
                    {"subject": f.subject, "level": f.level, "message": f.message, "hint": f.hint}
                    for f in findings
                ],
            }
        )
    else:
        render.print_findings(findings)
    return failed[0].exit_code if failed else ExitCode.OK


@app.command()
def init(
    context: typer.Context,
    directories: Annotated[
        list[Path] | None, typer.Argument(metavar="[DIR]...", help="Where to look, besides the usual places.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="A new file (mode 0600), not stdout.")
    ] = None,
    url: Annotated[str | None, typer.Option("--url", metavar="URL", help="Where bundles are to go.")] = None,
) -> int:
    """Find the agents on this host and write a configuration for them."""
    from config.discovery import configuration_for, find_agents
    from daemon.durable import create_private, sync, translating_os_errors

    host: Host = context.obj
    found = find_agents(directories or [])
    if not found.agents:
        raise AgentNotFound(
            f"no agent found; looked at: {', '.join(found.looked_at)}",
            hint="name the directories that agents live in: `agentkeep init DIR`; or README, five lines",
        )
    text = configuration_for(found.agents, path=out or Path("the configuration"), url=url)
    if out is not None:
        with translating_os_errors("write", out), create_private(out) as stream:
            stream.write(text.encode())
            sync(stream)
    if host.as_json:
        render.print_json(render.found_document(found, text, out))
    elif out is None:
        sys.stdout.write(text)
    else:
        render.print_found(found, out)
    return ExitCode.OK


@app.command()
def keygen(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the identity goes (mode 0600).")],
) -> int:
    """Make an age key pair: the identity to a new file, the recipient to stdout."""
    from daemon.bundle.encryption import new_identity
    from daemon.durable import create_private, sync, translating_os_errors

    host: Host = context.obj
    identity, recipient = new_identity()
    with translating_os_errors("write", out), create_private(out) as stream:
        stream.write(f"# public key: {recipient}\n{identity}\n".encode())
        sync(stream)
    if host.as_json:
        render.print_json({"recipient": recipient, "identity_file": str(out)})
    else:
        print(recipient)
        render.stderr().print(
            f"the identity is in {out}: keep it off this host, and never lose it;"
            " without it no encrypted bundle opens",
            markup=False,
        )
    return ExitCode.OK


def _flags(endpoint_url: str | None, region: str | None, ca_file: str | None) -> dict[str, str | None]:
    return {"endpoint_url": endpoint_url, "region": region, "ca_file": ca_file}


def _located(host: Host, snap: str, agent: str | None, identities: Any, flags: dict[str, str | None]) -> Any:
    """The bundle that `snap` names, as a context manager."""
    from daemon.locate import located
    from daemon.verify import read_manifest

    def is_complete(bundle: Bundle) -> bool:
        return read_manifest(bundle, identities=identities).complete

    if agent is not None:
        host.configuration.agent(agent)  # an unknown one is named before anything is looked up
    return located(
        snap,
        host.places_for(snap),
        agent_id=agent,
        url_options=host.url_options(snap, flags),
        is_complete=is_complete,
    )


def _show_plan(host: Host, agent: str | None) -> int:
    from daemon.plan import plan_snapshot

    plan = plan_snapshot(host.configuration.agent(agent))
    if host.as_json:
        render.print_json(render.plan_document(plan))
    else:
        render.print_plan(plan)
    return ExitCode.PARTIAL if plan.failures else ExitCode.OK


def _render_restored(host: Host, report: RestoreReport) -> None:
    manifest = report.manifest
    if host.as_json:
        render.print_json(
            {
                "snapshot_id": manifest.snapshot_id,
                "agent_id": manifest.agent_id,
                "target": str(report.target),
                "artifacts": report.artifacts,
                "content_bytes": report.content_bytes,
                "complete": manifest.complete,
                "consistency": manifest.consistency.model_dump(mode="json"),
                "failures": [failure.model_dump(mode="json") for failure in manifest.failures],
                "not_put_back": list(report.not_put_back),
                "unsound": list(report.unsound),
            }
        )
    else:
        render.print_restored(report)


class _Terminated(BaseException):
    """SIGTERM, as an exception: what is under way unwinds and tidies up."""


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    # A terminal that is closed, or a ctrl-\\, is to tidy up too: an agent may be held still.
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, _raise_terminated)
    host = Host()
    arguments = sys.argv[1:] or ["--help"]
    code = _guarded(lambda: app(arguments, obj=host, standalone_mode=False), host)
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # `agentkeep list | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _raise_terminated(_number: int, _frame: Any) -> NoReturn:
    raise _Terminated


def _guarded(command: Callable[[], Any], host: Host) -> int:
    """Turn whatever comes out of a command into an exit code, and say it once."""
    try:
        result = command()
    except AgentkeepError as error:
        render.print_error(error, as_json=host.as_json)
        return error.exit_code
    except typer.Exit as exc:
        return exc.exit_code
    except _BadCommandLine as exc:
        usage = UsageError(exc.format_message(), hint="`agentkeep --help` shows the commands")
        render.print_error(usage, as_json=host.as_json)
        return ExitCode.USAGE
    except (KeyboardInterrupt, typer.Abort):
        return ExitCode.INTERRUPTED
    except _Terminated:
        return ExitCode.TERMINATED
    except BrokenPipeError:
        return ExitCode.OK
    except Exception:  # noqa: BLE001  the last line of defence: a bug, said as one
        traceback.print_exc()
        bug = AgentkeepError(
            "a bug in agentkeep; nothing was reported as done", hint="please report the traceback above"
        )
        render.print_error(bug, as_json=host.as_json)
        return ExitCode.BUG
    return int(result) if isinstance(result, int) else ExitCode.OK
