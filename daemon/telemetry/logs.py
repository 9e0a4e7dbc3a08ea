"""Structured logs on stderr: `2026-11-01T10:00:00Z INFO snapshot.sealed agent=ana bytes=1024`.

About one INFO line a snapshot. Values are quoted when they need it; no memory content, no secret.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime

_PLAIN = re.compile(r"[A-Za-z0-9_./:@+-]+\Z")
_LOGGER = logging.getLogger("agentkeep")


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        fields = getattr(record, "fields", {})
        line = " ".join([when, record.levelname, record.getMessage(), *map(_pair, fields.items())])
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _pair(item: tuple[str, object]) -> str:
    key, value = item
    text = str(value)
    return f"{key}={text if _PLAIN.match(text) else json.dumps(text, ensure_ascii=False)}"


def log_to_stderr() -> None:
    """Send our events, and the warnings of libraries, to stderr. Idempotent."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    _LOGGER.setLevel(logging.INFO)


def event(
    name: str,
    *,
    level: int = logging.INFO,
    fields: Mapping[str, object] | None = None,
    exc_info: bool = False,
) -> None:
    _LOGGER.log(level, name, extra={"fields": fields or {}}, exc_info=exc_info)
