"""Divides the engine's steps among their rows: two integrals over time, of 1/n and of n rows.

vLLM tells how many rows a step had, and of each row when it was first scheduled and when its last token came. A row's
share is what the integral grew by between the two, so shares add up to the time in which there was any row.
"""

from __future__ import annotations

from bisect import bisect_right

_KEPT = 4096


class Steps:
    """The steps so far. Moments are time.monotonic seconds and never go back."""

    def __init__(self) -> None:
        self._moments = [0.0]
        self._shares = [0.0]
        self._rows = [0.0]

    def wake(self, now: float) -> None:
        """Count the time up to now to nobody: the engine had nothing to do."""
        self._add(now, 0.0, 0.0)

    def step(self, now: float, rows: int) -> None:
        """Take in a step that ended now and had so many rows, at least one."""
        seconds = max(0.0, now - self._moments[-1])
        self._add(now, seconds / max(rows, 1), seconds * max(rows, 1))

    def between(self, began: float, ended: float) -> tuple[float, float]:
        """Return the share, in seconds, of a row that was in every step between two moments, and its mean rows."""
        share, rows = (self._at(ended, sums) - self._at(began, sums) for sums in (self._shares, self._rows))
        return share, rows / (ended - began) if ended > began else 1.0

    def forget(self, before: float) -> None:
        """Let go of steps that ended before a moment, once there are many."""
        if len(self._moments) > _KEPT:
            cut = max(0, bisect_right(self._moments, before) - 1)
            for sums in (self._moments, self._shares, self._rows):
                del sums[:cut]

    def _add(self, now: float, share: float, rows: float) -> None:
        self._moments.append(max(now, self._moments[-1]))
        self._shares.append(self._shares[-1] + share)
        self._rows.append(self._rows[-1] + rows)

    def _at(self, moment: float, sums: list[float]) -> float:
        """Return a sum as it stood at a moment, a straight line between two steps."""
        right = bisect_right(self._moments, moment)
        if right == 0:
            return sums[0]
        if right == len(sums):
            return sums[-1]
        began, ended = self._moments[right - 1], self._moments[right]
        low, high = sums[right - 1], sums[right]
        return low + (high - low) * (moment - began) / (ended - began)
