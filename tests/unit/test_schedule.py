"""A schedule means what an operator who wrote it means, or is refused."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from daemon.schedule import Schedule, parse_schedule
from daemon.service import trigger_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("every 1s", 1),
        ("every 90s", 90),
        ("every 5m", 300),
        ("every 1h", 3600),
        ("every 2d", 172_800),
        ("every  15 m", 900),
        ("  every 1h  ", 3600),
    ],
)
def test_an_interval_is_so_many_seconds(text: str, seconds: int) -> None:
    schedule = parse_schedule(text, jitter_seconds=0)
    assert schedule == Schedule(every_seconds=seconds)


@pytest.mark.parametrize(
    ("text", "jitter_seconds"),
    [("every 10s", 0), ("every 1m", 3), ("every 10m", 30), ("every 1h", 60), ("every 30d", 60)],
)
def test_an_interval_has_a_jitter_of_a_twentieth_and_a_minute_at_most(text: str, jitter_seconds: int) -> None:
    assert parse_schedule(text).jitter_seconds == jitter_seconds
    assert parse_schedule(text, jitter_seconds=7).jitter_seconds == 7


@pytest.mark.parametrize(
    ("text", "cron"),
    [
        ("daily 03:00", "0 3 * * *"),
        ("daily 3:05", "5 3 * * *"),
        ("daily 00:00", "0 0 * * *"),
        ("daily 23:59", "59 23 * * *"),
        ("0 * * * *", "0 * * * *"),
        ("*/15 1-5 1,15 jan-mar *", "*/15 1-5 1,15 jan-mar *"),
        ("0 0 29 2 *", "0 0 29 2 *"),
    ],
)
def test_a_time_of_day_and_cron_fields_are_a_cron_expression(text: str, cron: str) -> None:
    assert parse_schedule(text) == Schedule(cron=cron)


WEEK = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]


@pytest.mark.parametrize(
    ("field", "days"),
    [
        ("0", ["sun"]),
        ("7", ["sun"]),
        ("1", ["mon"]),
        ("6", ["sat"]),
        ("1-5", ["mon", "tue", "wed", "thu", "fri"]),
        ("0-2", ["mon", "tue", "sun"]),
        ("5-7", ["fri", "sat", "sun"]),
        ("1,3", ["mon", "wed"]),
        ("0,6", ["sat", "sun"]),
        ("*/2", ["tue", "thu", "sat", "sun"]),
        ("1-5/2", ["mon", "wed", "fri"]),
        ("4/2", ["thu", "sat"]),
        ("mon-fri", ["mon", "tue", "wed", "thu", "fri"]),
        ("SUN", ["sun"]),
        ("sat-sun", ["sat", "sun"]),
        ("fri-mon", ["mon", "fri", "sat", "sun"]),
        ("sun,3", ["wed", "sun"]),
        ("0-6", WEEK),
        ("*", WEEK),
    ],
)
def test_days_of_the_week_are_those_of_cron_where_sunday_is_zero(field: str, days: list[str]) -> None:
    """Seen in what the daemon's own trigger does in a week that begins on a Monday."""
    trigger = trigger_of(parse_schedule(f"30 4 * * {field}"))
    fired = []
    moment = datetime(2026, 6, 1).astimezone()
    while (due := trigger.get_next_fire_time(None, moment)) < datetime(2026, 6, 8).astimezone():
        assert (due.hour, due.minute) == (4, 30)
        fired.append(WEEK[due.weekday()])
        moment = due + timedelta(seconds=1)
    assert fired == days


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hourly",
        "every",
        "every h",
        "every 1",
        "every 1w",
        "every -1h",
        "every 1.5h",
        "every 1h 30m",
        "every 0h",
        "every 9999999h",
        "Every 1h",
        "every \u0661h",
        "daily",
        "daily 24:00",
        "daily 3",
        "daily 03:60",
        "daily 03:00:00",
        "@daily",
        "* * * *",
        "* * * * * *",
        "60 * * * *",
        "* 24 * * *",
        "* * 0 * *",
        "* * * 13 *",
        "* * * * 8",
        "* * * * -1",
        "* * * * 1-9",
        "* * * * 1/0",
        "* * * * caturday",
        "* * * * 1,,2",
        "a b c d e",
        "0 0 31 2 *",
        "0 0 31 4,6,9,11 *",
        "0 0 1 * 1",
    ],
)
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_schedule(text)
    assert repr(text) in str(caught.value) or "longer than nothing" in str(caught.value)


def test_the_refusal_says_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"every 1h.*daily 03:00.*five cron fields"):
        parse_schedule("hourly")


def test_days_of_the_month_and_of_the_week_at_once_are_not_guessed_at() -> None:
    """cron takes either, the scheduler both: whoever wrote it would get far fewer snapshots."""
    with pytest.raises(ValueError, match="leave one of them"):
        parse_schedule("0 3 1,15 * mon")
