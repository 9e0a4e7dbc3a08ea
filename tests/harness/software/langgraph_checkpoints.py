"""langgraph's checkpointer for SQLite: threads of checkpoints and pending writes, in a WAL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.sqlite import SqliteSaver


@contextmanager
def opened(root: Path) -> Iterator[SqliteSaver]:
    root.mkdir(exist_ok=True)
    with SqliteSaver.from_conn_string(str(root / "checkpoints.sqlite")) as saver:
        yield saver


def write(saver: SqliteSaver) -> None:
    for thread in range(3):
        config: Any = {"configurable": {"thread_id": f"thread-{thread}", "checkpoint_ns": ""}}
        for step in range(10):
            checkpoint = empty_checkpoint()
            checkpoint["channel_values"] = {"messages": [f"message {n}" for n in range(step)], "raw": b"\0\1"}
            config = saver.put(config, checkpoint, {"source": "loop", "step": step, "parents": {}}, {})
            saver.put_writes(config, [("messages", {"step": step})], task_id=f"task-{step}")


def read(saver: SqliteSaver) -> list[list[str]]:
    """Each checkpoint by its parts, newest first."""
    return [
        [repr(found.config), repr(found.checkpoint), repr(found.metadata), repr(found.parent_config)]
        + [repr(pending) for pending in found.pending_writes or ()]
        for found in saver.list(None)
    ]
