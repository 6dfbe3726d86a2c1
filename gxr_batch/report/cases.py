"""The columns of the cases as the page holds them: JSON values, with what was shortened or withheld said so.

Held rows are held because something in them looks like an identifier: unless a person asks for it, the page has neither
their texts nor the user's cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from gxr_batch.cells import as_text
from gxr_batch.report.packing import mean_length

# What is left out of a cell is said behind it; the whole stands in the run's Parquet.
MOST_CHARACTERS = 20_000
SHORTENED = " … [shortened in this page]"
_HASH_DIGITS = 8
_HASHES = frozenset({"gxr_prompt_sha256"})
# Columns that quote a held row's text, besides the user's own.
_QUOTING = frozenset({"gxr_text", "gxr_review_text", "gxr_review_comment"})
_LONG = 16  # mean characters from which a column of texts is packed by words
_DIGITS = 4  # of seconds and speeds; the Parquet has them all


class Column(NamedTuple):
    """One column: `own` is the user's, `other` that of the run compared with; `kind` tells the page how to show it.

    kind: text, number, moment (UTC milliseconds), flags (a list), words (a long text, packed apart).
    """

    name: str
    kind: str
    values: list[Any]
    own: bool = False
    other: bool = False

    def head(self) -> dict[str, Any]:
        """Return what the page's script needs to know; values that are all the same stand there once."""
        entry: dict[str, Any] = {"name": self.name, "kind": self.kind, "own": self.own, "other": self.other}
        if self.kind == "words":
            return entry
        first = self.values[0] if self.values else None
        if all(value == first for value in self.values):
            return {**entry, "constant": first}
        return {**entry, "values": self.values}


def held(table: pa.Table) -> list[bool]:
    """Return which rows are held."""
    return [status == "held" for status in table["gxr_status"].to_pylist()]


def columns_of(table: pa.Table, hidden: Sequence[bool], *, other: bool = False) -> tuple[list[Column], int]:
    """Return the columns of some cases, and how many of their cells were shortened; `hidden` ones are withheld."""
    columns, shortened = [], 0
    for field in table.schema:
        own = not field.name.startswith("gxr_")
        kind, show = _shown(field)
        values = [None if value is None else show(value) for value in table[field.name].to_pylist()]
        if own or field.name in _QUOTING:
            values = [None if veil else value for veil, value in zip(hidden, values, strict=True)]
        if kind == "text":
            short = [_short(value) for value in values]
            shortened += sum(one is not value for one, value in zip(short, values, strict=True))
            values = short
            kind = "words" if mean_length(values) > _LONG and len(set(values)) > 1 else kind
        columns.append(Column(field.name, kind, values, own, other))
    return columns, shortened


def _shown(field: pa.Field) -> tuple[str, Callable[[Any], Any]]:
    kind = field.type
    if field.name in _HASHES:
        return "text", lambda value: f"{value[:_HASH_DIGITS]}…"
    if field.name == "gxr_flags":
        return "flags", list
    if pa.types.is_timestamp(kind) and field.name.startswith("gxr_"):
        return "moment", lambda value: round(value.timestamp() * 1000)
    if pa.types.is_integer(kind):
        return "number", _whole
    if pa.types.is_floating(kind):
        return "number", _rounded if field.name.startswith("gxr_") else _finite
    return "text", as_text


def _whole(value: int) -> Any:
    return value if abs(value) < 2**53 else str(value)  # what a browser's numbers hold without loss


def _finite(value: float) -> Any:
    return value if math.isfinite(value) else str(value)


def _rounded(value: float) -> Any:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else str(value)


def _short(text: str | None) -> str | None:
    return text if text is None or len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + SHORTENED


def findings_of(columns: Sequence[Column], mapped: str) -> str:
    """Return the name of the user's column that stands beside the generated text.

    `mapped` is the one that the job uses as findings; where the table has no such column, the longest.
    """
    own = [column for column in columns if column.own and not column.other]
    if any(column.name == mapped for column in own):
        return mapped
    return max(own, key=lambda column: mean_length(column.values), default=Column("", "text", [])).name
