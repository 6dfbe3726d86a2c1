"""Selects the cases of the report, packs their columns, and describes the selection.

Cases are embedded as JSON, compressed with gzip and encoded in base64 (`unpacked` in web/table.js decodes them). Held
rows may contain identifiers: unless the user includes them, the report has neither their texts nor the user's cells.
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

from gxr_batch.audit.comparison import SAME, VERDICTS
from gxr_batch.audit.row_digest import keys_of
from gxr_batch.cells import as_text, values_of
from gxr_batch.forms import Part
from gxr_batch.records import GENERATED_COLUMNS, LIST_COLUMNS
from gxr_batch.report.aggregate import MOST_CASES, Cases, Surveyed
from gxr_batch.report.compare import Comparison
from gxr_batch.report.invocations import mapping
from gxr_batch.text_checks.descriptions import described

# The report stays under 8 MB; charts and their tables, style and script take the rest.
MOST_PACKED_BYTES = 7_780_000
# Longer cells are cut and end in SHORTENED; the run's Parquet files hold the full text.
MOST_CHARACTERS = 20_000
SHORTENED = " … [shortened in this report]"
_HASH_DIGITS = 8
_HASHES = frozenset({"gxr_prompt_sha256"})
# Columns that hold text of a held row or tell of its cells, besides the user's columns.
_QUOTING = frozenset(
    {*GENERATED_COLUMNS, "gxr_review_text", "gxr_review_comment", "gxr_findings_kept", "gxr_findings_lost"}
)
_DIGITS = 4  # significant digits of seconds and rates
# Columns of the other run in the case view; a column with one value in all rows is stored once.
_OF_THE_OTHER = (
    "gxr_text", "gxr_status", "gxr_flags", "gxr_error", "gxr_finish_reason", "gxr_new_tokens", "gxr_seconds_generating",
    "gxr_review_status", "gxr_review_text", "gxr_template", "gxr_model", "gxr_adapter", "gxr_findings_lost",
)  # fmt: skip
_KEY = ("gxr_row_id", "gxr_sample")


class CaseTable(NamedTuple):
    """The packed cases, the name of the user's column shown next to the texts, and sentences about the selection."""

    packed: str
    findings: str
    shown: int
    sentence: str
    notices: tuple[str, ...]


