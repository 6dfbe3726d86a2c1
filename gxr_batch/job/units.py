"""How durations, sizes and times of day are written in a job file and on the command line."""

from __future__ import annotations

import re
from datetime import datetime, time, timedelta

_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|m|h)\s*", re.ASCII)
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(MiB|GiB|MB|GB)\s*", re.ASCII | re.IGNORECASE)
_BYTES = {"mib": 2**20, "gib": 2**30, "mb": 10**6, "gb": 10**9}


def parse_duration(text: str) -> float | None:
    """Return seconds for "90s", "30m" or "7h"; None for "". Raises ValueError for anything else."""
    if not text:
        return None
    match = _DURATION.fullmatch(text)
    if match is None or float(match[1]) == 0:
        raise ValueError('must be a duration such as "90s", "30m" or "7h"')
    return float(match[1]) * _SECONDS[match[2]]


def parse_bytes(text: str) -> int | None:
    """Return bytes for "20GiB" or "800 MB"; None for "". Raises ValueError for anything else."""
    if not text:
        return None
    match = _SIZE.fullmatch(text)
    if match is None or float(match[1]) == 0:
        raise ValueError('must be a size such as "20GiB" or "800MiB"')
    return int(float(match[1]) * _BYTES[match[2].lower()])


def parse_clock(text: str) -> time | None:
    """Return the local time of day for "06:00"; None for "". Raises ValueError for anything else."""
    if not text:
        return None
    match = re.fullmatch(r"([01]?\d|2[0-3]):([0-5]\d)", text, re.ASCII)
    if match is None:
        raise ValueError('must be a time of day such as "06:00"')
    return time(int(match[1]), int(match[2]))


def seconds_until(clock: time, now: datetime) -> float:
    """Return the seconds from `now` (local, naive) to the next such local time, also across a clock change."""
    target = now.replace(hour=clock.hour, minute=clock.minute, second=0, microsecond=0)
    if target <= now:
        target += timedelta(days=1)
    return (target.astimezone() - now.astimezone()).total_seconds()
