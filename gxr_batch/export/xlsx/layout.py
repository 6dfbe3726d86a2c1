"""The columns of the cases sheet: their order (after the RSNA MIRC and IHE TCE teaching files) and their widths.

Row id, review status, the user's columns, the generated text, the reviewer's columns, flags, then where it came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gxr_batch.records import review_schema

Role = Literal["key", "mark", "input", "text", "review", "flags", "provenance"]

_WIDTHS = {"key": 16, "mark": 17, "input": 24, "text": 80, "review": 16, "flags": 28, "provenance": 18}
_OWN_WIDTHS = {
    "gxr_sample": 12,
    "gxr_review_status": 20,
    "gxr_review_text": 60,
    "gxr_review_comment": 40,
    "gxr_error": 40,
    "gxr_disclaimer": 40,
}
# The user's columns are as wide as their longest cell, within limits; longer cells wrap.
_LEAST_INPUT, _MOST_INPUT = 8, 42


@dataclass(frozen=True)
class Column:
    """One column of the results; `review` columns are the reviewer's to fill in."""

    name: str
    role: Role
    width: float


def layout(names: Sequence[str], longest: Mapping[str, int]) -> list[Column]:
    """Return the sheet's columns for results of these columns; `longest`: lengths of the user's longest cells."""
    own = [name for name in names if not name.startswith("gxr_")]
    first = ("gxr_row_id", "gxr_sample")
    review = review_schema().names
    placed = {*first, *review, "gxr_review_status", "gxr_text", "gxr_flags", "gxr_ai_generated"}
    rest = [name for name in names if name.startswith("gxr_") and name not in placed]
    columns = [_column(name, "key") for name in first]
    columns += [_column("gxr_review_status", "review"), _column("gxr_ai_generated", "mark")]
    columns += [Column(name, "input", _fitting(name, longest.get(name, _WIDTHS["input"]))) for name in own]
    columns += [_column("gxr_text", "text")]
    columns += [_column(name, "review") for name in review]
    columns += [_column("gxr_flags", "flags"), *(_column(name, "provenance") for name in rest)]
    return columns


def _column(name: str, role: Role) -> Column:
    return Column(name, role, _OWN_WIDTHS.get(name, _WIDTHS[role]))


def _fitting(name: str, longest: int) -> int:
    return max(_LEAST_INPUT, len(name) + 3, min(longest + 2, _MOST_INPUT))
