"""Groups of layers that share a page table: those that see all positions, and those with the same window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PAGE_TOKENS = 16


@dataclass(frozen=True)
class GroupShape:
    """The layers of one group by number, their window (0 = none), and the columns of its table."""

    layers: tuple[int, ...]
    window: int
    columns: int


def groups_of(windows: Sequence[int], capacity: int, chunk: int, page_tokens: int = PAGE_TOKENS) -> list[GroupShape]:
    """Return the groups of layers with these windows, for rows of `capacity` tokens prefilled `chunk` at a time.

    While a chunk is written, its first token still sees a whole window before it.
    """
    whole = -(-capacity // page_tokens)
    found = []
    for window in sorted(set(windows)):
        ring = -(-(window + chunk) // page_tokens) + 1
        columns = min(whole, ring) if window else whole
        layers = tuple(number for number, own in enumerate(windows) if own == window)
        found.append(GroupShape(layers, window, columns))
    return found
