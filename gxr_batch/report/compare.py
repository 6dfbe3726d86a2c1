"""Compares two runs over the same rows, for example to judge an adapter or a template.

Rows are matched by row id and sample, in any order. Computes figures and verdicts; cases.py reads the other run's
texts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from gxr_batch.report.aggregate import STATUSES, Bools, Digest, Floats, Places, Surveyed

# Verdicts on rows of this run; `Comparison.verdicts` holds indices into this tuple.
VERDICTS = ("same text", "different text", "only in this run", "no text in one")
SAME, DIFFERENT, ALONE, TEXTLESS = range(4)


class Line(NamedTuple):
    """One line of the comparison: a figure of this run and of the other, with their `unit`."""

    name: str
    this: float | None
    other: float | None
    unit: str = ""


class Comparison(NamedTuple):
    """Counts and figures of the comparison. `verdicts` has one entry for each row of this run."""

    other: Surveyed
    matched: int
    same: int
    different: int
    without_text: int
    other_prompt: int
    only_this: int
    only_other: int
    lines: tuple[Line, ...]
    flags: tuple[Line, ...]
    verdicts: Places

    @property
    def name(self) -> str:
        """The name of the other run in the report."""
        return self.other.reader.folder.absolute().name


def compare(this: Surveyed, other: Surveyed) -> Comparison:
    """Compare two runs; both must be surveyed with `compared`."""
    assert this.digest is not None
    assert other.digest is not None
    place = pc.index_in(this.digest.keys, value_set=other.digest.keys)
    here: Bools = place.is_valid().to_numpy(zero_copy_only=False)
    at = pc.fill_null(place, 0).to_numpy(zero_copy_only=False)[here]
    mine, theirs = this.digest.texts[here], other.digest.texts[at]
    texts = (mine != 0) & (theirs != 0)
    same = mine == theirs
    verdicts = np.full(len(here), ALONE)
    verdicts[here] = np.select([~texts, same], [TEXTLESS, SAME], DIFFERENT)
    return Comparison(
        other=other,
        matched=int(here.sum()),
        same=int((texts & same).sum()),
        different=int((texts & ~same).sum()),
        without_text=int((~texts).sum()),
        other_prompt=int((this.digest.prompts[here] != other.digest.prompts[at]).sum()),
        only_this=int((~here).sum()),
        only_other=other.tally.rows - int(here.sum()),
        lines=_lines(this, other, np.flatnonzero(here), at),
        flags=_flags(this, other),
        verdicts=verdicts,
    )


def _lines(this: Surveyed, other: Surveyed, mine: Places, theirs: Places) -> tuple[Line, ...]:
    """Return figures over the rows that are in both runs."""

    def both(name: str, unit: str, figure: Any) -> Line:
        return Line(name, figure(this, mine), figure(other, theirs), unit)

    lines = (
        both("failed or held", "", lambda run, at: float((run.tally.status[at] != STATUSES.index("ok")).sum())),
        both("characters per text", "", lambda run, at: _mean(_digest(run).lengths[at])),
        both("tokens per row", "", lambda run, at: _mean(run.tally.new_tokens[at])),
        both("seconds per row", "s", lambda run, at: _mean(run.tally.seconds[at])),
    )
    judged = {name for run in (this, other) for name in run.tally.reviews if name != "unreviewed"}
    reviews = [
        Line(f"reviewed: {name.replace('_', ' ')}", this.tally.reviews[name], other.tally.reviews[name])
        for name in judged
    ]
    return (*lines, *sorted(reviews))


def _flags(this: Surveyed, other: Surveyed) -> tuple[Line, ...]:
    """Return how many rows of each run have each flag."""
    names = sorted({*this.tally.flags, *other.tally.flags})
    found = [Line(name, this.tally.flags[name], other.tally.flags[name]) for name in names]
    return (Line("any flag", this.tally.flagged, other.tally.flagged), *found)


def _digest(run: Surveyed) -> Digest:
    assert run.digest is not None
    return run.digest


def _mean(values: Floats) -> float | None:
    return float(np.nanmean(values)) if np.isfinite(values).any() else None
