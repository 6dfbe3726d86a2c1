"""Bounds of error rates: what is known of them, and how often they hold for a reader who follows the advice."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from gxr_batch.audit.error_bounds import Stratum, _evidence, advice, bound, error_rate, single_look_bound, to_read


@pytest.mark.parametrize(
    ("read", "erroneous", "most"), [(149, 0, 0.0199), (300, 3, 0.0256), (10, 10, 1.0), (59, 0, 0.0495)]
)
def test_clopper_and_pearsons_bound_of_a_single_look(read, erroneous, most):
    assert single_look_bound(read, erroneous) == pytest.approx(most, abs=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 50, 1000])
def test_of_a_run_that_was_read_whole_everything_is_known(rows):
    for erroneous in {0, 1, rows // 2, rows}:
        stratum = Stratum(rows, rows, erroneous)
        assert bound([stratum]) == erroneous / rows == error_rate([stratum])
        assert to_read([stratum], 0.01) == (0 if erroneous <= rows / 100 else None)


def test_of_a_run_that_was_not_read_nothing_is_known():
    assert bound([Stratum(100, 0, 0)]) == 1
    assert error_rate([Stratum(100, 0, 0)]) is None
    assert bound([Stratum(100, 100, 0), Stratum(100, 0, 0)]) == pytest.approx(0.5, abs=1e-3)


def test_more_reading_and_fewer_errors_lower_the_bound():
    found = [bound([Stratum(5000, read, 2)]) for read in (20, 60, 150, 400, 1500)]
    assert found == sorted(found, reverse=True)
    found = [bound([Stratum(5000, 300, erroneous)]) for erroneous in (0, 1, 5, 30)]
    assert found == sorted(found)
    assert all(bound([Stratum(5000, 300, count)]) > single_look_bound(300, count) for count in (0, 1, 5, 30))


def test_strata_are_weighted_by_their_rows():
    strata = [Stratum(900, 90, 0), Stratum(100, 50, 25)]
    assert error_rate(strata) == pytest.approx(0.05)
    assert 0.05 < bound(strata) < 0.13


def test_the_advice_is_kept():
    """After so many more rows, with errors as frequent as so far, the bound is what was promised, and not before."""
    strata = [Stratum(3000, 60, 0)]
    more = to_read(strata, 0.02)
    assert advice(strata) == f"Read {more:,} more to show at most 2%."
    assert to_read(strata, 0.01) > 300
    assert bound([Stratum(3000, 60 + more, 0)]) <= 0.02 < bound([Stratum(3000, 60 + more - 1, 0)])


def test_many_errors_call_for_another_prompt():
    assert advice([Stratum(1000, 60, 14)]) == "14 of 60 are erroneous: change the prompt first."


@pytest.mark.parametrize(
    ("stratum", "unknown", "said"),
    [
        (Stratum(500, 5, 1), 0, "Read 30 more: so few show little."),
        (Stratum(500, 30, 3), 0, "Read 30 more: so few show little."),
        (Stratum(20, 10, 1), 0, "Read 10 more: so few show little."),
        (Stratum(5, 5, 0), 0, "Every row was read: at most 0.0% are erroneous."),
        (Stratum(500, 45, 5), 1, "Fill in the error counts of rows approved with edits: 1 of 45 have none."),
        (Stratum(500, 40, 15), 1, "14 of 40 are erroneous: change the prompt first."),
        (Stratum(500, 0, 0), 0, "Nothing has been read yet: import the readers' sheets."),
    ],
)
def test_the_advice_is_true_of_few_rows_of_all_rows_and_of_unknown_ones(stratum, unknown, said):
    assert advice([stratum], unknown) == said


@pytest.mark.parametrize("seed", range(30))
def test_the_bound_of_strata_is_never_below_the_worst_division_of_errors(seed):
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, 25, size=3)
    read = rng.integers(0, rows + 1)
    strata = [Stratum(*map(int, one)) for one in zip(rows, read, rng.integers(0, read + 1), strict=True)]
    evidence = [_evidence(*one) for one in strata]
    total = evidence[0][:, None, None] + evidence[1][:, None] + evidence[2]
    worst = sum(np.indices(total.shape))[total < math.log(20)].max()
    assert worst <= bound(strata) * rows.sum() + 1e-9 <= worst + 2


CASES = [
    ((1000,), (0.02,)),
    ((5000,), (0.05,)),
    ((300,), (0.1,)),
    ((10_000,), (0.004,)),
    ((800, 200), (0.01, 0.2)),
    ((400, 300, 300), (0.0, 0.05, 0.02)),
]


def covered(sizes, rates, rng) -> bool:
    """Return whether the bound held at every look of somebody who follows the advice."""
    wrong = [rng.permutation(np.arange(rows) < round(rows * rate)) for rows, rate in zip(sizes, rates, strict=True)]
    truth = sum(int(one.sum()) for one in wrong) / sum(sizes)
    read = [max(1, round(60 * rows / sum(sizes))) for rows in sizes]
    for _ in range(8):
        looked = zip(sizes, read, wrong, strict=True)
        strata = [Stratum(rows, count, int(one[:count].sum())) for rows, count, one in looked]
        if bound(strata) < truth - 1e-9:
            return False
        said = re.match(r"Read ([\d,]+) more", advice(strata))
        if said is None:
            break
        more, left = int(said[1].replace(",", "")), sum(sizes) - sum(read)
        read = [min(rows, count - -more * (rows - count) // left) for rows, count in zip(sizes, read, strict=True)]
    return True


def test_the_bound_holds_for_readers_who_follow_the_advice():
    rng = np.random.default_rng(3)
    for sizes, rates in CASES:
        assert sum(covered(sizes, rates, rng) for _ in range(40)) >= 36, sizes


@pytest.mark.long
@pytest.mark.parametrize(("sizes", "rates"), CASES)
def test_the_bound_holds_in_95_of_100_of_2000_runs(sizes, rates):
    rng = np.random.default_rng(4)
    held = sum(covered(sizes, rates, rng) for _ in range(2000))
    print(f"{sizes} {rates}: {held / 2000:.1%}")
    assert held >= 1900
