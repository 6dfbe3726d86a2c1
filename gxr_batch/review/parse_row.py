"""Converts a row of a sheet into a review, or raises the reason for refusing it: status, counts, dates, unchanged text.

Input differs by program and language; ambiguous values are refused. Reasons never quote a cell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import date, datetime
from typing import Any, NamedTuple, get_args

from gxr_batch.cells import for_workbook, unguard
from gxr_batch.forms import Form
from gxr_batch.ledger.reviews import judged_sha256
from gxr_batch.records import ERROR_COUNTS, REMARKED, REVIEW_QUALITIES, REVIEWED_DISCLAIMER, Key, Review, ReviewStatus
from gxr_batch.review.parse_sections import corrected, laid_out, refuse_changed_sections
from gxr_batch.review.row_text import InvalidRow, squeezed, text_of_cell
from gxr_batch.rows.workbook_container import unescaped

_COUNTS = {f"gxr_review_{name}" for name in ERROR_COUNTS}
# The columns that reviewers fill in, except the status and those of sections.
_REVIEW_COLUMNS = frozenset(
    {"gxr_review_quality", "gxr_review_text", "gxr_review_comment", "gxr_reviewer", "gxr_reviewed_at", *_COUNTS}
)
_OTHER_COLUMNS = {
    "gxr_row_id",
    "gxr_sample",
    "gxr_text",
    "gxr_review_status",
    "gxr_attempt",
    "gxr_prompt_sha256",
    "gxr_disclaimer",
}
_ISO = re.compile(r"(\d{4})-(\d{1,2})-(\d{1,2})(?:[T ].*)?")
_DOTTED = re.compile(r"(\d{1,2})\.(\d{1,2})\.(\d{4})")
_SLASHED = re.compile(r"(\d{1,2})/(\d{1,2})/(\d{4})")
_ASCII_OR_NOT = re.compile(r"[\x00-\x7f]+|[^\x00-\x7f]+")
_MOST_FOR_A_LETTER = 4  # UTF-8 read as another encoding shows up to four letters for one
_REVIEWED = REVIEWED_DISCLAIMER.partition("{")[0]


class _LostLetters(InvalidRow):
    """The program that saved the file changed the text, and nobody edited it."""


class Judged(NamedTuple):
    """A review, and whether its cells had a date and a name."""

    review: Review
    dated: bool
    named: bool


class Defaults(NamedTuple):
    """What cells are read with: values for those that the reviewer left empty, and the form of the run's texts."""

    reviewer: str
    today: date
    form: Form | None = None


def columns_read(form: Form | None) -> frozenset[str]:
    """Return all columns that are read from a sheet of a run with this form."""
    return (_REVIEW_COLUMNS | _OTHER_COLUMNS).union(form.columns if form else (), review_columns_of(form))


def review_columns_of(form: Form | None) -> tuple[str, ...]:
    """Return the columns in which a reviewer corrects sections, in order."""
    return tuple(part.review_column for part in form.parts) if form else ()


def is_filled_in(cells: Mapping[str, Any], form: Form | None) -> bool:
    """Return whether a reviewer filled in anything besides name and date."""
    own = (_REVIEW_COLUMNS - {"gxr_reviewer", "gxr_reviewed_at"}).union(review_columns_of(form))
    filled = {name for name in own if cells.get(name) is not None}
    return bool(filled) or _status_word(cells) not in {"", "unreviewed"}


def shows_a_verdict(cells: Mapping[str, Any]) -> bool:
    """Return whether the row had a verdict when the sheet was exported."""
    return squeezed(str(cells.get("gxr_disclaimer") or "")).startswith(_REVIEWED)


def shows_a_review(cells: Mapping[str, Any]) -> bool:
    """Return whether the row had a verdict or a remark when the sheet was exported."""
    remarked = squeezed(str(cells.get("gxr_disclaimer") or "")).endswith(REMARKED.strip())
    return remarked or shows_a_verdict(cells)


