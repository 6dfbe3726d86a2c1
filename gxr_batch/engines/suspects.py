"""Rows that a process died over: how often, and what follows from that. The one rule for every engine and for `run`.

Nobody can see which of the rows in a process killed it, so each of them has one death more. A row with enough deaths is
a suspect: it runs alone from then on, so that no other row is blamed for it. One with more is condemned and fails. When
suspects get their turn, and where, is left to the engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gxr_batch.records import Key

CRASHED = "crashed the process"


class Suspects:
    """Counts deaths by row. `alone_after` of them make a suspect, `condemned_after` end its chances."""

    def __init__(
        self, deaths: Mapping[Key, int] | None = None, *, alone_after: int = 1, condemned_after: int = 2
    ) -> None:
        """`deaths` are those that are known from before."""
        self._deaths = dict(deaths or {})
        self._alone_after, self._condemned_after = alone_after, condemned_after

    def died(self, keys: Iterable[Key]) -> None:
        """Count a process that died while it had these rows."""
        for key in keys:
            self._deaths[key] = self._deaths.get(key, 0) + 1

    def settled(self, key: Key) -> None:
        """Forget a row that ended: it killed nobody."""
        self._deaths.pop(key, None)

    def is_suspect(self, key: Key) -> bool:
        """Return whether a row has to run alone."""
        return self._deaths.get(key, 0) >= self._alone_after

    def is_condemned(self, key: Key) -> bool:
        """Return whether a row is given up."""
        return self._deaths.get(key, 0) >= self._condemned_after

    @property
    def condemned(self) -> list[Key]:
        """The rows that are given up."""
        return [key for key in self._deaths if self.is_condemned(key)]

    @property
    def waiting(self) -> int:
        """How many rows have to run alone and are not given up."""
        return sum(self.is_suspect(key) and not self.is_condemned(key) for key in self._deaths)
