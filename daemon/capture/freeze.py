"""The agent's own way to hold still: a command before the capture, another one after it, whatever happened.

Neither is needed for one instant; they are for agents that write without pause. One that fails does not
stop the capture, which proves what it says by itself; it makes the snapshot incomplete, so that it is seen.

Crash model: if this process is killed in between, nobody runs `after`. What `before` does should come to an
end by itself.
"""

from __future__ import annotations

from threading import Thread
from typing import Self

from daemon.commands import CommandFailed, run_command
from daemon.model import AgentSpec, Failure


class Frozen:
    """For the time of a block, or until `thaw`. What went wrong is in `failures`."""

    def __init__(self, spec: AgentSpec) -> None:
        self._spec = spec
        self._is_frozen = False
        self.failures: list[Failure] = []

    def __enter__(self) -> Self:
        self._is_frozen = True
        try:
            self._run("before", self._spec.before)
        except BaseException:
            self.thaw()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.thaw()

    def thaw(self) -> None:
        """Run `after` to its end, whatever signal comes meanwhile. Idempotent."""
        if not self._is_frozen:
            return
        self._is_frozen = False
        if not self._spec.after:
            return
        # On a thread of its own: what a signal raises, it raises in the main thread.
        running = Thread(target=self._run, args=("after", self._spec.after))
        interruption: BaseException | None = None
        running.start()
        while running.is_alive():
            try:
                running.join()
            except BaseException as exc:  # noqa: BLE001  raised again as soon as the agent may go on
                interruption = exc
        if interruption is not None:
            raise interruption

    def _run(self, name: str, argv: tuple[str, ...]) -> None:
        if not argv:
            return
        try:
            run_command(argv, directory=self._spec.root, timeout_seconds=self._spec.command_timeout_seconds)
        except (CommandFailed, OSError) as exc:  # without room for a temporary file nothing was run
            hint = f"run it by hand, and mend `{name}` of agent {self._spec.agent_id!r} in the configuration"
            if name == "after":
                hint = f"the agent may still hold still: look at once; then {hint}"
            self.failures.append(Failure(source=f"command {name!r}", reason=str(exc), hint=hint))