def may_withdraw(cells: Mapping[str, Any]) -> bool:
    """Return whether a row that is not filled in may withdraw the review that it was exported with.

    A name alone does not: it may have been filled down the whole column.
    """
    named = cells.get("gxr_reviewer") is not None
    return named and _status_word(cells) == "unreviewed" and shows_a_review(cells)


class Generated(NamedTuple):
    """A key's status ("" = no such row, or not generated yet), text, prompt hash and attempt in the run."""

    status: str = ""
    text: str | None = None
    prompt_sha256: str | None = None
    attempt: int = 0


def review_of(key: Key, generated: Generated, cells: Mapping[str, Any], defaults: Defaults) -> Judged:
    """Return the review in these cells, of the text generated for `key`. Raises InvalidRow."""
    text, form = generated.text, defaults.form
    if text is None or generated.status != "ok":
        raise InvalidRow(_no_text(generated.status))
    if "gxr_text" not in cells:
        raise InvalidRow("the sheet does not show the generated text (gxr_text)")
    if _regenerated(generated, cells):
        raise InvalidRow("the row was generated again since the sheet was written; export it again")
    _refuse_changed_text(text, cells, form)
    status = _status(cells)
    edited = _edited(status, text, cells, form)
    reviewer = text_of_cell(cells, "gxr_reviewer") or defaults.reviewer
    review = Review(
        key=key,
        judged_sha256=judged_sha256(text, generated.prompt_sha256),
        status=status,
        reviewer=reviewer,
        reviewed_at=_date(cells.get("gxr_reviewed_at"), defaults.today),
        quality=_number(cells, "gxr_review_quality", REVIEW_QUALITIES),
        errors=tuple(_number(cells, f"gxr_review_{name}", range(1000)) for name in ERROR_COUNTS),
        text=edited,
        comment=text_of_cell(cells, "gxr_review_comment"),
    )
    named = text_of_cell(cells, "gxr_reviewer") is not None
    return Judged(review, cells.get("gxr_reviewed_at") is not None, named)


def refuse_edited_in_place(generated: Generated, cells: Mapping[str, Any], form: Form | None) -> None:
    """Raise InvalidRow if a row that is not filled in shows another text than the run's, because somebody edited it."""
    text, seen = generated.text, cells.get("gxr_text")
    if text is None or seen is None or generated.status != "ok" or _regenerated(generated, cells):
        return
    with suppress(_LostLetters):
        _refuse_changed_text(text, cells, form)


def _refuse_changed_text(text: str, cells: Mapping[str, Any], form: Form | None) -> None:
    if not same_text(text, cells["gxr_text"]):
        if lost_letters(text, cells["gxr_text"]):
            raise _LostLetters(
                "letters of the generated text were lost when the file was saved; save it again as CSV UTF-8 (not CSV) "
                "or as a workbook"
            )
        where = f"gxr_review_text{' or the columns gxr_review_section_...' if form else ''}"
        raise InvalidRow(f"the generated text was changed; corrections go into {where}")
    if form:
        refuse_changed_sections(form, text, cells)


def _no_text(status: str) -> str:
    return {
        "": "this run has no such row, or has not generated it yet",
        "failed": "the row failed and has no text",
        "held": "the row is held by identifier screening; release it with run --retry held --row",
    }.get(status, "the row has no text")


def _regenerated(generated: Generated, cells: Mapping[str, Any]) -> bool:
    """Return whether the sheet has another prompt or attempt than the run has now."""
    prompt, attempt = cells.get("gxr_prompt_sha256"), cells.get("gxr_attempt")
    return (prompt is not None and str(prompt).strip() != (generated.prompt_sha256 or "")) or (
        attempt is not None and str(attempt).strip() not in {str(generated.attempt), f"{generated.attempt}.0"}
    )


