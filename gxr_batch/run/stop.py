"""Why and when a run stops before its rows are done: a signal, a clock, too many failures, an unresponsive server."""

from __future__ import annotations

import time
from collections import deque
from datetime import datetime
from typing import Literal

from gxr_batch.engines.base import StopRequest
from gxr_batch.job import RunSection
from gxr_batch.job.units import parse_clock, parse_duration, seconds_until
from gxr_batch.records import Result
from gxr_batch.run.planning import drain_at, too_many_failed

StopReason = Literal["interrupt", "terminate", "stop_by", "time_limit", "max_failed", "api_outage"]


class Stopper:
    """Asks the engine's stream to end, once, and keeps the reason. Safe to call from a signal handler."""

    def __init__(self, grace_seconds: float = 20) -> None:
        self.request = StopRequest()
        self.reason: StopReason | None = None
        self.grace_seconds = grace_seconds

    def ask(self, reason: StopReason, *, deadline: float | None = None) -> None:
        """Take no more rows; those in flight may finish until `deadline` (monotonic), by default the grace period."""
        self.reason = self.reason or reason
        # A later request may only make the end earlier: a signal does not wait for a stop-by time hours away.
        self.request.drain(time.monotonic() + self.grace_seconds if deadline is None else deadline)


class Watch:
    """Watches the clock and the failures of one invocation and asks the stopper when it is time."""

    def __init__(self, settings: RunSection, stopper: Stopper, started: float) -> None:
        self.stopper = stopper
        self._max_failed = settings.max_failed
        self._done = self._failed = 0
        # The slowest recent row is the estimate for the rows in flight.
        self._recent: deque[float] = deque([0.0], maxlen=64)
        self._deadlines: list[tuple[float, StopReason]] = []
        if (limit := parse_duration(settings.time_limit)) is not None:
            self._deadlines.append((started + limit, "time_limit"))
        if (clock := parse_clock(settings.stop_by)) is not None:
            self._deadlines.append((time.monotonic() + seconds_until(clock, datetime.now()), "stop_by"))

    @property
    def until(self) -> float:
        """When the invocation has to end at the latest (time.monotonic seconds)."""
        return min((deadline for deadline, _ in self._deadlines), default=float("inf"))

    def saw(self, result: Result) -> None:
        """Record a row from the engine."""
        self._done += 1
        self._failed += result.status == "failed"
        self._recent.append(result.seconds_generating or 0.0)
        if too_many_failed(self._max_failed, self._failed, self._done):
            self.stopper.ask("max_failed", deadline=time.monotonic())

    def look(self) -> None:
        """Ask to stop if the rows in flight need the time left before a deadline."""
        now = time.monotonic()
        for deadline, reason in self._deadlines:
            if now >= drain_at(deadline, max(self._recent)):
                self.stopper.ask(reason, deadline=deadline)
