"""How far two runs differ in figures of the same rows: counts with McNemar's exact test, means with an interval.

The unit is the row, not the sample, because samples of one row resemble each other: a row counts for the run in which
more of its samples have something, and intervals come from drawing rows. With one sample per row that is McNemar's
test (1947) and the usual paired bootstrap.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gxr_batch.audit.error_bounds import LEVEL

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Places = npt.NDArray[np.int64]
# With more rows the interval is the normal approximation, which is then the same and takes no time.
MOST_RESAMPLED = 10_000
RESAMPLES = 2000
_SEED = 0
_RESAMPLES_AT_ONCE = 50  # 4 MB of numbers for each


class PairedCounts(NamedTuple):
    """Texts that have something in each run, rows that have it in one run only, and McNemar's exact p.

    p is None if no row has it in one run only.
    """

    this: int
    other: int
    only_this: int
    only_other: int
    p: float | None


class PairedMeans(NamedTuple):
    """Means of the texts of each run, and the interval of their difference, None for a single row.

    `method`: "bootstrap", or "normal" for many rows.
    """

    this: float
    other: float
    difference: float
    low: float | None
    high: float | None
    method: str


def mcnemar(only_this: int, only_other: int) -> float | None:
    """Return the two-sided exact p of McNemar's test, None without a row that differs."""
    from scipy.stats import binomtest

    if not only_this + only_other:
        return None
    return float(binomtest(only_this, only_this + only_other, 0.5).pvalue)


def paired_counts(this: Bools, other: Bools, rows: npt.NDArray[np.integer]) -> PairedCounts:
    """Compare which texts have something; `rows` numbers the row of each pair of texts."""
    more = np.bincount(rows, this.astype(np.int8) - other)
    only_this, only_other = int((more > 0).sum()), int((more < 0).sum())
    return PairedCounts(int(this.sum()), int(other.sum()), only_this, only_other, mcnemar(only_this, only_other))


def paired_means(
    this: npt.NDArray[np.floating], other: npt.NDArray[np.floating], rows: npt.NDArray[np.integer]
) -> PairedMeans | None:
    """Compare figures of texts where both are numbers; None if there are none. `rows` as in `paired_counts`."""
    known = np.isfinite(this) & np.isfinite(other)
    if not known.any():
        return None
    this, other, rows = this[known], other[known], rows[known]
    each_texts = np.bincount(rows)
    present = each_texts > 0
    sums = np.asarray(np.bincount(rows, np.subtract(this, other, dtype=np.float64))[present], np.float64)
    texts: Floats = each_texts[present].astype(np.float64)
    low, high, method = _interval(sums, texts)
    means = [float(one.mean(dtype=np.float64)) for one in (this, other)]
    return PairedMeans(means[0], means[1], float(sums.sum() / texts.sum()), low, high, method)


def _interval(sums: Floats, texts: Floats) -> tuple[float | None, float | None, str]:
    """Return the interval of the mean difference of texts, given each row's sum of differences and texts."""
    from scipy.stats import bootstrap, norm

    if len(sums) < 2:
        return None, None, "bootstrap"
    if len(sums) > MOST_RESAMPLED:
        mean = sums.sum() / texts.sum()
        spread = np.sqrt(((sums - mean * texts) ** 2).sum() * len(sums) / (len(sums) - 1)) / texts.sum()
        reach = norm.ppf((1 + LEVEL) / 2) * spread
        return float(mean - reach), float(mean + reach), "normal"
    found = bootstrap(
        (sums, texts),
        lambda sums, texts, axis: sums.sum(axis=axis) / texts.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=_RESAMPLES_AT_ONCE,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return float(found.low), float(found.high), "bootstrap"
