"""What a reviewer's cells say: one row of a sheet becomes a review, or a reason why it cannot."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date, datetime
from typing import Any, NamedTuple, get_args

from gxr_batch.cells import for_workbook, guard
from gxr_batch.ledger.reviews import text_sha256
from gxr_batch.records import ERROR_COUNTS, Key, Review, ReviewStatus

QUALITIES = range(1, 6)
_COUNTS = {f"gxr_review_{name}" for name in ERROR_COUNTS}
# What a reviewer fills in. A row in which all of this is empty says nothing.
REVIEW_COLUMNS = frozenset(
    {"gxr_review_quality", "gxr_review_text", "gxr_review_comment", "gxr_reviewer", "gxr_reviewed_at", *_COUNTS}
)
# All that is read of a sheet's row.
COLUMNS_READ = REVIEW_COLUMNS | {"gxr_row_id", "gxr_sample", "gxr_text", "gxr_review_status"}
_ISO = re.compile(r"(\d{4})-(\d{1,2})-(\d{1,2})(?:[T ].*)?")
_DOTTED = re.compile(r"(\d{1,2})\.(\d{1,2})\.(\d{4})")
_BLANKS = re.compile(r"\s+")


class Wrong(Exception):
    """A row cannot be taken; the message says why, names columns, and quotes no cell."""


class Defaults(NamedTuple):
    """What stands in for a cell that the reviewer left empty."""

    reviewer: str
    today: date


def says_something(cells: Mapping[str, Any]) -> bool:
    """Return whether a reviewer filled in anything but name and date."""
    filled = {name for name in REVIEW_COLUMNS - {"gxr_reviewer", "gxr_reviewed_at"} if cells.get(name) is not None}
    return bool(filled) or _status_word(cells) not in {"", "unreviewed"}


def review_of(key: Key, text: str, cells: Mapping[str, Any], defaults: Defaults) -> Review:
    """Return the review in these cells of the text generated for `key`. Raises Wrong."""
    if not _same_text(text, cells.get("gxr_text")):
        raise Wrong("the generated text was changed; corrections belong into gxr_review_text")
    status = _status(cells)
    edited = _edited(status, text, cells)
    reviewer = _text(cells, "gxr_reviewer") or defaults.reviewer
    if not reviewer and status != "unreviewed":
        raise Wrong("gxr_reviewer is empty; fill it in, or add --reviewer NAME")
    return Review(
        key=key,
        text_sha256=text_sha256(text),
        status=status,
        reviewer=reviewer,
        reviewed_at=_date(cells.get("gxr_reviewed_at"), defaults.today),
        quality=_number(cells, "gxr_review_quality", QUALITIES),
        errors=tuple(_number(cells, f"gxr_review_{name}", range(1000)) for name in ERROR_COUNTS),
        text=edited,
        comment=_text(cells, "gxr_review_comment"),
    )


def _same_text(text: str, shown: Any) -> bool:
    """Return whether a cell shows the generated text: whole, or as the workbook had to write it, or guarded as in CSV.

    Blanks do not count: programs change line ends and trailing blanks on their own.
    """
    seen = _squeezed(str(shown or ""))
    return seen in {_squeezed(text), _squeezed(for_workbook(text).text), _squeezed(guard(text))}


def _squeezed(text: str) -> str:
    return _BLANKS.sub(" ", text).strip()


def _status_word(cells: Mapping[str, Any]) -> str:
    return _BLANKS.sub("_", str(cells.get("gxr_review_status") or "").strip().lower())


def _status(cells: Mapping[str, Any]) -> ReviewStatus:
    word = _status_word(cells) or "unreviewed"
    for known in get_args(ReviewStatus):
        if word == known:
            status: ReviewStatus = known
            return status
    raise Wrong(f"gxr_review_status is none of {', '.join(get_args(ReviewStatus))}")


def _edited(status: ReviewStatus, text: str, cells: Mapping[str, Any]) -> str | None:
    edited = _text(cells, "gxr_review_text")
    differs = edited is not None and _squeezed(edited) != _squeezed(text)
    if status == "approved_with_edits" and not differs:
        raise Wrong("approved_with_edits needs the whole corrected text in gxr_review_text")
    if status == "approved" and differs:
        raise Wrong("approved, but gxr_review_text holds another text; choose approved_with_edits, or empty it")
    return edited if differs else None


def _text(cells: Mapping[str, Any], name: str) -> str | None:
    value = cells.get(name)
    return str(value).replace("\r\n", "\n").strip() or None if value is not None else None


def _number(cells: Mapping[str, Any], name: str, allowed: range) -> int | None:
    value = cells.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(str(value).strip().replace(",", "."))
    except ValueError:
        number = -1.0
    if number not in allowed:
        raise Wrong(f"{name} is no whole number from {allowed.start} to {allowed.stop - 1}")
    return int(number)


def _date(value: Any, today: date) -> date:
    """Return a cell as a date. Raises Wrong for a text whose order of day and month cannot be known."""
    if value is None:
        return today
    if isinstance(value, datetime):
        return value.date()
    if isinstance(value, date):
        return value
    text = str(value).strip()
    try:
        if found := _ISO.fullmatch(text):
            return date(int(found[1]), int(found[2]), int(found[3]))
        if found := _DOTTED.fullmatch(text):
            return date(int(found[3]), int(found[2]), int(found[1]))
    except ValueError:
        pass
    raise Wrong("gxr_reviewed_at is no date; write it as 2026-01-31")
