"""Compares two runs over the same rows, for example to judge an adapter or a template.

audit/comparison.py pairs the rows and computes the figures; this adds figures that only the report has. cases.py reads
the other run's texts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from gxr_batch.audit import comparison
from gxr_batch.report.aggregate import STATUSES, Floats, Surveyed


class Line(NamedTuple):
    """One line of the comparison: a figure of this run and of the other, with their `unit`."""

    name: str
    this: float | None
    other: float | None
    unit: str = ""


class Comparison(NamedTuple):
    """The other run, what compares the rows, and figures without a test."""

    other: Surveyed
    compared: comparison.Compared
    lines: tuple[Line, ...]

    @property
    def name(self) -> str:
        """The name of the other run in the report."""
        return self.other.reader.folder.absolute().name


def compare(this: Surveyed, other: Surveyed) -> Comparison:
    """Compare two runs; each must be surveyed with the other."""
    assert this.digest is not None
    assert other.digest is not None
    compared = comparison.compare(this.digest, other.digest)
    return Comparison(other, compared, _lines(this, other, compared))


def _lines(this: Surveyed, other: Surveyed, compared: comparison.Compared) -> tuple[Line, ...]:
    """Return figures over the rows that are in both runs, and how many rows of each run are reviewed."""

    def both(name: str, unit: str, figure: Any) -> Line:
        return Line(name, figure(this, compared.mine), figure(other, compared.theirs), unit)

    lines = (
        both("failed or held", "", lambda run, at: float((run.tally.status[at] != STATUSES.index("ok")).sum())),
        both("seconds per row", "s", lambda run, at: _mean(run.tally.seconds[at])),
    )
    judged = {name for run in (this, other) for name in run.tally.reviews if name != "unreviewed"}
    reviews = [
        Line(f"reviewed: {name.replace('_', ' ')}", this.tally.reviews[name], other.tally.reviews[name])
        for name in judged
    ]
    return (*lines, *sorted(reviews))


def _mean(values: Floats) -> float | None:
    return float(np.nanmean(values)) if np.isfinite(values).any() else None
