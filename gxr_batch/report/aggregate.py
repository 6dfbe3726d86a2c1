"""What one pass over all rows of a run counts: a few numbers a row and a few sums, so that a million rows fit."""

from __future__ import annotations

import re
from collections import Counter
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gxr_batch.ledger.parts import STATUS_NAMES

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
STATUSES: tuple[str, ...] = tuple(STATUS_NAMES.to_pylist())
_FIGURES = ("gxr_new_tokens", "gxr_seconds_generating", "gxr_rows_in_batch")
_MOMENTS = ("gxr_started_at", "gxr_finished_at")
_DIGITS = re.compile(r"\d[\d,.]*(?<=\d)")
# Kinds of failures that are told apart. A kind more is a sentence that holds something of its row.
_REASONS = 200


class Tally:
    """Counts of the rows that were added, and for each row a few figures as arrays (NaN = not measured)."""

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
        """Take in finished rows; return which of them deserve a look first: failed, held or flagged."""
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
            self._book_reasons(table.filter(pa.array(bad)).select(["gxr_row_id", "gxr_error"]))
        return bad | flagged

    def _book_reasons(self, bad: pa.Table) -> None:
        for row_id, error in zip(*(bad[name].to_pylist() for name in bad.column_names), strict=True):
            kind = _DIGITS.sub("…", error or "no reason recorded")
            if kind not in self.reasons and len(self.reasons) >= _REASONS:
                kind = "other reasons"
            self.reasons[kind] += 1
            self.reason_rows.setdefault(kind, row_id)

    @cached_property
    def status(self) -> npt.NDArray[np.int8]:
        """The place in STATUSES of every row."""
        return np.concatenate([np.zeros(0, np.int8), *self._status])

    @cached_property
    def new_tokens(self) -> Floats:
        """Tokens that each row was given."""
        return self._all("gxr_new_tokens")

    @cached_property
    def seconds(self) -> Floats:
        """Seconds that each row was worked on beside its neighbours."""
        return self._all("gxr_seconds_generating")

    @cached_property
    def rows_in_batch(self) -> Floats:
        """How many rows were decoded beside each row on average, itself included."""
        return self._all("gxr_rows_in_batch")

    @cached_property
    def started(self) -> Floats:
        """When each row was begun, in UTC milliseconds since 1970."""
        return self._all("gxr_started_at")

    @cached_property
    def finished(self) -> Floats:
        """When each row ended, in UTC milliseconds since 1970."""
        return self._all("gxr_finished_at")

    def _all(self, name: str) -> Floats:
        return np.concatenate([np.zeros(0), *self._figures.pop(name)])


def _numbers(column: pa.ChunkedArray) -> Floats:
    return np.asarray(column.cast(pa.float64(), safe=False).to_numpy(), np.float64)


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    counted = column.value_counts()
    pairs = zip(counted.field(0).to_pylist(), counted.field(1).to_pylist(), strict=True)
    return {name: count for name, count in pairs if name is not None}
