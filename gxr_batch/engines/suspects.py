"""Rows on which a process died: how often, and what follows. One rule for every engine and for `run`.

The row that killed a process cannot be identified, so the death counts against every row in it. A row with enough
deaths is a suspect: from then on it runs alone, so that no other row is blamed. A row with more is condemned and fails.
Each engine decides when and where its suspects run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gxr_batch.records import Key

CRASHED = "crashed the process"


class Suspects:
    """Counts deaths by row. A row is a suspect after `alone_after` deaths and fails after `condemned_after`."""

    def __init__(
        self, deaths: Mapping[Key, int] | None = None, *, alone_after: int = 1, condemned_after: int = 2
    ) -> None:
        """`deaths` are those of earlier invocations."""
        self._deaths = dict(deaths or {})
        self._alone_after, self._condemned_after = alone_after, condemned_after

    def died(self, keys: Iterable[Key]) -> None:
        """Count one death against each of these rows."""
        for key in keys:
            self._deaths[key] = self._deaths.get(key, 0) + 1

    def settled(self, key: Key) -> None:
        """Forget a row that ended without a death."""
        self._deaths.pop(key, None)

    def is_suspect(self, key: Key) -> bool:
        """Return whether a row must run alone."""
        return self._deaths.get(key, 0) >= self._alone_after

    def is_condemned(self, key: Key) -> bool:
        """Return whether a row died too often and fails."""
        return self._deaths.get(key, 0) >= self._condemned_after

    @property
    def condemned(self) -> list[Key]:
        """The condemned rows."""
        return [key for key in self._deaths if self.is_condemned(key)]

    @property
    def waiting(self) -> int:
        """How many suspects are still to run."""
        return sum(self.is_suspect(key) and not self.is_condemned(key) for key in self._deaths)
