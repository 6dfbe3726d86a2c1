"""Reads the rows of a run once: counts them, keeps the cases to show, and computes series of figures.

Of rows that are not shown it keeps a few numbers each, so that a million rows fit in memory. charts.py and page.py
present the results.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gxr_batch.audit.row_digest import Digest
from gxr_batch.ledger import RunReader
from gxr_batch.ledger.parts import STATUS_NAMES
from gxr_batch.records import CONTENT_HASH

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Places = npt.NDArray[np.int64]
# Maximum number of cases in the table. For a longer run, the report states which ones it shows.
MOST_CASES = 10_000


class Surveyed(NamedTuple):
    """A run after one pass over its rows; `digest` is set only for a comparison."""

    reader: RunReader
    tally: Tally
    chooser: Chooser
    digest: Digest | None
    include_held: bool


def survey(
    reader: RunReader, *, most_cases: int = MOST_CASES, other: RunReader | None = None, include_held: bool = False
) -> Surveyed:
    """Read all finished rows, and keep a digest to compare them with `other`. Raises RunError, StorageError.

    Held rows have texts only with `include_held`.
    """
    tally, chooser, digest = Tally(), Chooser(most_cases), Digest(reader, other) if other is not None else None
    for table in reader.finished(include_held=include_held, with_content_hash=digest is not None):
        if digest is not None:
            digest.add(table)
            table = table.drop_columns([CONTENT_HASH])  # noqa: PLW2901
        chooser.add(table, tally.add(table))
    return Surveyed(reader, tally, chooser, digest, include_held)


STATUSES: tuple[str, ...] = tuple(STATUS_NAMES.to_pylist())
_FIGURES = ("gxr_new_tokens", "gxr_seconds_generating", "gxr_rows_in_batch")
_MOMENTS = ("gxr_started_at", "gxr_finished_at")
_DIGITS = re.compile(r"\d[\d,.]*(?<=\d)")
# Maximum number of reasons counted separately. With more of them, reasons probably hold content of their rows.
_REASONS = 200


class Tally:
    """Counts over the added rows, and a few figures of each row as arrays (NaN = not measured)."""

    def __init__(self) -> None:
        self.rows = 0
        self.flagged = 0
        self.flags: Counter[str] = Counter()
        self.finish_reasons: Counter[str] = Counter()
        self.reviews: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.reason_rows: dict[str, str] = {}
        self._status: list[npt.NDArray[np.int8]] = []
        self._figures: dict[str, list[Floats]] = {name: [] for name in (*_FIGURES, *_MOMENTS)}

    def add(self, table: pa.Table) -> Bools:
        """Add finished rows; return which of them are failed, held or flagged."""
        self.rows += table.num_rows
        status = pc.index_in(table["gxr_status"], value_set=STATUS_NAMES).to_numpy()
        self._status.append(status.astype(np.int8))
        for name in _FIGURES:
            self._figures[name].append(_numbers(table[name]))
        for name in _MOMENTS:
            self._figures[name].append(_numbers(table[name].cast(pa.int64())))
        self.finish_reasons.update(_counts(table["gxr_finish_reason"]))
        self.reviews.update(_counts(table["gxr_review_status"]))
        self.flags.update(_counts(pc.list_flatten(table["gxr_flags"])))
        flagged: Bools = pc.fill_null(pc.greater(pc.list_value_length(table["gxr_flags"]), 0), False).to_numpy()
        self.flagged += int(flagged.sum())
        bad: Bools = status != STATUSES.index("ok")
        if bad.any():
            self._count_reasons(table.filter(pa.array(bad)).select(["gxr_row_id", "gxr_error"]))
        return bad | flagged

    def _count_reasons(self, bad: pa.Table) -> None:
        for row_id, error in zip(*(bad[name].to_pylist() for name in bad.column_names), strict=True):
            kind = _DIGITS.sub("…", error or "no reason recorded")
            if kind not in self.reasons and len(self.reasons) >= _REASONS:
                kind = "other reasons"
            self.reasons[kind] += 1
            self.reason_rows.setdefault(kind, row_id)

    @cached_property
    def status(self) -> npt.NDArray[np.int8]:
        """The index in STATUSES of each row."""
        return np.concatenate([np.zeros(0, np.int8), *self._status])

    @cached_property
    def new_tokens(self) -> Floats:
        """New tokens of each row."""
        return self._all("gxr_new_tokens")

    @cached_property
    def seconds(self) -> Floats:
        """Seconds of generation of each row, with other rows in the batch."""
        return self._all("gxr_seconds_generating")

    @cached_property
    def rows_in_batch(self) -> Floats:
        """Average number of rows in the batch while each row was decoded, itself included."""
        return self._all("gxr_rows_in_batch")

    @cached_property
    def started(self) -> Floats:
        """When each row started, in UTC milliseconds since 1970."""
        return self._all("gxr_started_at")

    @cached_property
    def finished(self) -> Floats:
        """When each row finished, in UTC milliseconds since 1970."""
        return self._all("gxr_finished_at")

    def _all(self, name: str) -> Floats:
        return np.concatenate([np.zeros(0), *self._figures.pop(name)])


def _numbers(column: pa.ChunkedArray) -> Floats:
    return np.asarray(column.cast(pa.float64(), safe=False).to_numpy(), np.float64)


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    counted = column.value_counts()
    pairs = zip(counted.field(0).to_pylist(), counted.field(1).to_pylist(), strict=True)
    return {name: count for name, count in pairs if name is not None}


class Cases(NamedTuple):
    """Rows of a run in input order, with their positions among all finished rows, counted from 0."""

    table: pa.Table
    places: Places
    marked_only: bool = False


class Chooser:
    """Keeps the first marked and the first unmarked rows, at most as many of each as the table shows."""

    def __init__(self, most: int) -> None:
        self._most, self._seen = most, 0
        self._kept: dict[bool, list[Cases]] = {True: [], False: []}
        self._counts = {True: 0, False: 0}

    def add(self, table: pa.Table, marked: Bools) -> None:
        """Add finished rows; `marked`: which of them are failed, held or flagged."""
        for kind, kept in self._kept.items():
            left = self._most - sum(cases.table.num_rows for cases in kept)
            at = np.flatnonzero(marked == kind)
            self._counts[kind] += len(at)
            if left > 0 and len(at):
                kept.append(Cases(table.take(pa.array(at[:left])), at[:left] + self._seen))
        self._seen += table.num_rows

    def cases(self, schema: pa.Schema, most: int) -> Cases:
        """Return up to `most` cases in input order, choosing marked ones first."""
        pieces: list[Cases] = []
        left = most
        for kind in (True, False):
            for cases in self._kept[kind]:
                pieces.append(Cases(cases.table.slice(0, left), cases.places[:left]))
                left -= pieces[-1].table.num_rows
        table = pa.concat_tables([schema.empty_table(), *(piece.table for piece in pieces)])
        places = np.concatenate([np.zeros(0, np.int64), *(piece.places for piece in pieces)])
        order = np.argsort(places)
        return Cases(table.take(pa.array(order)), places[order], marked_only=self._counts[True] >= most)


_STEPS_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21_600)
_MOST_STEPS = 72
_DAY_SECONDS = 86_400
_LAST_MOMENT = 253_370_764_800_000.0  # year 9999 in milliseconds, which Python's dates end with
# A gap of this length between finished rows starts a new period; the charts show the latest one.
_GAP_SECONDS = 6 * 3600.0
_OUTLIERS = 0.995  # quantile at which a histogram ends; rows above it are counted in the last bar
_BARS = 32


class Period(NamedTuple):
    """The latest period of work. Times are UTC milliseconds; rates have one entry per step between `edges`.

    `finished`: rows finished by each of the `edges`, by status, including those of earlier periods.
    """

    edges: Floats
    step_seconds: float
    finished: dict[str, Floats]
    rows_a_minute: Floats
    tokens_a_second: Floats
    rows_in_progress: Floats
    earlier_rows: int


class Histogram(NamedTuple):
    """Counts between `edges`; the last count includes the `beyond` rows above the last edge."""

    edges: Floats
    counts: Floats
    beyond: int
    median: float


def newest_period(tally: Tally) -> Period | None:
    """Return the latest period of work, or None if no time passed in it."""
    # Earlier versions may lack the times.
    timed = _plausible(tally.started) & _plausible(tally.finished)
    if not timed.any():
        return None
    started, finished = tally.started[timed], tally.finished[timed]
    order = np.sort(finished)
    breaks = np.flatnonzero(np.diff(order) > _GAP_SECONDS * 1000)
    first = order[breaks[-1] + 1] if len(breaks) else order[0]
    in_period = finished >= first
    began, ended = float(started[in_period].min()), float(order[-1])
    if ended <= began:
        return None
    edges, step = _edges(began, ended)
    spans = np.diff(edges) / 1000
    start, end, tokens = started[in_period], finished[in_period], np.nan_to_num(tally.new_tokens[timed][in_period])
    took_part = np.nan_to_num(tally.seconds[timed][in_period]) > 0
    done = {name: _by(edges, finished[tally.status[timed] == code]) for code, name in enumerate(STATUSES)}
    return Period(
        edges=edges,
        step_seconds=step,
        finished=done,
        rows_a_minute=np.diff(_by(edges, end)) / spans * 60,
        tokens_a_second=np.diff(_spread(edges, start, end, tokens)) / spans,
        rows_in_progress=np.diff(_spread(edges, start, end, np.where(took_part, (end - start) / 1000, 0.0))) / spans,
        earlier_rows=int((~in_period).sum()),
    )


def _plausible(moments: Floats) -> Bools:
    return np.asarray((moments >= 0) & (moments < _LAST_MOMENT))


def _edges(began: float, ended: float) -> tuple[Floats, float]:
    """Return edges a round step apart, except the last, which is the end of the period, and the step in seconds.

    A remainder of less than half a step is added to the step before, because a rate over a short time is misleading.
    """
    seconds = (ended - began) / 1000
    days = np.ceil(seconds / _MOST_STEPS / _DAY_SECONDS) * _DAY_SECONDS  # months of work, or a clock that was set
    step = next((step for step in _STEPS_SECONDS if seconds / step <= _MOST_STEPS), days)
    before = began + np.arange(int(seconds / step) + 2) * step * 1000
    # Compare instead of counting: 0.06 / 0.02 rounds to more than 3, and an empty step would divide by zero.
    before = before[before < ended]
    if len(before) > 1 and ended - before[-1] < step * 500:
        before = before[:-1]
    return np.append(before, ended), float(step)


def _by(edges: Floats, moments: Floats) -> Floats:
    """Return how many of the times are at or before each edge."""
    return np.searchsorted(np.sort(moments), edges, side="right").astype(np.float64)


def _spread(edges: Floats, start: Floats, end: Floats, amount: Floats) -> Floats:
    """Return the sum of the amounts before each edge, each amount spread evenly from its start to its end."""
    length = np.maximum(end - start, 1e-6)
    return np.array([float((amount * np.clip((edge - start) / length, 0, 1)).sum()) for edge in edges])


def histogram(values: Floats) -> Histogram | None:
    """Return a histogram with round steps, or None if there is nothing to count."""
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
    """Return the next larger 1, 2 or 5 times a power of ten; at least 1 for whole numbers."""
    least = 1.0 if whole else 1e-6
    step = max(step, least)
    power = 10.0 ** np.floor(np.log10(step))
    return float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9)))
