"""The cases of the page: which of them it has room for, their columns, and what the page says of both.

They go into the page as JSON, compressed with gzip and spelled in base64, which every browser can undo by itself
(`unpacked` in web/table.js). Held rows are held because something in them looks like an identifier: unless a person
asks for it, the page has neither their texts nor the user's cells.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from gxr_batch.cells import as_text
from gxr_batch.report.aggregate import MOST_CASES, Cases, Surveyed, keys_of
from gxr_batch.report.compare import SAME, VERDICTS, Comparison
from gxr_batch.report.invocations import mapping
from gxr_batch.text_checks.descriptions import EVERY_FLAG

# Of the 8 MB of a page; charts and their tables, style and script take the rest.
MOST_PACKED_BYTES = 7_780_000
# What is left out of a cell is said behind it; the whole stands in the run's Parquet.
MOST_CHARACTERS = 20_000
SHORTENED = " … [shortened in this page]"
_HASH_DIGITS = 8
_HASHES = frozenset({"gxr_prompt_sha256"})
# Columns that quote a held row's text, besides the user's own.
_QUOTING = frozenset({"gxr_text", "gxr_review_text", "gxr_review_comment"})
_DIGITS = 4  # of seconds and speeds; the Parquet has them all
# What the case view shows of the other run; a column that is the same in every row is held once.
_OF_THE_OTHER = (
    "gxr_text", "gxr_status", "gxr_flags", "gxr_error", "gxr_finish_reason", "gxr_new_tokens", "gxr_seconds_generating",
    "gxr_review_status", "gxr_review_text", "gxr_template", "gxr_model", "gxr_adapter",
)  # fmt: skip
_KEY = ("gxr_row_id", "gxr_sample")


class CaseTable(NamedTuple):
    """The packed cases, the user's column that is shown beside the texts, and what the reader should know of them."""

    packed: str
    findings: str
    shown: int
    sentence: str
    notices: tuple[str, ...]


class Column(NamedTuple):
    """One column: `own` is the user's, `other` that of the run compared with; `kind` tells the page how to show it.

    kind: text, number, moment (UTC milliseconds), flags (a list).
    """

    name: str
    kind: str
    values: list[Any]
    own: bool = False
    other: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return what the page's script gets; values that are all the same are given once."""
        entry: dict[str, Any] = {"name": self.name, "kind": self.kind, "own": self.own, "other": self.other}
        first = self.values[0] if self.values else None
        if all(value == first for value in self.values):
            return {**entry, "constant": first}
        return {**entry, "values": self.values}


def case_table(surveyed: Surveyed, comparison: Comparison | None, include_held: bool) -> CaseTable:
    """Return the table with as many cases as the page has room for; no text is cut to make room for another."""
    most = MOST_CASES
    while True:
        cases = surveyed.chooser.cases(surveyed.reader.schema, most)
        table = _table(surveyed, cases, comparison, include_held)
        if len(table.packed) <= MOST_PACKED_BYTES or table.shown <= 1:
            return table
        most = max(1, int(table.shown * MOST_PACKED_BYTES / len(table.packed) * 0.97))


def _table(surveyed: Surveyed, cases: Cases, comparison: Comparison | None, include_held: bool) -> CaseTable:
    hidden = held(cases.table)
    beside = _other_rows(comparison, cases) if comparison else None
    if beside is not None:  # what one of the runs holds back the other must not give away
        hidden = [here or there for here, there in zip(hidden, held(beside), strict=True)]
    hidden = [one and not include_held for one in hidden]
    columns, shortened = columns_of(cases.table, hidden)
    mapped = mapping(mapping(surveyed.reader.manifest.job.get("input")).get("columns")).get("findings", "findings")
    findings = _findings_of(columns, mapped)
    if comparison and beside is not None:
        more, cut = _other_columns(comparison, cases, beside, hidden)
        columns, shortened = columns + more, shortened + cut
    packed = _packed(
        {
            "rows": cases.table.num_rows,
            "places": cases.places.tolist(),
            "findings": findings,
            "other": comparison.name if comparison else "",
            "legend": EVERY_FLAG,
            "include_held": include_held,
            "columns": [column.as_dict() for column in columns],
        }
    )
    notices = _notices(shortened, sum(hidden))
    return CaseTable(packed, findings, cases.table.num_rows, _sentence(surveyed, cases), notices)


def _packed(cases: dict[str, Any]) -> str:
    """Return an object as text that is safe inside a script element."""
    text = json.dumps(cases, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), mtime=0)).decode("ascii")


