"""Cells of a sheet as text, and the error of a row that is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# What a spreadsheet shows if it read a text as a formula.
_SHEET_ERROR = re.compile(r"#(NAME\?|VALUE!|REF!|N/A|DIV/0!|NUM!|NULL!)|Err:\d+")
_BLANKS = re.compile(r"\s+")


class InvalidRow(Exception):
    """A row is refused; the message gives the reason and names columns, and never quotes a cell."""


def squeezed(text: str) -> str:
    """Return a text with every whitespace as one blank."""
    return _BLANKS.sub(" ", text).strip()


def text_of_cell(cells: Mapping[str, Any], name: str) -> str | None:
    """Return a cell as text, None if it is empty. Raises InvalidRow for a spreadsheet's error."""
    value = cells.get(name)
    if value is None:
        return None
    text = str(value).replace("\r\n", "\n").strip()
    if _SHEET_ERROR.fullmatch(text):
        raise InvalidRow(
            f"{name} has a spreadsheet error; type an apostrophe before a text that starts with = + - or @"
        )
    return text or None
