"""Cells as text: how null, times, lists and bytes are written, and what a spreadsheet must not run or cannot hold."""

from __future__ import annotations

import base64
import json
import re
from datetime import date, datetime, time
from typing import Any, NamedTuple

import pyarrow as pa

# What may start a formula, a command or a field in a spreadsheet (OWASP's list), full-width forms included.
FORMULA_STARTS = frozenset("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
# Excel's limits for one cell: UTF-16 units, and line feeds above which it reports the file as damaged.
MOST_UNITS, MOST_LINE_FEEDS = 32_767, 253
CUT_MARK = " […cut: the whole text stands in results.parquet]"
_LINE_MARK = " ⏎ "
# Characters that XML 1.0 does not allow: control characters, lone surrogates, two non-characters.
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
# What could move the cursor, hide text or reverse it: C0 and C1 controls, direction marks, lone surrogates.
_NOT_TERMINAL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u061c\u2028\u2029\ufeff\u2066-\u2069\U000e0000-\U000e007f\ud800-\udfff]"
)


class CellText(NamedTuple):
    """A text that one cell of a workbook can hold; `cut` if some of it was removed."""

    text: str
    cut: bool = False


def as_text(value: Any) -> str:
    """Return a cell's text: empty for null, ISO for times, JSON for nested and binary values."""
    if value is None or value == []:
        return ""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="milliseconds")
    if isinstance(value, bytes):
        return json.dumps(plain(value))
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=plain)
    return str(value)


def plain(value: Any) -> str:
    """Return a value that JSON lacks as text: bytes in base64, times in ISO form, anything else as Python prints it."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if isinstance(value, date | time | datetime) else str(value)


def is_number(kind: pa.DataType) -> bool:
    """Return whether cells of this type are numbers, which no spreadsheet reads as a formula."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def for_terminal(text: str) -> str:
    """Return the text with control characters and direction marks as escapes such as \\x1b; lines and tabs stay."""
    return _NOT_TERMINAL.sub(lambda sign: sign[0].encode("unicode_escape").decode("ascii"), text.replace("\r\n", "\n"))


def guard(text: str) -> str:
    """Return the text so that no spreadsheet runs it."""
    return f"'{text}" if text.lstrip(" \u00a0\u3000")[:1] in FORMULA_STARTS and text else text


def unguard(text: str) -> str:
    """Return a text without the apostrophe that `guard` adds."""
    return text[1:] if text[:1] == "'" and guard(text[1:]) == text else text


def for_workbook(text: str) -> CellText:
    """Return the text as one cell of a workbook can hold it: line ends as LF, only XML characters, within limits."""
    if text.isascii() and text.isprintable() and len(text) <= MOST_UNITS and not text.startswith("<r>"):
        return CellText(text)
    text = _NOT_XML.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))
    if text.startswith("<r>"):  # the workbook writer would read it as markup
        text = f" {text}"
    feeds = text.count("\n")
    if feeds > MOST_LINE_FEEDS:
        lines = text.split("\n")
        text = "\n".join(lines[:MOST_LINE_FEEDS]) + _LINE_MARK + _LINE_MARK.join(lines[MOST_LINE_FEEDS:])
    if _units(text) <= MOST_UNITS:
        return CellText(text, cut=feeds > MOST_LINE_FEEDS)
    limit = MOST_UNITS - _units(CUT_MARK)
    kept = text.encode("utf-16-le")[: 2 * limit].decode(
        "utf-16-le", "ignore"
    )  # half a surrogate pair at the end is dropped
    return CellText(kept + CUT_MARK, cut=True)


def _units(text: str) -> int:
    return len(text) + sum(character > "\uffff" for character in text) if not text.isascii() else len(text)
