"""Two measures of time for the driver: the offset of a worker's wall clock, and time divided among busy workers."""

from __future__ import annotations

import time

# Quartz clocks drift less than this (NTP's bound for a broken clock is 500 ppm; 50 ppm is usual).
_STRAY = 50e-6


class Offset:
    """How far a worker's wall clock is ahead of the driver's, from the four timestamps of a call, as in NTP (RFC 5905).

    The true offset is within half the call's transit time. An offset no larger than that cannot be distinguished from
    none and counts as none; on one host it always does.
    """

    def __init__(self) -> None:
        self.seconds, self.within = 0.0, float("inf")
        self._heard_at = 0.0

    def heard(self, sent: float, received: float, answered: float, back: float) -> None:
        """Record a call: sent and back by the driver's clock, received and answered by the worker's (seconds)."""
        within = max((back - sent) - (answered - received), 0.0) / 2
        if within <= self.within + _STRAY * (back - self._heard_at):
            self.seconds, self.within = ((received - sent) + (answered - back)) / 2, within
            self._heard_at = back

    @property
    def known(self) -> bool:
        """True if the clocks differ by more than the measurement's uncertainty."""
        return abs(self.seconds) > self.within

    def here(self, milliseconds: int) -> int:
        """Convert a timestamp of the worker (UTC milliseconds) to the driver's clock."""
        return milliseconds - round(self.seconds * 1000) if self.known else milliseconds


class Meter:
    """The integral over time of 1/n with n busy workers, so that shares of all rows add up to the pool's busy time.

    A worker's engine divides its own time among its rows; with n - 1 other busy workers, 1/n of that counts. Over a
    row's lifetime n is averaged, which is exact if it did not change.
    """

    def __init__(self) -> None:
        self._busy, self._at, self._integral = 0, time.monotonic(), 0.0

    def busy(self, workers: int) -> None:
        """Record how many workers have rows from now on."""
        self.mark()
        self._busy = workers

    def mark(self) -> tuple[float, float]:
        """Return this moment and the integral up to it."""
        now = time.monotonic()
        self._integral += (now - self._at) / max(self._busy, 1)
        self._at = now
        return now, self._integral

    def part(self, since: tuple[float, float]) -> float:
        """Return the mean of 1/n since a mark."""
        now, integral = self.mark()
        return (integral - since[1]) / (now - since[0]) if now > since[0] else 1 / max(self._busy, 1)
