"""How many rows of a run are erroneous at most, given a random sample that was read.

Two bounds, both exact and one-sided. Clopper and Pearson's (1934) holds for one look at a sample whose size was fixed
beforehand. The other one holds at every look, so that a reader may look, read more and look again: the likelihoods of
all numbers of errors up to some number, in equal parts, against that of this number (Robbins 1970). That is a
martingale if this number is the true one, for samples without replacement too (Waudby-Smith and Ramdas 2020,
"Confidence sequences for sampling without replacement"). Strata are multiplied, and the worst division of the errors
among them counts (Spertus and Stark 2022, "Sweeter than SUITE").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
# The rates that advice names, and the rate from which the prompt is to be changed instead of more being read.
_TARGETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1)
HOPELESS_RATE = 0.1
_NEAR = 300  # rows that a reader may be asked to read at once


class Stratum(NamedTuple):
    """How many rows there are, how many of them were read, drawn at random, and how many of those are erroneous."""

    rows: int
    read: int
    erroneous: int


def error_rate(strata: Sequence[Stratum]) -> float | None:
    """Return the estimated share of erroneous rows, each stratum weighted by its rows; None if one was not read."""
    rows = sum(one.rows for one in strata)
    if not rows or any(one.rows and not one.read for one in strata):
        return None
    return sum(one.rows * one.erroneous / one.read for one in strata if one.rows) / rows


def single_look_bound(read: int, erroneous: int, level: float = LEVEL) -> float:
    """Return Clopper and Pearson's upper bound of the share of erroneous rows, for rows drawn without strata."""
    from scipy.stats import beta

    return 1.0 if erroneous == read else float(beta.ppf(level, erroneous + 1, read - erroneous))


def bound(strata: Sequence[Stratum], level: float = LEVEL) -> float:
    """Return the upper bound of the share of erroneous rows that holds at every look."""
    parts = [one for one in strata if one.rows]
    rows = sum(one.rows for one in parts)
    if not rows:
        return 0.0
    most = math.log(1 / (1 - level))
    evidence = [_evidence(*one) for one in parts]
    if len(parts) == 1:
        return int(np.flatnonzero(evidence[0] < most)[-1]) / rows
    return _most_errors(evidence, most) / rows


@lru_cache(maxsize=4)  # an array of a million rows has 8 MB
def _evidence(rows: int, read: int, erroneous: int) -> npt.NDArray[np.float64]:
    """Return the logarithm of the evidence against each number of erroneous rows, 0 to `rows`; infinite = ruled out."""
    from scipy.special import gammaln

    total = np.arange(rows + 1)
    possible = (total >= erroneous) & (rows - total >= read - erroneous)
    likelihood = np.full(rows + 1, -np.inf)
    among, rest = total[possible], rows - total[possible]
    likelihood[possible] = gammaln(among + 1) - gammaln(among - erroneous + 1)
    likelihood[possible] += gammaln(rest + 1) - gammaln(rest - (read - erroneous) + 1)
    up_to = np.logaddexp.accumulate(likelihood) - np.log(total + 1)
    found = np.full(rows + 1, np.inf)
    found[possible] = up_to[possible] - likelihood[possible]
    found.setflags(write=False)
    return found


def _most_errors(evidence: Sequence[npt.NDArray[np.float64]], most: float) -> float:
    """Return an upper bound of the errors in all strata whose evidence adds up to less than `most`.

    The Lagrangian's: at any price it is an upper bound, so the search for the best price can only make it wider.
    """
    from scipy.optimize import minimize_scalar

    numbers = [np.arange(len(one)) for one in evidence]

    def errors(log_price: float) -> float:
        price = math.exp(log_price)
        worst = sum(float((count - price * one).max()) for count, one in zip(numbers, evidence, strict=True))
        return worst + price * most

    rows = sum(len(one) - 1 for one in evidence)
    best = minimize_scalar(errors, bounds=(math.log(1e-3), math.log(10.0 * rows + 1)), method="bounded")
    return min(float(best.fun), float(rows))


def to_read(strata: Sequence[Stratum], at_most: float, level: float = LEVEL) -> int | None:
    """Return how many more rows to read so that the bound is `at_most`, if errors stay as frequent; None if never.

    Reads are divided among strata by their rows.
    """
    left = sum(one.rows - one.read for one in strata)
    if bound(strata, level) <= at_most:
        return 0
    if bound([_after(one, strata, left) for one in strata], level) > at_most:
        return None
    least, enough = 0, left
    while enough - least > 1:
        middle = (least + enough) // 2
        if bound([_after(one, strata, middle) for one in strata], level) <= at_most:
            enough = middle
        else:
            least = middle
    return enough


def _after(stratum: Stratum, strata: Sequence[Stratum], more: int) -> Stratum:
    """Return a stratum after `more` rows were read in all, with errors as frequent as so far."""
    left = sum(one.rows - one.read for one in strata)
    own = min(math.ceil(more * (stratum.rows - stratum.read) / left), stratum.rows - stratum.read) if left else 0
    rate = stratum.erroneous / stratum.read if stratum.read else error_rate([one for one in strata if one.read]) or 0.0
    return Stratum(stratum.rows, stratum.read + own, stratum.erroneous + math.ceil(rate * own - 1e-9))


def advice(strata: Sequence[Stratum], unknown: int = 0) -> str:
    """Return one sentence: what to do next. `unknown`: how many of the erroneous rows only count as such."""
    read, erroneous = sum(one.read for one in strata), sum(one.erroneous for one in strata)
    rate = error_rate(strata)
    if rate is None:
        nothing = "Nothing has been read yet: import the readers' sheets."
        return "Read at least one row of every stratum." if read else nothing
    if rate > HOPELESS_RATE and erroneous > 1:
        fill_in = f"Fill in the error counts of rows approved with edits: {unknown:,} of {read:,} have none."
        change = f"{erroneous - unknown:,} of {read:,} are erroneous: change the prompt first."
        return fill_in if unknown and erroneous - unknown <= HOPELESS_RATE * read else change
    left = sum(one.rows - one.read for one in strata)
    now = bound(strata)
    if not left:
        return f"Every row was read: at most {now:.1%} are erroneous."
    steps = [(target, to_read(strata, target)) for target in _TARGETS if rate < target < now]
    possible = [(target, more) for target, more in steps if more]
    # The lowest target within reach; if none is, the nearest one.
    near = [(target, more) for target, more in possible if more <= max(2 * read, _NEAR)] or possible[-1:]
    if near:
        target, more = near[0]
        return f"Read {more:,} more to show at most {target:.1%}".replace(".0%", "%") + "."
    if rate >= _TARGETS[-1] and now > 2 * rate:
        return f"Read {min(left, max(read, 30)):,} more: so few show little."
    return f"At most {now:.1%} of the rows are erroneous; more reading shows little."
