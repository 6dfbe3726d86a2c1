"""Paired statistics against numbers computed by hand or published."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from gxr_batch.audit import paired_tests
from gxr_batch.audit.paired_tests import mcnemar, paired_counts, paired_means


@pytest.mark.parametrize(
    ("only_this", "only_other", "p"),
    [
        (1, 9, 2 * (1 + 10) / 2**10),
        (6, 16, 2 * sum(comb(22, k) for k in range(7)) / 2**22),
        (5, 5, 1.0),
        (0, 6, 2 / 64),
        (59, 121, pytest.approx(4.434e-6, rel=1e-3)),  # McNemar's example in Wikipedia
    ],
)
def test_mcnemars_exact_p(only_this, only_other, p):
    assert mcnemar(only_this, only_other) == pytest.approx(p)
    assert mcnemar(only_other, only_this) == pytest.approx(p)


def test_without_a_row_that_differs_there_is_no_p():
    assert mcnemar(0, 0) is None


def test_counts_of_a_table_of_two_by_two():
    """Of 100 rows 10 have it in both, 12 only here, 3 only there, 75 in none."""
    this = np.repeat([True, True, False, False], [10, 12, 3, 75])
    other = np.repeat([True, False, True, False], [10, 12, 3, 75])
    found = paired_counts(this, other, np.arange(100))
    assert found[:4] == (22, 13, 12, 3)
    assert found.p == pytest.approx(2 * sum(comb(15, k) for k in range(4)) / 2**15)


def test_samples_of_a_row_count_once():
    """Three samples of each of two rows: the first has it more often here, the second equally often."""
    this = np.array([True, True, False, True, False, False])
    other = np.array([False, False, True, False, True, False])
    assert paired_counts(this, other, np.array([0, 0, 0, 1, 1, 1])) == (3, 2, 1, 0, 1.0)


@pytest.mark.parametrize("rows", [50, 400, paired_tests.MOST_RESAMPLED + 1])
def test_the_interval_covers_a_planted_shift_and_not_zero(rows):
    rng = np.random.default_rng(3)
    other = rng.normal(800, 90, rows)
    found = paired_means(other + 20 + rng.normal(0, 25, rows), other, np.arange(rows))
    assert found.low < 20 < found.high
    assert found.low > 0
    assert found.high - found.low == pytest.approx(2 * 1.96 * 25 / rows**0.5, rel=0.25)
    assert found.difference == pytest.approx(found.this - found.other)
    assert found.method == ("normal" if rows > paired_tests.MOST_RESAMPLED else "bootstrap")


def test_the_interval_holds_as_often_as_it_says():
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(200):
        shift = rng.normal(3, 10, 60)
        found = paired_means(shift, np.zeros(60), np.arange(60))
        held += found.low <= 3 <= found.high
    assert 180 <= held <= 199


def test_the_same_rows_give_the_same_interval():
    this = np.random.default_rng(1).normal(0, 1, 100)
    assert len({paired_means(this, np.zeros(100), np.arange(100)) for _ in range(3)}) == 1


def test_rows_are_drawn_not_samples(monkeypatch):
    """Four equal samples a row tell no more than one: the interval is as wide, by either method."""
    shift = np.random.default_rng(2).normal(1, 5, 80)
    for most in (10, 10_000):
        monkeypatch.setattr(paired_tests, "MOST_RESAMPLED", most)
        one = paired_means(shift, np.zeros(80), np.arange(80))
        four = paired_means(np.repeat(shift, 4), np.zeros(320), np.repeat(np.arange(80), 4))
        assert four[2:5] == pytest.approx(one[2:5])


def test_figures_that_one_run_lacks_are_left_out():
    this, other = np.array([1.0, np.nan, 5.0, 7.0]), np.array([2.0, 4.0, np.nan, 6.0])
    found = paired_means(this, other, np.array([0, 1, 2, 9]))
    assert (found.this, found.other, found.difference) == (4.0, 4.0, 0.0)
    assert paired_means(this[1:3], other[1:3], np.arange(2)) is None
    assert paired_means(this[:1], other[:1], np.arange(1))[2:] == (-1.0, None, None, "bootstrap")
