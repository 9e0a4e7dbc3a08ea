"""State values that came from a command go back through a command: one of the local configuration, never one
that a bundle names."""

from __future__ import annotations

from pathlib import Path

from daemon.commands import CommandFailed, run_command
from daemon.model import AgentSpec, Manifest
from daemon.restore.unpack import member_path


def give_values_back(
    manifest: Manifest, parts: Path, spec: AgentSpec, left: tuple[str, ...]
) -> tuple[str, ...]:
    """Run the restore commands of the values among `left`, each with its value on stdin, in the agent's root;
    what is left then, with the reason where a command failed."""
    commands = {f"state/{source.name}.json": source.restore_command for source in spec.states}
    remaining = []
    for name in left:
        home = manifest.states.get(name.removeprefix("state/").removesuffix(".json"))
        command = commands.get(name)
        if home is None or home.kind != "command" or not command:
            remaining.append(name)
            continue
        try:
            run_command(
                command,
                directory=spec.root,
                timeout_seconds=spec.command_timeout_seconds,
                stdin=(parts / member_path(name)).read_bytes(),
            )
        except (CommandFailed, OSError) as exc:  # all else is in place by now, and has to be reported
            remaining.append(f"{name} ({exc})")
    return tuple(remaining)
