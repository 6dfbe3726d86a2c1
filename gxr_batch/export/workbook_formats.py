"""How cells look: every text cell is text, wrapped, and shielded from being read as anything else."""

from __future__ import annotations

from typing import Any, NamedTuple

# Readable in print and to people who do not tell red from green: each status has a shade and is written out too.
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
        # What is typed there becomes a number or a date, whatever the language of the spreadsheet.
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
