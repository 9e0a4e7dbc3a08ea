"""State values: small JSON documents (extract cursor, dream_run row) read as part of the cut."""

from __future__ import annotations

import base64
import json
import sqlite3
import time
from typing import Any

from daemon.commands import CommandFailed, run_command
from daemon.model import AgentSpec, StateSource

MAX_STATE_BYTES = 4 << 20
MAX_STATE_ROWS = 1000
MAX_CELL_BYTES = 256 << 10
MAX_QUERY_SECONDS = 1
_PROGRESS_STEPS = 10_000


class StateUnreadable(Exception):
    """The value is not what it should be: the message says why."""


def check_json(data: bytes) -> bytes:
    """The bytes of a state file, exactly, if they are one JSON value. Raises StateUnreadable."""
    if len(data) > MAX_STATE_BYTES:
        raise StateUnreadable(f"larger than the {MAX_STATE_BYTES >> 20} MiB that a state value may have")
    try:
        json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise StateUnreadable(f"not valid JSON: {exc}") from exc
    return data


def command_value(source: StateSource, spec: AgentSpec) -> bytes | StateUnreadable:
    """What the value's command prints, exactly, if it is one JSON value; else what is wrong with it."""
    try:
        printed = run_command(
            source.command,
            directory=spec.root,
            timeout_seconds=spec.command_timeout_seconds,
            max_output_bytes=MAX_STATE_BYTES,
        )
        return check_json(printed)
    except CommandFailed as exc:
        return StateUnreadable(str(exc))
    except StateUnreadable as exc:
        return exc


def query_rows(
    connection: sqlite3.Connection, query: str, *, agent_id: str, deadline: float | None = None
) -> bytes:
    """The rows of `query` as a JSON list of objects, column to value; blobs as {"base64": ...}.

    `:agent` is bound to the agent's id. The connection is read-only, and pinned to the cut or to a copy.
    deadline: of the monotonic clock; a second from now if it is not given. Raises StateUnreadable.
    """
    deadline = time.monotonic() + MAX_QUERY_SECONDS if deadline is None else deadline
    # The agent may have put anything under the name that is queried, an endless view included.
    connection.set_progress_handler(lambda: time.monotonic() > deadline, _PROGRESS_STEPS)
    # The handler is not asked within a function, and some take the square of the length.
    longest_bytes = connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_CELL_BYTES)
    try:
        cursor = connection.execute(query, {"agent": agent_id})
        rows = cursor.fetchmany(MAX_STATE_ROWS + 1)
    except sqlite3.Error as exc:
        raise StateUnreadable(f"the query failed, or took more than {MAX_QUERY_SECONDS} s: {exc}") from exc
    finally:
        connection.set_progress_handler(None, 0)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, longest_bytes)
    if cursor.description is None:
        raise StateUnreadable("the query returns no columns; it has to be a SELECT")
    if len(rows) > MAX_STATE_ROWS:
        raise StateUnreadable(f"the query returns more than {MAX_STATE_ROWS} rows")
    names = [column[0] for column in cursor.description]
    objects = [dict(zip(names, map(_as_json, row), strict=True)) for row in rows]
    return check_json(json.dumps(objects, ensure_ascii=False, indent=1).encode() + b"\n")


def _as_json(value: Any) -> Any:
    return {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value
