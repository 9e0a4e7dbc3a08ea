"""When an agent is due: `every 1h`, `daily 03:00`, or five cron fields. Text to data; no clock, no I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime

_EVERY = re.compile(r"every\s+(\d{1,6})\s*(s|m|h|d)\Z", re.ASCII)
_DAILY = re.compile(r"daily\s+([01]?\d|2[0-3]):([0-5]\d)\Z", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_CRON_FIELDS = 5
_WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")


@dataclass(frozen=True, slots=True)
class Schedule:
    """Either an interval, or a cron expression in the host's time zone, its days of the week by name."""

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

    minute, hour, day, month, weekday = text.split()
    try:
        cron = f"{minute} {hour} {day} {month} {_named_weekdays(weekday)}"
        trigger = CronTrigger.from_crontab(cron, timezone=UTC)
    except ValueError as exc:
        raise ValueError(f"not a cron expression: {text!r} ({exc})") from exc
    if day != "*" and weekday != "*":  # cron means either of them, APScheduler both at once
        raise ValueError(f"{text!r} names days of the month and of the week: leave one of them *")
    if trigger.get_next_fire_time(None, datetime(2024, 1, 1, tzinfo=UTC)) is None:
        raise ValueError(f"{text!r} names a day that no month has: it would never be due")
    return cron


def _named_weekdays(field: str) -> str:
    """A cron field's days of the week by name: cron counts from Sunday, APScheduler from Monday."""
    days: set[int] = set()
    for item in field.lower().split(","):
        span, slash, step_text = item.partition("/")
        step = int(step_text) if slash else 1
        first_text, dash, last_text = span.partition("-")
        if span == "*":
            first, last = 0, 6
        else:
            first = _weekday(first_text)
            last = _weekday(last_text) if dash else 6 if slash else first
        if last < first:
            last += 7
        days.update(day % 7 for day in range(first, last + 1, step))
    return ",".join(_WEEKDAYS[day] for day in sorted(days)) if len(days) < len(_WEEKDAYS) else "*"


def _weekday(text: str) -> int:
    number = _WEEKDAYS.index(text) if text in _WEEKDAYS else int(text)
    if not 0 <= number <= 7:  # 0 and 7 are Sunday
        raise ValueError(f"{text} is no day of the week")
    return number
