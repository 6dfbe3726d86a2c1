"""Tracks how long a server has given no answer, reports it once, and gives up in the end. Shared by two threads."""

from __future__ import annotations

import time

from gxr_batch.engines.api.server_faults import Trouble
from gxr_batch.engines.base import Say
from gxr_batch.errors import ApiOutage

_SAID_AFTER_SECONDS = 30.0


class Outage:
    """The time since the last answer, if there has been trouble since then.

    Time in which the server asks for no requests (Retry-After) is trouble too, whatever else it answers meanwhile.
    Requests report from the event loop's thread; the stream checks from its own. Each field is assigned atomically.
    """

    def __init__(self, place: str, give_up_seconds: float, say: Say) -> None:
        self.place, self._give_up_seconds, self._say = place, give_up_seconds, say
        # From the start, since a server may also accept the first question and never answer.
        self._trouble: tuple[float, str] | None = (time.monotonic(), "has not answered yet")
        self._waits_until = 0.0  # time.monotonic seconds
        self._said = False

    def trouble(self, fault: Trouble) -> None:
        """Record a request that failed in a way that may pass."""
        now = time.monotonic()
        since = self._trouble[0] if self._trouble else now
        wait, what = fault.retry_after or 0.0, fault.what
        self._waits_until = max(self._waits_until, now + wait)
        self._trouble = (since, f"{what} and asked to wait {spelled(wait)}" if wait >= 1 else what)

    def alive(self) -> None:
        """Record an answer, or a refusal, which also shows that the server works."""
        now = time.monotonic()
        # The rows that wait for Retry-After may be all that is left to do.
        self._trouble = (now, self._trouble[1]) if self._trouble and now < self._waits_until else None

    def look(self) -> None:
        """Report once that an outage lasts, and once that it is over. Raises ApiOutage if it lasts too long."""
        trouble = self._trouble
        if trouble is None:
            if self._said:
                self._say("The server is answering again.")
            self._said = False
            return
        since, what = trouble
        lasts = time.monotonic() - since
        if lasts >= self._give_up_seconds:
            raise ApiOutage(
                f"No request was answered for {spelled(lasts)}; the last one failed because the server {what}.",
                where=self.place,
                next_step="check the server, then run the same command again",
            )
        if not self._said and lasts >= min(_SAID_AFTER_SECONDS, self._give_up_seconds / 2):
            self._said = True
            self._say(
                f"The server {what} (no answer for {spelled(lasts)}, {self.place}). Retrying; the run stops after "
                f"{spelled(self._give_up_seconds)} without an answer and can be resumed."
            )


def spelled(seconds: float) -> str:
    """Format a duration for a person."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"
    return f"{seconds / 60:,.0f} min"
