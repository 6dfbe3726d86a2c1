"""The night in a few dozen steps: how much was done, how fast, and how many rows were in progress. Pure arithmetic.

Tokens and seconds of a row are spread evenly from its start to its end; booked at the end alone, a night of slow rows
would look like a comb.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gxr_batch.report.aggregate import STATUSES, Floats, Tally

_STEPS_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21_600)
_MOST_STEPS = 72
# A run that stood still for so long goes on in another night; the charts show the newest.
_NIGHT_GAP_SECONDS = 6 * 3600.0
_OUTLIERS = 0.995  # share of the rows that a histogram spreads over its steps; the others are counted in its last one
_BARS = 32


class Night(NamedTuple):
    """The newest stretch of work. Moments are UTC milliseconds; every array but `edges` has one entry a step.

    `finished` counts the rows by status that were finished at each of the `edges`, those of earlier nights included.
    """

    edges: Floats
    step_seconds: float
    finished: dict[str, Floats]
    rows_a_minute: Floats
    tokens_a_second: Floats
    rows_in_progress: Floats
    earlier_rows: int


class Histogram(NamedTuple):
    """Counts between `edges`; `beyond` rows above the last edge are in the last count too."""

    edges: Floats
    counts: Floats
    beyond: int
    median: float


def night_of(tally: Tally) -> Night | None:
    """Return the newest night of a run, None where no time passed in it."""
    if not tally.rows:
        return None
    order = np.sort(tally.finished)
    breaks = np.flatnonzero(np.diff(order) > _NIGHT_GAP_SECONDS * 1000)
    first = order[breaks[-1] + 1] if len(breaks) else order[0]
    tonight = tally.finished >= first
    began, ended = float(tally.started[tonight].min()), float(order[-1])
    if ended <= began:
        return None
    edges, step = _edges(began, ended)
    spans = np.diff(edges) / 1000
    start, end, tokens = tally.started[tonight], tally.finished[tonight], np.nan_to_num(tally.new_tokens[tonight])
    took_part = np.nan_to_num(tally.seconds[tonight]) > 0
    done = {name: _by(edges, tally.finished[tally.status == code]) for code, name in enumerate(STATUSES)}
    return Night(
        edges=edges,
        step_seconds=step,
        finished=done,
        rows_a_minute=np.diff(_by(edges, end)) / spans * 60,
        tokens_a_second=np.diff(_spread(edges, start, end, tokens)) / spans,
        rows_in_progress=np.diff(_spread(edges, start, end, np.where(took_part, (end - start) / 1000, 0.0))) / spans,
        earlier_rows=int((~tonight).sum()),
    )


def _edges(began: float, ended: float) -> tuple[Floats, float]:
    """Return edges a round step apart, but for the last, which is where the night ended, and the step in seconds.

    What is left over of less than half a step belongs to the step before: over a moment, a rate says nothing.
    """
    seconds = (ended - began) / 1000
    step = next((step for step in _STEPS_SECONDS if seconds / step <= _MOST_STEPS), _STEPS_SECONDS[-1])
    before = began + np.arange(int(seconds / step) + 2) * step * 1000
    # Compared, not counted: 0.06 / 0.02 rounds to more than 3, and a step of no length would divide by nothing.
    before = before[before < ended]
    if len(before) > 1 and ended - before[-1] < step * 500:
        before = before[:-1]
    return np.append(before, ended), float(step)


def _by(edges: Floats, moments: Floats) -> Floats:
    """Return how many of the moments lie at or before each edge."""
    return np.searchsorted(np.sort(moments), edges, side="right").astype(np.float64)


def _spread(edges: Floats, start: Floats, end: Floats, amount: Floats) -> Floats:
    """Return how much of the amounts, each spread from its start to its end, lies before each edge."""
    length = np.maximum(end - start, 1e-6)
    return np.array([float((amount * np.clip((edge - start) / length, 0, 1)).sum()) for edge in edges])


def histogram(values: Floats) -> Histogram | None:
    """Return a histogram with round steps, None where there is nothing to count."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = float(values.min()), float(np.quantile(values, _OUTLIERS))
    step = _round_step((high - low) / _BARS, whole=bool((values == np.round(values)).all()))
    first = np.floor(low / step) * step
    count = max(1, int(np.ceil((high - first) / step + 1e-9)))
    edges = first + np.arange(count + 1) * step
    counts, _ = np.histogram(np.minimum(values, edges[-1]), edges)
    return Histogram(edges, counts.astype(np.float64), int((values > edges[-1]).sum()), float(np.median(values)))


def _round_step(step: float, *, whole: bool) -> float:
    """Return the next 1, 2 or 5 times a power of ten; of whole numbers at least 1."""
    least = 1.0 if whole else 1e-6
    step = max(step, least)
    power = 10.0 ** np.floor(np.log10(step))
    return float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9)))
