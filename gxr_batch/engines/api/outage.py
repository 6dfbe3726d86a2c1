"""Knows since when a server gives no answer, says so once, and gives up after a time. Shared by two threads."""

from __future__ import annotations

import time

from gxr_batch.engines.api.server_faults import Trouble
from gxr_batch.engines.base import Say
from gxr_batch.errors import ApiOutage

_SAID_AFTER_SECONDS = 30.0


class Outage:
    """The time since the last answer, as far as there was trouble since then.

    Time in which the server wants no requests (Retry-After) is trouble too, whatever else it answers meanwhile.
    Requests report from the event loop's thread; the stream looks from its own. Every field is written whole.
    """

    def __init__(self, place: str, give_up_seconds: float, say: Say) -> None:
        self.place, self._give_up_seconds, self._say = place, give_up_seconds, say
        # From the start, since a server may also take the first question and say nothing.
        self._trouble: tuple[float, str] | None = (time.monotonic(), "has not answered yet")
        self._waits_until = 0.0  # time.monotonic seconds
        self._said = False

    def trouble(self, fault: Trouble) -> None:
        """Take in a request that failed in a way that may pass."""
        now = time.monotonic()
        since = self._trouble[0] if self._trouble else now
        wait, what = fault.retry_after or 0.0, fault.what
        self._waits_until = max(self._waits_until, now + wait)
        self._trouble = (since, f"{what} and wants no request for {spelled(wait)}" if wait >= 1 else what)

    def alive(self) -> None:
        """Take in an answer, or a refusal: that too comes from a server that works."""
        now = time.monotonic()
        # What still waits may be all that is left to do.
        self._trouble = (now, self._trouble[1]) if self._trouble and now < self._waits_until else None

    def look(self, until: float = float("inf")) -> None:
        """Say once that an outage lasts, and once that it is over.

        Raises ApiOutage where it lasts too long, or beyond `until` (time.monotonic seconds).
        """
        trouble = self._trouble
        if trouble is None:
            if self._said:
                self._say("The server answers again.")
            self._said = False
            return
        since, what = trouble
        lasts = time.monotonic() - since
        if lasts >= self._give_up_seconds or time.monotonic() >= until:
            raise ApiOutage(
                f"For {spelled(lasts)} no request was answered; the last one failed because the server {what}.",
                where=self.place,
                next_step="look after the server, then run the same command again",
            )
        if not self._said and lasts >= min(_SAID_AFTER_SECONDS, self._give_up_seconds / 2):
            self._said = True
            self._say(
                f"The server {what}, and answered nothing for {spelled(lasts)} ({self.place}). Trying on; without an "
                f"answer the run stops after {spelled(self._give_up_seconds)}, and can be resumed."
            )


def spelled(seconds: float) -> str:
    """Spell a duration for a person."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"
    return f"{seconds / 60:,.0f} min"
