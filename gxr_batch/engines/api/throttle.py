"""How many requests are sent at a time: fewer while the server says that it has too much to do, more again later."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_LOOK_SECONDS = 0.02


class Throttle:
    """A gate for requests, used on one event loop. A flooded server halves the room; each round of answers adds one."""

    def __init__(self, most: int) -> None:
        self._most = self.room = most
        self._inside = self._answered = 0
        self._closed_until = self._halved_at = 0.0

    @asynccontextmanager
    async def entered(self) -> AsyncIterator[None]:
        """Wait for room, and hold it inside the block."""
        # Looking is simpler than waking, and a look costs nothing beside a request.
        while self._inside >= self.room or time.monotonic() < self._closed_until:
            await asyncio.sleep(_LOOK_SECONDS)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def flooded(self, started_at: float, retry_after: float | None) -> None:
        """Take in that the server had too much to do for a request of this start (time.monotonic seconds).

        Requests of one flood halve the room once. `retry_after` seconds hold for every request, not for this one alone.
        """
        self._answered = 0
        if started_at >= self._halved_at:
            self._halved_at = time.monotonic()
            self.room = max(1, self.room // 2)
        self._closed_until = max(self._closed_until, time.monotonic() + (retry_after or 0.0))

    def answered(self) -> None:
        """Take in an answer."""
        self._answered += 1
        if self._answered >= self.room:
            self._answered = 0
            self.room = min(self._most, self.room + 1)


class Meter:
    """Divides time among the requests in flight: two integrals over time, of 1/n and of n."""

    def __init__(self) -> None:
        self._inside, self._at = 0, time.monotonic()
        self._shares = self._rows = 0.0

    def enter(self) -> tuple[float, float, float]:
        """Count a request in and return a mark of this moment."""
        mark = self._mark()
        self._inside += 1
        return mark

    def leave(self, mark: tuple[float, float, float]) -> tuple[float, float, float]:
        """Count a request out; return its seconds, its share of them, and the mean of requests in flight."""
        now = self._mark()
        self._inside -= 1
        seconds, share, rows = (end - begin for end, begin in zip(now, mark, strict=True))
        return seconds, share, rows / seconds if seconds > 0 else float(self._inside + 1)

    def _mark(self) -> tuple[float, float, float]:
        now = time.monotonic()
        if self._inside:
            self._shares += (now - self._at) / self._inside
            self._rows += (now - self._at) * self._inside
        self._at = now
        return now, self._shares, self._rows
