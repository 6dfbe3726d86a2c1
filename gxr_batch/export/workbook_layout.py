"""Layout of the sheet Cases: columns, their order, widths and captions, and cell formats.

The order follows teaching files (RSNA MIRC, IHE TCE): row id, review status, the user's columns, the generated text,
the review columns, flags, provenance. Each column has a readable caption above its name; the import finds columns by
name. Text cells are wrapped and forced to text; review dates are shown as 2026-01-31 (`review_date`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from gxr_batch.forms import Form
from gxr_batch.records import ERROR_CATEGORIES, ERROR_WEIGHTS, LIST_COLUMNS, SOURCE_PREFIX, result_schema, review_schema

Role = Literal["key", "mark", "input", "text", "whole", "review", "flags", "provenance"]

_WIDTHS = {"key": 16, "mark": 13, "input": 24, "text": 80, "whole": 30, "review": 15, "flags": 28, "provenance": 18}
_SECTION_WIDTHS = {"text": 50, "bullets": 44, "line": 32, "choice": 14, "number": 12}
_OWN_WIDTHS = {
    "gxr_sample": 12,
    "gxr_review_status": 20,
    "gxr_review_text": 60,
    "gxr_review_comment": 40,
    "gxr_error": 40,
    "gxr_reasoning": 40,
    "gxr_disclaimer": 40,
}
_CAPTIONS = {
    "gxr_row_id": "Case",
    "gxr_review_status": "Review status",
    "gxr_ai_generated": "AI-generated",
    "gxr_text": "Generated text (AI)",
    "gxr_reasoning": "Reasoning before the text (AI)",
    "gxr_findings_kept": "Findings that the text names",
    "gxr_findings_lost": "Findings that it does not name, or denies",
    "gxr_review_quality": "Quality, 1 to 5",
    "gxr_review_text": "Corrected text",
    "gxr_review_comment": "Comment",
    "gxr_reviewed_at": "Reviewed on",
    **{
        f"gxr_review_{category}_{weight}": f"{words.capitalize()}, {weight}"
        for category, words in ERROR_CATEGORIES.items()
        for weight in ERROR_WEIGHTS
    },
}
# Of a run that was the input of this one, shown with the user's columns; the others are at the end.
_AT_HAND = ("gxr_text", "gxr_flags", "gxr_review_status", "gxr_review_text")
# The user's columns fit a short cell on one line and the longest one on a few; the generated text stays visible.
_LEAST_INPUT, _SHORT_INPUT, _MOST_INPUT = 8, 24, 42
_LINES = 4
_LINE_POINTS, _MOST_LINES = 15, 24
# Column widths are in digits; letters are narrower, and wrapping loses part of each line.
_LETTERS_A_DIGIT = 1.1


@dataclass(frozen=True)
class Column:
    """One column of the sheet; reviewers fill in the `review` columns. `heading`: of its section, if it has one."""

    name: str
    role: Role
    width: float
    heading: str = ""

    @property
    def caption(self) -> str:
        """Return the readable name of the column; the user's columns keep their names."""
        if not self.name.startswith("gxr_"):
            return self.name
        if self.heading:
            return f"Corrected: {self.heading}" if self.role == "review" else f"{self.heading} (AI)"
        return _CAPTIONS.get(self.name) or self.name.removeprefix("gxr_").replace("_", " ").capitalize()


def layout(names: Sequence[str], longest: Mapping[str, int], form: Form | None = None) -> list[Column]:
    """Return the sheet's columns for these result columns; `longest`: length of each column's longest cell.

    With a form, its sections come before the whole text, and a reviewer corrects each of them instead of the
    whole text.
    """
    own = [name for name in names if not name.startswith("gxr_")]
    minor = [name for name in own if _is_minor(name)]
    own = [name for name in own if name not in minor]
    first = ("gxr_row_id", "gxr_sample")
    review = review_schema().names
    parts = form.parts if form else ()
    sections = {part.column for part in parts}
    placed = {*first, *review, *sections, "gxr_review_status", "gxr_text", "gxr_ai_generated", *LIST_COLUMNS}
    rest = [name for name in names if name.startswith("gxr_") and name not in placed]
    columns = [_column(name, "key") for name in first]
    columns += [_column("gxr_review_status", "review"), _column("gxr_ai_generated", "mark")]
    columns += [Column(name, "input", _fitting(name, longest.get(name, _WIDTHS["input"]))) for name in own]
    columns += [Column(part.column, "text", _SECTION_WIDTHS[part.kind], part.heading) for part in parts]
    columns += [_column("gxr_text", "whole" if parts else "text")]
    for name in review:
        if parts and name == "gxr_review_text":
            widths = [(part, _SECTION_WIDTHS[part.kind]) for part in parts]
            columns += [Column(part.review_column, "review", width, part.heading) for part, width in widths]
        else:
            columns.append(_column(name, "review"))
    columns += [_column(name, "flags") for name in LIST_COLUMNS if name in names]
    columns += [_column(name, "provenance") for name in [*rest, *minor]]
    return columns


