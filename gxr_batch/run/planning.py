"""Pure planning: a row's seed, the order of work within a window, and when a run has to stop. No torch, no files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
_FIRST_WINDOW = 256
# Measured bytes per generated token in parts and results together, uncompressed and rounded up.
_BYTES_A_TOKEN = 16
_BYTES_A_ROW = 512


def row_seed(run_seed: int, row_id: str, sample: int, attempt: int) -> int:
    """Return the 31 bits of sha256 that seed one attempt at one sample of one row."""
    text = f"{run_seed}\x1f{row_id}\x1f{sample}\x1f{attempt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def longest_first(items: Iterable[T], window: int, length: Callable[[T], int]) -> Iterator[T]:
    """Yield the items, each `window` of them sorted by descending length.

    Rows of similar length are then adjacent (less padding), and memory problems show at once instead of at the end. The
    next window is filled while this one is handed out, two items for each, so that no single call takes long; the first
    windows are small and double, so that work begins at once.
    """
    source = iter(items)
    batch = list(islice(source, min(window, _FIRST_WINDOW)))
    while batch:
        batch.sort(key=length, reverse=True)
        following: list[T] = []
        for item in batch:
            yield item
            following += islice(source, min(2, window - len(following)))
        batch = following


def drain_at(deadline: float, row_seconds: float) -> float:
    """Return the moment to stop taking rows so that those in flight finish before the deadline, with a 25% margin."""
    return deadline - 1.25 * row_seconds


def too_many_failed(limit: float | int | str, failed: int, done: int) -> bool:
    """Return whether more rows failed than the limit allows: a share of `done` from the 50th on, or a count."""
    if isinstance(limit, str):
        return False
    return done >= 50 and failed > limit * done if limit < 1 else failed > limit


def disk_needed(keys: int, max_new_tokens: int, table_bytes: int) -> int:
    """Return the most bytes on disk that generating `keys` may take, including the copies of the table."""
    return 2 * table_bytes + keys * (_BYTES_A_ROW + _BYTES_A_TOKEN * max_new_tokens)
