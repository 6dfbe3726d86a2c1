"""The columns of the cases sheet: their order (after the RSNA MIRC and IHE TCE teaching files) and their widths.

Row id, review status, the user's columns, the generated text, the reviewer's columns, flags, then where it came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["key", "mark", "input", "text", "review", "flags", "provenance"]

STATUSES = ("unreviewed", "approved", "approved_with_edits", "rejected")
QUALITIES = ("1", "2", "3", "4", "5")
# The error categories in which reviewers of radiology texts count, each as significant or not.
CATEGORIES = {
    "false_finding": "false finding",
    "missing_finding": "missing finding",
    "wrong_location": "wrong location",
    "wrong_severity": "wrong severity",
    "comparison_not_in_reference": "comparison not in the reference",
    "omitted_comparison": "omitted comparison",
}
WEIGHTS = ("significant", "insignificant")
_WIDTHS = {"key": 16, "mark": 14, "input": 24, "text": 90, "review": 16, "flags": 26, "provenance": 18}
_WIDE = {"gxr_review_text": 60, "gxr_review_comment": 40, "gxr_error": 40, "gxr_disclaimer": 40}
_LONG_INPUT = 42  # a user's column whose longest sampled cell is beyond so many characters gets this width


@dataclass(frozen=True)
class Column:
    """One column: its name in the results, or a review column's own; `source` is "" where the reviewer fills it."""

    name: str
    role: Role
    width: float
    source: str = ""


def review_columns() -> tuple[str, ...]:
    """Return the columns that a reviewer fills, in order, without the status."""
    counts = [f"gxr_review_{category}_{weight}" for category in CATEGORIES for weight in WEIGHTS]
    return ("gxr_review_quality", *counts, "gxr_review_text", "gxr_review_comment", "gxr_reviewer", "gxr_reviewed_at")


def layout(names: Sequence[str], longest: Mapping[str, int]) -> list[Column]:
    """Return the sheet's columns for results of these columns; `longest`: lengths of the user's longest cells."""
    own = [name for name in names if not name.startswith("gxr_")]
    first = ("gxr_row_id", "gxr_sample")
    placed = {*first, "gxr_review_status", "gxr_text", "gxr_flags", "gxr_ai_generated"}
    review = [name for name in review_columns() if name not in names]
    rest = [name for name in names if name.startswith("gxr_") and name not in placed]
    columns = [_column(name, "key") for name in first]
    columns += [_column("gxr_review_status", "review"), _column("gxr_ai_generated", "mark")]
    columns += [_column(name, "input", _LONG_INPUT if longest.get(name, 0) > _LONG_INPUT else None) for name in own]
    columns += [_column("gxr_text", "text")]
    columns += [Column(name, "review", _WIDE.get(name, _WIDTHS["review"])) for name in review]
    columns += [_column("gxr_flags", "flags"), *(_column(name, "provenance") for name in rest)]
    return columns


def _column(name: str, role: Role, width: float | None = None) -> Column:
    return Column(name, role, width or _WIDE.get(name, _WIDTHS[role]), name)