def _is_minor(name: str) -> bool:
    """Return whether a column is a result of the run that this one read, and none that a reviewer needs at hand."""
    result = "gxr_" + name.removeprefix(SOURCE_PREFIX)
    known = result_schema().names + review_schema().names
    return name.startswith(SOURCE_PREFIX) and result in known and result not in _AT_HAND


def row_height(columns: Sequence[Column], texts: Sequence[str | None]) -> float:
    """Return the height of a row with these texts, in points."""
    lines = 1
    for column, text in zip(columns, texts, strict=True):
        if text and column.role in {"input", "text", "review"}:
            letters = int(column.width * _LETTERS_A_DIGIT)
            lines = max(lines, sum(1 + len(line) // letters for line in text.split("\n", _MOST_LINES)))
    return float(_LINE_POINTS * min(lines, _MOST_LINES))


def _column(name: str, role: Role) -> Column:
    return Column(name, role, _OWN_WIDTHS.get(name, _WIDTHS[role]))


def _fitting(name: str, longest: int) -> int:
    wrapped = max(_SHORT_INPUT, longest // _LINES)
    return max(_LEAST_INPUT, len(name) + 3, min(longest + 2, wrapped, _MOST_INPUT))


# Each status has a distinct shade and is written out too, for print and for colour-blind readers.
STATUS_COLOURS = {
    "unreviewed": "#FFF4CE",
    "approved": "#D9EAD3",
    "approved_with_edits": "#CFE2F3",
    "rejected": "#F4CCCC",
}
_CAPTION = {"bold": True, "text_wrap": True, "valign": "vcenter", "border": 1, "border_color": "#B7B7B7"}
_NAME = {"font_size": 8, "valign": "vcenter", "border": 1, "border_color": "#B7B7B7"}
_CELL = {"valign": "top", "border": 1, "border_color": "#E3E3E3"}
_REVIEW = {**_CELL, "text_wrap": True, "bg_color": "#FFFBEF", "locked": False}
_TEXT = {**_CELL, "text_wrap": True, "num_format": "@", "quote_prefix": True}


class Formats(NamedTuple):
    """The formats of one workbook."""

    caption: Any
    caption_review: Any
    name: Any
    name_review: Any
    banner: Any
    strip: Any
    text: Any
    generated: Any
    review: Any
    review_number: Any
    review_date: Any
    key: Any
    number: Any
    fraction: Any
    title: Any
    heading: Any
    label: Any
    plain: Any
    flagged: Any
    statuses: dict[str, Any]


def make_formats(workbook: Any) -> Formats:
    """Add the formats to a workbook."""
    add = workbook.add_format
    return Formats(
        caption=add({**_CAPTION, "bg_color": "#1F3864", "font_color": "#FFFFFF"}),
        caption_review=add({**_CAPTION, "bg_color": "#7F6000", "font_color": "#FFFFFF"}),
        name=add({**_NAME, "bg_color": "#E4E9F2", "font_color": "#44546A"}),
        name_review=add({**_NAME, "bg_color": "#F5EBCB", "font_color": "#5F4A00"}),
        banner=add(
            {"bold": True, "font_color": "#9C0006", "bg_color": "#FFE8E8", "valign": "vcenter", "text_wrap": True}
        ),
        strip=add({"bold": True, "font_color": "#9C0006", "bg_color": "#FFE8E8", "valign": "vcenter"}),
        text=add(_TEXT),
        generated=add({**_TEXT, "bg_color": "#F3F6FC"}),
        review=add({**_REVIEW, "num_format": "@"}),
        # Makes a spreadsheet of any language store typed input as a number or a date.
        review_number=add({**_REVIEW, "num_format": "0"}),
        review_date=add({**_REVIEW, "num_format": "yyyy-mm-dd"}),
        key=add({**_TEXT, "bold": True}),
        number=add({**_CELL, "num_format": "General"}),
        fraction=add({**_CELL, "num_format": "0.00"}),
        title=add({"bold": True, "font_size": 16, "font_color": "#1F3864", "valign": "vcenter"}),
        heading=add({"bold": True, "font_size": 13, "font_color": "#1F3864", "valign": "vcenter"}),
        label=add({"bold": True, "font_color": "#44546A", "valign": "top"}),
        plain=add({"text_wrap": True, "valign": "top"}),
        flagged=add({"bg_color": "#FCE4D6"}),
        statuses={status: add({"bg_color": colour, "valign": "top"}) for status, colour in STATUS_COLOURS.items()},
    )
