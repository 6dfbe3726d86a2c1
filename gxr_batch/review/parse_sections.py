"""Reads what a reviewer wrote by section, in a run with a form, and makes the whole corrected text of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from gxr_batch.cells import CUT_MARK, for_workbook, printed, unguard
from gxr_batch.forms import Content, Form, Part, composed, in_a_cell, parts_of, recovered
from gxr_batch.forms.layout import SEPARATOR
from gxr_batch.review.row_text import InvalidRow, squeezed, text_of_cell

_GROUPED = re.compile(r"-?\d{1,3}(,\d{3})+")
_ALLOWED = {
    "bullets": "needs at least one line of text",
    "number": "must be a number from 0 to 999999, with at most three decimals",
}


def refuse_changed_sections(form: Form, text: str, cells: Mapping[str, Any]) -> None:
    """Raise InvalidRow if a cell that shows a generated section shows something else: it is not read otherwise."""
    for part, content in zip(form.parts, parts_of(form, text) or (), strict=False):
        seen = cells.get(part.column)
        if seen is not None and not _shows(content, seen):
            raise InvalidRow(f"{part.column} was changed; corrections go into {part.review_column}")


def _shows(content: Content, seen: Any) -> bool:
    if isinstance(content, float):
        with suppress(ValueError):
            return float(_number(str(seen))) == content
        return False
    text = str(in_a_cell(content))
    forms = {one for whole in (text, for_workbook(text).text) for one in (whole, unguard(whole))}
    return squeezed(str(seen)) in map(squeezed, forms)


def corrected(form: Form, text: str, cells: Mapping[str, Any]) -> str | None:
    """Return the whole text with the sections that a reviewer typed; None if none differs from the generated ones.

    A section that is left empty stays as it was generated. Raises InvalidRow.
    """
    generated = parts_of(form, text)
    pieces: list[str | None] = [*text.strip().split(SEPARATOR)] if generated else [None] * len(form.parts)
    differs = False
    for at, part in enumerate(form.parts):
        typed = text_of_cell(cells, part.review_column)
        if typed is not None:
            pieces[at] = _piece(part, typed)
            differs = differs or generated is None or not _same(part, pieces[at] or "", generated[at])
    if not differs:
        return None
    missing = [part.review_column for part, piece in zip(form.parts, pieces, strict=True) if piece is None]
    if missing:
        raise InvalidRow(f"the generated text lacks its form; fill in every section, also {', '.join(missing)}")
    return SEPARATOR.join(piece for piece in pieces if piece is not None)


def _piece(part: Part, typed: str) -> str:
    """Return a section with its heading. Raises InvalidRow if its kind does not allow what the reviewer typed."""
    if typed.endswith(CUT_MARK.strip()):
        raise InvalidRow(f"{part.review_column} was cut on export at Excel's cell limit; write a shorter text")
    content = typed
    if part.kind == "choice":
        spellings = (typed.casefold(), _number(typed).casefold())  # a spreadsheet may turn "2" into 2.0
        content = next((choice for one in spellings for choice in part.choices if choice.casefold() == one), typed)
    elif part.kind == "number":
        if _GROUPED.fullmatch(typed.strip()):  # 1,200 may be 1200 or 1.2
            raise InvalidRow(f"{part.review_column} has an ambiguous comma; write the number without it")
        content = _number(typed)
    try:
        return composed(Form((part,)), [content])
    except ValueError:
        allowed = _ALLOWED.get(part.kind) or f"must be one of {', '.join(part.choices)}"
        raise InvalidRow(f"{part.review_column} {allowed}") from None


def _number(typed: str) -> str:
    """Return a number as a form writes it: with a point, and no decimals if it is whole."""
    text = typed.strip().replace(",", ".")
    with suppress(ValueError):
        return str(printed(float(text)))
    return text


def _same(part: Part, piece: str, generated: Content) -> bool:
    found = parts_of(Form((part,)), piece)
    return found is not None and squeezed(str(in_a_cell(found[0]))) == squeezed(str(in_a_cell(generated)))


def laid_out(form: Form, edited: str) -> str:
    """Return a whole text that a reviewer corrected in the layout of the form. Raises InvalidRow if it lacks it."""
    found = edited if parts_of(form, edited) else recovered(form, edited)
    if found is None:
        headings = ", ".join(part.heading for part in form.parts)
        raise InvalidRow(f"gxr_review_text needs the sections of this run, each under its heading: {headings}")
    return found