def same_text(text: str, shown: Any) -> bool:
    """Return whether a cell shows the generated text: in full, as cut for the workbook, or guarded as in CSV.

    Whitespace is ignored, because programs change line ends and trailing blanks. So are the escapes of workbooks, which
    not every program that turns one into a CSV file resolves.
    """
    seen = str(shown or "")
    return not shown_forms(text).isdisjoint({squeezed(seen), squeezed(unescaped(seen))})


def shown_forms(text: str) -> set[str]:
    """Return how a sheet may show a generated text, with whitespace squeezed."""
    possible = {text, for_workbook(text).text}
    return {squeezed(one) for text in possible for one in (text, unguard(text))}


def lost_letters(text: str, shown: Any) -> bool:
    """Return whether a cell shows a text whose letters outside ASCII became others, as in a file without UTF-8.

    Excel saves "CSV" in the encoding of its Windows language: ? or a similar letter replaces what that encoding lacks.
    """
    seen = squeezed(str(shown or ""))
    return any(_same_but_for_letters(form, seen) for form in shown_forms(text) if not form.isascii())


def _same_but_for_letters(text: str, seen: str) -> bool:
    at = letters = 0  # letters: outside ASCII, since the last piece of ASCII
    for piece in _ASCII_OR_NOT.findall(text):
        if not piece.isascii():
            letters = len(piece)
            continue
        found = seen.find(piece, at + min(letters, 1), at + len(piece) + _MOST_FOR_A_LETTER * letters)
        if found < 0:
            return False
        at, letters = found + len(piece), 0
    return min(letters, 1) <= len(seen) - at <= _MOST_FOR_A_LETTER * letters


def _status_word(cells: Mapping[str, Any]) -> str:
    return squeezed(str(cells.get("gxr_review_status") or "")).lower().replace(" ", "_")


def _status(cells: Mapping[str, Any]) -> ReviewStatus:
    word = _status_word(cells) or "unreviewed"
    for known in get_args(ReviewStatus):
        if word == known:
            status: ReviewStatus = known
            return status
    raise InvalidRow(f"gxr_review_status must be one of {', '.join(get_args(ReviewStatus))}")


def _edited(status: ReviewStatus, text: str, cells: Mapping[str, Any], form: Form | None) -> str | None:
    """Return the whole corrected text, None if the reviewer changed nothing. Raises InvalidRow."""
    edited, where = text_of_cell(cells, "gxr_review_text"), "gxr_review_text"
    if edited is not None and squeezed(edited) == squeezed(text):
        edited = None
    if form:
        by_section = corrected(form, text, cells)
        edited = edited and laid_out(form, edited)
        if edited and by_section and squeezed(edited) != squeezed(by_section):
            raise InvalidRow("gxr_review_text and the corrected sections differ; clear gxr_review_text")
        where = where if edited else "a column gxr_review_section_..."
        edited = by_section or edited
    if status == "approved_with_edits" and edited is None:
        what = "a corrected section" if form else "the full corrected text"
        raise InvalidRow(f"approved_with_edits needs {what} in {where}")
    if status == "approved" and edited is not None:
        raise InvalidRow(f"approved, but {where} has a different text; choose approved_with_edits, or clear it")
    return edited


def _number(cells: Mapping[str, Any], name: str, allowed: range) -> int | None:
    value = cells.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(str(value).strip().replace(",", "."))
    except ValueError:
        number = -1.0
    if number not in allowed:
        raise InvalidRow(f"{name} must be a whole number from {allowed.start} to {allowed.stop - 1}")
    return int(number)


def _date(value: Any, today: date) -> date:
    """Return a cell as a date. Raises InvalidRow if the order of day and month is ambiguous."""
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
        if found := _SLASHED.fullmatch(text):
            one, other, year = map(int, found.groups())
            if one != other and max(one, other) > 12:  # otherwise day and month are ambiguous
                return date(year, min(one, other), max(one, other))
    except ValueError:
        pass
    raise InvalidRow("gxr_reviewed_at is not a date, or an ambiguous one; write it as 2026-01-31")