class Column(NamedTuple):
    """One column: `own` if it is the user's, `other` if it is of the run compared with.

    `kind`: text, number, moment (UTC milliseconds) or list.
    """

    name: str
    kind: str
    values: list[Any]
    own: bool = False
    other: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the column for JSON; if all values are equal, as one constant."""
        entry: dict[str, Any] = {"name": self.name, "kind": self.kind, "own": self.own, "other": self.other}
        first = self.values[0] if self.values else None
        if all(value == first for value in self.values):
            return {**entry, "constant": first}
        return {**entry, "values": self.values}


def case_table(surveyed: Surveyed, comparison: Comparison | None, include_held: bool) -> CaseTable:
    """Return the table with as many cases as fit in MOST_PACKED_BYTES."""
    most = MOST_CASES
    while True:
        cases = surveyed.chooser.cases(surveyed.reader.schema, most)
        table = _table(surveyed, cases, comparison, include_held)
        if len(table.packed) <= MOST_PACKED_BYTES or table.shown <= 1:
            return table
        most = max(1, int(table.shown * MOST_PACKED_BYTES / len(table.packed) * 0.97))


def _table(surveyed: Surveyed, cases: Cases, comparison: Comparison | None, include_held: bool) -> CaseTable:
    hidden = held(cases.table)
    other_rows = _other_rows(comparison, cases) if comparison else None
    if other_rows is not None:  # a row held in one run must not be shown by the other
        hidden = [here or there for here, there in zip(hidden, held(other_rows), strict=True)]
    hidden = [one and not include_held for one in hidden]
    form = surveyed.reader.form
    # The page takes texts apart itself: columns of sections would hold every text twice.
    columns, shortened = columns_of(cases.table.drop_columns(form.columns) if form else cases.table, hidden)
    mapped = mapping(mapping(surveyed.reader.manifest.job.get("input")).get("columns")).get("findings", "findings")
    findings = _findings_of(columns, mapped)
    if comparison and other_rows is not None:
        more, cut = _other_columns(comparison, cases, other_rows, hidden)
        columns, shortened = columns + more, shortened + cut
    packed = _packed(
        {
            "rows": cases.table.num_rows,
            "places": cases.places.tolist(),
            "findings": findings,
            "other": comparison.name if comparison else "",
            "legend": described(form),
            "include_held": include_held,
            "form": [_part(part) for part in form.parts] if form else [],
            "columns": [column.as_dict() for column in columns],
        }
    )
    notices = _notices(shortened, sum(hidden))
    return CaseTable(packed, findings, cases.table.num_rows, _sentence(surveyed, cases), notices)


def _part(part: Part) -> dict[str, Any]:
    return {"heading": part.heading, "opening": part.opening, "kind": part.kind, "hidden": part.hidden}


def _packed(cases: dict[str, Any]) -> str:
    """Return an object as text that is safe in a script element."""
    text = json.dumps(cases, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), mtime=0)).decode("ascii")


def _sentence(surveyed: Surveyed, cases: Cases) -> str:
    """Return a sentence about which cases the table shows."""
    shown, rows = cases.table.num_rows, surveyed.tally.rows
    if shown == rows:
        return f"All {rows:,} finished rows with their generated texts."
    which = "the first ones that failed, are held or have a flag"
    if not cases.marked_only:
        which = "all that failed, are held or have a flag, and the first of the rest"
    return (
        f"{shown:,} of {rows:,} finished rows: {which}. All rows are in the run folder; "
        "gxr-batch export writes them to a workbook."
    )


def _notices(shortened: int, withheld: int) -> tuple[str, ...]:
    found = []
    if withheld:
        rows = "1 held row" if withheld == 1 else f"{withheld:,} held rows"
        found.append(f"Cells and texts of {rows} are withheld; gxr-batch report --include-held shows them.")
    if shortened:
        cells = "1 very long cell is" if shortened == 1 else f"{shortened:,} very long cells are"
        found.append(f"{cells} shortened in this report; the run's Parquet files have the full text.")
    return tuple(found)


def held(table: pa.Table) -> list[bool]:
    """Return which rows are held."""
    return [status == "held" for status in table["gxr_status"].to_pylist()]


def columns_of(table: pa.Table, hidden: Sequence[bool], *, other: bool = False) -> tuple[list[Column], int]:
    """Return the columns of these cases, and how many cells were shortened; rows marked `hidden` are withheld."""
    columns, shortened = [], 0
    for field in table.schema:
        own = not field.name.startswith("gxr_")
        kind, show = _shown(field)
        values = [None if value is None else show(value) for value in values_of(table[field.name])]
        if own or field.name in _QUOTING:
            values = [None if veil else value for veil, value in zip(hidden, values, strict=True)]
        if kind == "text":
            short = [_short(value) for value in values]
            shortened += sum(one is not value for one, value in zip(short, values, strict=True))
            values = short
        columns.append(Column(field.name, kind, values, own, other))
    return columns, shortened


def _shown(field: pa.Field) -> tuple[str, Callable[[Any], Any]]:
    """Return a column's kind, and the function that converts its values for JSON."""
    kind = field.type
    if field.name in _HASHES:
        return "text", lambda value: f"{value[:_HASH_DIGITS]}…"
    if field.name in LIST_COLUMNS:
        return "list", list
    if pa.types.is_timestamp(kind) and field.name.startswith("gxr_"):
        return "moment", lambda value: round(value.timestamp() * 1000)
    if pa.types.is_integer(kind):  # JavaScript numbers are exact up to there
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
    """Return the name of the user's column to show next to the generated text.

    That is `mapped`, the job's findings column, or if it does not exist, the column with the longest texts.
    """
    own = [column for column in columns if column.own and not column.other]
    if any(column.name == mapped for column in own):
        return mapped
    return max(own, key=lambda column: _mean_length(column.values), default=Column("", "text", [])).name


def _mean_length(values: Iterable[Any]) -> float:
    """Return the mean length of the texts among the values, 0 if there are none."""
    lengths = [len(value) for value in values if isinstance(value, str)]
    return sum(lengths) / len(lengths) if lengths else 0.0


def _other_rows(comparison: Comparison, cases: Cases) -> pa.Table:
    """Return the other run's rows for these cases, in the same order; all null if it has no such row."""
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

    A text that is the same in both runs is stored once: its cell here is null.
    """
    verdicts = comparison.compared.verdicts[cases.places]
    columns, shortened = columns_of(rows, hidden, other=True)
    texts = next(column for column in columns if column.name == "gxr_text")
    texts.values[:] = [None if verdict == SAME else text for verdict, text in zip(verdicts, texts.values, strict=True)]
    verdict = Column("comparison", "text", [VERDICTS[number] for number in verdicts], other=True)
    return [verdict, *columns], shortened


def _present(table: pa.Table) -> list[str]:
    return [name for name in _OF_THE_OTHER if name in table.column_names]