def _sentence(surveyed: Surveyed, cases: Cases) -> str:
    """Say which cases the table shows."""
    shown, rows = cases.table.num_rows, surveyed.tally.rows
    if shown == rows:
        return f"All {rows:,} finished rows, each beside the text that was generated for it."
    which = "the first that failed, are held or have a flag"
    if not cases.marked_only:
        which = "all that failed, are held or have a flag, and the first of the others"
    return (
        f"{shown:,} of {rows:,} finished rows: {which}. The others stand in the run folder; "
        "gxr-batch export writes all of them as a workbook."
    )


def _notices(shortened: int, withheld: int) -> tuple[str, ...]:
    found = []
    if withheld:
        rows = "1 held row" if withheld == 1 else f"{withheld:,} held rows"
        found.append(f"Cells and text of {rows} are withheld here; gxr-batch report --include-held shows them.")
    if shortened:
        cells = "1 very long cell is" if shortened == 1 else f"{shortened:,} very long cells are"
        found.append(f"{cells} shortened in this page; the run's Parquet has the whole.")
    return tuple(found)


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
        columns.append(Column(field.name, kind, values, own, other))
    return columns, shortened


def _shown(field: pa.Field) -> tuple[str, Callable[[Any], Any]]:
    """Return a column's kind, and how one of its values becomes one of JSON."""
    kind = field.type
    if field.name in _HASHES:
        return "text", lambda value: f"{value[:_HASH_DIGITS]}…"
    if field.name == "gxr_flags":
        return "flags", list
    if pa.types.is_timestamp(kind) and field.name.startswith("gxr_"):
        return "moment", lambda value: round(value.timestamp() * 1000)
    if pa.types.is_integer(kind):  # a browser's numbers hold so much without loss
        return "number", lambda value: value if abs(value) < 2**53 else str(value)
    if pa.types.is_floating(kind):
        return "number", _rounded if field.name.startswith("gxr_") else _finite
    return "text", as_text


def _finite(value: float) -> Any:
    return value if math.isfinite(value) else str(value)


def _rounded(value: float) -> Any:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else str(value)


def _short(text: str | None) -> str | None:
    return text if text is None or len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + SHORTENED


def _findings_of(columns: Sequence[Column], mapped: str) -> str:
    """Return the name of the user's column that is shown beside the generated text.

    `mapped` is the one that the job uses as findings; where the table has no such column, the longest.
    """
    own = [column for column in columns if column.own and not column.other]
    if any(column.name == mapped for column in own):
        return mapped
    return max(own, key=lambda column: _mean_length(column.values), default=Column("", "text", [])).name


def _mean_length(values: Iterable[Any]) -> float:
    """Return the mean number of characters of the texts among the values, 0 where there is none."""
    lengths = [len(value) for value in values if isinstance(value, str)]
    return sum(lengths) / len(lengths) if lengths else 0.0


def _other_rows(comparison: Comparison, cases: Cases) -> pa.Table:
    """Return the other run's rows for these cases, in their order; a row of nulls where it has none."""
    keys = keys_of(cases.table)
    pieces = [comparison.other.reader.schema.empty_table()]
    rows = comparison.other.reader.finished(include_held=comparison.other.include_held)
    pieces += [table.filter(pc.is_in(keys_of(table), value_set=keys)) for table in rows]
    found = pa.concat_tables([piece.select([*_KEY, *_present(piece)]) for piece in pieces])
    return found.take(pc.index_in(keys, value_set=keys_of(found))).select(_present(found))


def _other_columns(
    comparison: Comparison, cases: Cases, rows: pa.Table, hidden: Sequence[bool]
) -> tuple[list[Column], int]:
    """Return the columns of `_other_rows`, and how many cells were shortened.

    A text that is the same in both runs is held once: its cell is empty, and the verdict says so.
    """
    verdicts = comparison.verdicts[cases.places]
    columns, shortened = columns_of(rows, hidden, other=True)
    texts = next(column for column in columns if column.name == "gxr_text")
    texts.values[:] = [None if verdict == SAME else text for verdict, text in zip(verdicts, texts.values, strict=True)]
    verdict = Column("comparison", "text", [VERDICTS[number] for number in verdicts], other=True)
    return [verdict, *columns], shortened


def _present(table: pa.Table) -> list[str]:
    return [name for name in _OF_THE_OTHER if name in table.column_names]
