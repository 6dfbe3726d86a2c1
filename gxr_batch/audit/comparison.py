"""Which of two runs is better: their texts of the same rows, paired by row id and sample.

Compared are rows with the same cells and a text in both runs; the others are counted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gxr_batch.audit.error_bounds import LEVEL
from gxr_batch.audit.paired_tests import (
    MOST_RESAMPLED,
    Bools,
    PairedCounts,
    PairedMeans,
    Places,
    paired_counts,
    paired_means,
)
from gxr_batch.audit.row_digest import ANY_FLAG, FINDINGS, Digest, Numbers
from gxr_batch.errors import RunError
from gxr_batch.ledger import RunReader

# Verdicts on rows of this run; `Compared.verdicts` holds indices into this tuple.
VERDICTS = ("same text", "different text", "only in this run", "no text in one", "other cells")
SAME, DIFFERENT, ALONE, TEXTLESS, CHANGED = range(5)


class Compared(NamedTuple):
    """Two runs compared. `verdicts` has one entry for each row of this run.

    `mine` and `theirs` are the places in each run of the rows in both. `rows` counts the compared texts once for each
    row. `judged` compares the `read` texts in which reviewers of both runs found errors or none; in `unknown` more one
    of them could not say. `damaged` parts of each run were left out.
    """

    matched: int
    same: int
    different: int
    without_text: int
    changed: int
    other_prompt: int
    only_this: int
    only_other: int
    verdicts: npt.NDArray[np.int8]
    mine: Places
    theirs: Places
    rows: int
    means: dict[str, PairedMeans | None]
    flags: dict[str, PairedCounts]
    judged: PairedCounts
    read: int
    unknown: int
    damaged: tuple[int, int] = (0, 0)

    @property
    def texts(self) -> int:
        """How many texts of each run are compared."""
        return self.same + self.different


def compare_runs(this: RunReader, other: RunReader) -> Compared:
    """Compare two runs. Raises RunError if they have no row in common or are damaged, StorageError."""
    (mine, damaged), (theirs, damaged_there) = _digested(this, other), _digested(other, this)
    found = compare(mine, theirs)
    if not found.matched:
        raise RunError(
            "The two runs have no finished row in common, so there is nothing to compare.",
            where=f"{this.folder} and {other.folder}",
            next_step="compare runs over the same table; with input.id_column in both jobs rows keep their ids",
        )
    return found._replace(damaged=(damaged, damaged_there))


def _digested(reader: RunReader, other: RunReader) -> tuple[Digest, int]:
    """Read the finished rows of a run once; return their digest and how many parts are damaged."""
    digest, state = Digest(reader, other), reader.sound_state()
    for table in reader.finished_in(state, with_content_hash=True):
        digest.add(table)
        pa.default_memory_pool().release_unused()  # else it keeps 100 MB for a run of a million rows
    return digest, len(state.damaged)


def compare(this: Digest, other: Digest) -> Compared:
    """Compare the rows of two runs; frees most of the digests."""
    mine, theirs = _matched(this, other)
    changed = this.contents[mine] != other.contents[theirs]
    if this.cells is not None and other.cells is not None:
        changed &= this.cells[mine] != other.cells[theirs]
    texts = np.isfinite(this.lengths[mine]) & np.isfinite(other.lengths[theirs])
    same = this.texts[mine] == other.texts[theirs]
    other_prompt = int((this.prompts[mine] != other.prompts[theirs]).sum())
    for digest in (this, other):
        digest.forget("keys", "contents", "cells", "texts", "prompts")
    pa.default_memory_pool().release_unused()
    verdicts = np.full(this.size, ALONE, np.int8)
    verdicts[mine] = np.select([changed, ~texts, same], [CHANGED, TEXTLESS, SAME], DIFFERENT)
    counts = np.bincount(verdicts, minlength=len(VERDICTS))
    compared = texts & ~changed
    both = mine[compared], theirs[compared]
    rows = this.rows[both[0]]
    names = [ANY_FLAG, *sorted(this.flags | other.flags)]
    judged, read, unknown = _judged(this, other, both, rows)
    return Compared(
        matched=len(mine),
        same=int(counts[SAME]),
        different=int(counts[DIFFERENT]),
        without_text=int(counts[TEXTLESS]),
        changed=int(counts[CHANGED]),
        other_prompt=other_prompt,
        only_this=int(counts[ALONE]),
        only_other=other.size - len(mine),
        verdicts=verdicts,
        mine=mine,
        theirs=theirs,
        rows=len(np.unique(rows)),
        means={
            "characters": paired_means(this.lengths[both[0]], other.lengths[both[1]], rows),
            "tokens": paired_means(this.tokens[both[0]], other.tokens[both[1]], rows),
        },
        flags={
            name: paired_counts(this.has_flag(name)[both[0]], other.has_flag(name)[both[1]], rows) for name in names
        },
        judged=judged,
        read=read,
        unknown=unknown,
    )


def _matched(this: Digest, other: Digest) -> tuple[Places, Places]:
    """Return the places in each run of the rows in both."""
    place = pc.index_in(this.keys, value_set=other.keys)
    here: Bools = place.is_valid().to_numpy(zero_copy_only=False)
    return np.flatnonzero(here), pc.drop_null(place).to_numpy().astype(np.int64)


def _judged(this: Digest, other: Digest, both: tuple[Places, Places], rows: Numbers) -> tuple[PairedCounts, int, int]:
    """Return the comparison of what reviewers found, how many texts of each run it counts, and how many are unknown."""
    found = this.findings[both[0]], other.findings[both[1]]
    read = (found[0] > 0) & (found[1] > 0)
    unknown = read & ((found[0] == FINDINGS.index("unknown")) | (found[1] == FINDINGS.index("unknown")))
    known = read & ~unknown
    wrong = [one[known] == FINDINGS.index("erroneous") for one in found]
    return paired_counts(wrong[0], wrong[1], rows[known]), int(known.sum()), int(unknown.sum())


def p_text(p: float | None) -> str:
    """Return a p with two digits, "-" for None."""
    return "-" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def difference_texts(mean: PairedMeans) -> tuple[str, str]:
    """Return a difference of means and its interval as text."""
    interval = "-" if mean.low is None or mean.high is None else f"{mean.low:+,.2f} to {mean.high:+,.2f}"
    return f"{mean.difference:+,.2f}", interval


def method_text(found: Compared) -> str:
    """Return how the intervals and p were computed."""
    normal = any(mean is not None and mean.method == "normal" for mean in found.means.values())
    interval = f"normal approximation, more than {MOST_RESAMPLED:,} rows" if normal else "bootstrap over rows"
    samples = "; a row counts where more of its samples have it" if found.texts > found.rows else ""
    return f"intervals: {LEVEL:.0%}, {interval}; p: McNemar's exact test{samples}"


def as_json(found: Compared) -> dict[str, Any]:
    """Return the figures for programs."""
    return {
        "compared": {
            "rows": found.rows,
            "texts": found.texts,
            "same_text": found.same,
            "other_prompt": found.other_prompt,
        },
        "left_out": {
            "other_cells": found.changed,
            "without_text": found.without_text,
            "only_this": found.only_this,
            "only_other": found.only_other,
        },
        "level": LEVEL,
        "means": {name: mean and mean._asdict() for name, mean in found.means.items()},
        "flags": {name: counts._asdict() for name, counts in found.flags.items()},
        "erroneous": {"read": found.read, "unknown": found.unknown, **found.judged._asdict()},
    }
