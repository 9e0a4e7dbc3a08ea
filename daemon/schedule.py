"""When an agent is due: `every 1h`, `daily 03:00`, or five cron fields. Text to data; no clock, no I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass

_EVERY = re.compile(r"every\s+(\d{1,6})\s*(s|m|h|d)\Z")
_DAILY = re.compile(r"daily\s+([01]?\d|2[0-3]):([0-5]\d)\Z")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_CRON_FIELDS = 5


@dataclass(frozen=True, slots=True)
class Schedule:
    """Either an interval, or a cron expression in the host's time zone."""

    every_seconds: int | None = None
    cron: str | None = None
    jitter_seconds: int = 0


def parse_schedule(text: str, *, jitter_seconds: int | None = None) -> Schedule:
    """Raises ValueError with what is allowed. The default jitter is 5 % of an interval, at most a minute."""
    text = text.strip()
    if every := _EVERY.match(text):
        seconds = int(every[1]) * _SECONDS[every[2]]
        if seconds == 0:
            raise ValueError("an interval has to be longer than nothing")
        jitter = min(seconds // 20, 60) if jitter_seconds is None else jitter_seconds
        return Schedule(every_seconds=seconds, jitter_seconds=jitter)
    if daily := _DAILY.match(text):
        return Schedule(cron=f"{int(daily[2])} {int(daily[1])} * * *", jitter_seconds=jitter_seconds or 0)
    if len(text.split()) == _CRON_FIELDS:
        return Schedule(cron=_checked_cron(text), jitter_seconds=jitter_seconds or 0)
    raise ValueError(
        f"not a schedule: {text!r}; write 'every 1h' (s, m, h, d), 'daily 03:00' or five cron fields"
    )


def _checked_cron(text: str) -> str:
    from apscheduler.triggers.cron import CronTrigger  # slow to import, and cron is rare

    try:
        CronTrigger.from_crontab(text)
    except ValueError as exc:
        raise ValueError(f"not a cron expression: {text!r} ({exc})") from exc
    return text
