"""A sheet of an Excel workbook as Arrow tables of text columns, each cell as Excel shows it.

openpyxl reads row by row; it holds a workbook's table of texts in memory. The header is the first row that is not a
title. Rows without any cell are passed over.
"""

from __future__ import annotations

import datetime as dt
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from gxr_batch.cells import is_unicode, quoted
from gxr_batch.errors import TableError
from gxr_batch.job import InputSection
from gxr_batch.rows.columns import counted
from gxr_batch.rows.csv_layout import is_header_below, is_unnamed_header
from gxr_batch.rows.number_formats import general, shown_number, shown_time
from gxr_batch.rows.source_files import Look, NothingInside, Say, SourceFile, changed_error, reading, sha256_of
from gxr_batch.rows.workbook_container import (
    damage_as,
    load_book,
    numbered_rows,
    readable,
    refuse_other_containers,
    unescaped,
    without_halves,
)

_ROWS_A_BATCH, _CHARACTERS_A_BATCH = 4_096, 2**23
_SAMPLE_RECORDS = 20
_MOST_TITLE_ROWS = 20
_SHEETS_NAMED = 10
# Possessive, and never across a tag: what a foreign file has must not cost more than one pass.
_NS = r"(?:\w++:)?"  # the Open XML SDK writes <x:c>
_FORMULA = re.compile(
    rf"<{_NS}c\b([^<>]*+)>\s*+<{_NS}f\b[^<>]*+(?:(?<=/)>|>[^<]*+</{_NS}f>)"
    rf"\s*+(?:<{_NS}v\s*+/>\s*+|<{_NS}v>\s*+</{_NS}v>\s*+)?</{_NS}c>".encode()
)
_HIDDEN_ROW = re.compile(rf'<{_NS}row\b[^<>]*?\bhidden="(?:1|true)"'.encode())
_MERGED = re.compile(rf"<{_NS}mergeCell\b".encode())
_CHUNK, _OVERLAP = 2**20, 2**14


@dataclass(frozen=True, kw_only=True)
class WorkbookSheet(SourceFile):
    """One sheet. `first_row` is the first below the header, `header` has the names as shown."""

    sheet: str
    first_row: int
    header: tuple[str, ...]
    named: bool = False

    @property
    def reading(self) -> str:
        """Which rows of which sheet are read, and how: 2, where a percent sign that is text does not multiply."""
        return f" 2 {self.sheet!r} {self.first_row} {self.header!r}"

    def own_batches(self, nulls: Collection[str], say: Say) -> Iterator[pa.Table]:
        """Yield the rows as tables of `own_schema`."""
        return batches(self, nulls, say)


class _Row(NamedTuple):
    number: int
    cells: list[str]


def look(path: Path, section: InputSection) -> Look:
    """Return the header of the sheet. Raises TableError."""
    sha256 = sha256_of(path)
    with _opened(path) as book:
        sheet, notices = _sheet(path, book, section.sheet)
        skip = section.skip_lines if section.skip_lines != "auto" else 0
        rows = list(islice(_rows(path, sheet, skip, Counter()), _MOST_TITLE_ROWS + _SAMPLE_RECORDS))
        notices += list(_inspected(path, book, sheet))
    if not rows:
        raise NothingInside(
            f"The sheet {quoted(sheet.title)} is empty.", where=str(path), next_step=f"set input.sheet; {_listed(book)}"
        )
    head = 0
    if section.skip_lines == "auto" and not section.column_names:
        head = _title_rows([row.cells for row in rows])
        if head:
            notices.append(
                f"the rows above row {rows[head].number} are skipped as a title; input.skip_lines = 0 reads the header "
                "from the first row"
            )
    names = list(section.column_names) or rows[head].cells
    first, *below = [row.cells for row in rows]
    if section.column_names and [cell.strip() for cell in first] != names and is_unnamed_header(first, below):
        number = rows[0].number
        notices.append(
            f"row {number} looks like a header, but is read as a row because input.column_names is set; "
            f"input.skip_lines = {number} leaves it out"
        )
    fields = {
        "sheet": sheet.title,
        "header": tuple(names),
        "first_row": rows[head].number + (not section.column_names),
        "named": bool(section.column_names),
    }
    return Look(names, [pa.string()] * len(names), sha256, WorkbookSheet, fields, tuple(notices))


def batches(file: WorkbookSheet, nulls: Collection[str], say: Say) -> Iterator[pa.Table]:
    """Yield the rows as tables of `file.own_schema`. Cells that are empty or one of `nulls` are null.

    Raises TableError for a row with more cells than the header, and if the file changed since the survey.
    """
    missing = frozenset(nulls) | {""}
    header = [name.strip() for name in file.header]
    schema = file.own_schema
    repeated: list[int] = []
    odd: Counter[str] = Counter()
    with _opened(file.path) as book:
        sheet, _ = _sheet(file.path, book, file.sheet)
        kept: list[list[str]] = []
        size = 0
        for number, cells in _rows(file.path, sheet, file.first_row - 1, odd, file.width):
            if len(cells) > file.width:
                raise _too_wide(file, number, len(cells))
            if [cell.strip() for cell in cells] == header:
                repeated.append(number)
                continue
            kept.append(cells + [""] * (file.width - len(cells)))
            size += file.width + sum(map(len, cells))
            if len(kept) == _ROWS_A_BATCH or size > _CHARACTERS_A_BATCH:
                yield _table(kept, file, missing, schema)
                kept, size = [], 0
        if kept:
            yield _table(kept, file, missing, schema)
    if sha256_of(file.path) != file.sha256:
        raise changed_error(file)
    if repeated:
        rows = "row" if len(repeated) == 1 else "rows"
        say(f"{quoted(file.path)}: {rows} {', '.join(map(str, repeated[:5]))} with the names of the header: left out")
    if errors := odd["errors"]:
        say(f"{quoted(file.path)}: {counted(errors, 'cell')} with an Excel error such as #N/A: read as missing")
    if halves := odd["halves"]:
        say(f"{quoted(file.path)}: {counted(halves, 'cell')} with half a character such as _xD800_: read as \ufffd")


def _table(rows: list[list[str]], file: WorkbookSheet, missing: Collection[str], schema: pa.Schema) -> pa.Table:
    columns = list(zip(*rows, strict=True))
    values = [[None if cell in missing else cell for cell in columns[place]] for place in file.places]
    return pa.Table.from_arrays([pa.array(cells, pa.string()) for cells in values], schema=schema)


def _too_wide(file: WorkbookSheet, number: int, width: int) -> TableError:
    from openpyxl.utils import get_column_letter

    return TableError(
        f"A row has a cell in column {get_column_letter(width)}; "
        f"{'input.column_names' if file.named else 'the header'} ends in column {get_column_letter(file.width)}.",
        where=f"{file.path}, sheet {quoted(file.sheet)}, row {number}",
        next_step="name that column in the header, or clear the cell; if the header is below other rows, set "
        "input.skip_lines",
    )


def _title_rows(rows: Sequence[Sequence[str]]) -> int:
    """Return how many of the first rows are a title above the header."""
    for head in range(1, min(_MOST_TITLE_ROWS, len(rows) - 1)):
        below = rows[head : head + 1 + _SAMPLE_RECORDS]
        width = len(below[0])
        # Cells at the end of a row may be empty.
        if all(len(row) <= width for row in below):
            padded = [[*row, *[""] * (width - len(row))] for row in below]
            if _may_be_a_title(rows[0], width) and is_header_below(rows[:head], padded):
                return head
    return 0


def _may_be_a_title(first: Sequence[str], width: int) -> bool:
    return len(first) < width and sum(bool(cell) for cell in first) == 1


def _sheet(path: Path, book: Any, wanted: str) -> tuple[Any, list[str]]:
    """Return the sheet that the job names, or else the first one, with a notice about the others."""
    sheets = {sheet.title: sheet for sheet in book.worksheets}
    if not sheets:
        raise TableError(
            "The workbook has no sheet with cells.",
            where=str(path),
            next_step="save the table in a sheet or as CSV",
        )
    if wanted and wanted not in sheets:
        raise TableError(
            f"The workbook has no sheet {quoted(wanted)}.", where=f"{path}, input.sheet", next_step=_listed(book)
        )
    title = wanted or next(iter(sheets))
    if wanted or len(sheets) == 1:
        return sheets[title], []
    return sheets[title], [f"the first of {len(sheets)} sheets is read, {quoted(title)}; input.sheet names another one"]


def _listed(book: Any) -> str:
    titles = [quoted(sheet.title) for sheet in book.worksheets]
    return f"its sheets: {', '.join(titles[:_SHEETS_NAMED])}{', ...' if len(titles) > _SHEETS_NAMED else ''}"


def _rows(path: Path, sheet: Any, skip: int, odd: Counter[str], width: int = 0) -> Iterator[_Row]:
    """Yield the rows below the first `skip` ones, without empty cells at their end and without empty rows.

    Counts in `odd` the cells with errors and with half characters.
    """

    def shown(cell: Any) -> str:
        value = cell.value
        if isinstance(value, str) and cell.data_type == "e":
            odd["errors"] += 1
            return ""
        text = _text(value, cell)
        if isinstance(value, str) and "_x" in value and not is_unicode(text):
            odd["halves"] += 1
            return without_halves(text)
        return text

    for number, texts in numbered_rows(path, sheet, lambda: _damage(path), shown, "", width=width):
        while texts and not texts[-1].strip():
            texts.pop()
        if texts and number > skip:
            yield _Row(number, texts)


def _text(value: Any, cell: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return unescaped(value)
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, int | float):
        return general(value) if cell.number_format == "General" else shown_number(value, cell.number_format)
    if isinstance(value, dt.datetime | dt.date | dt.time | dt.timedelta):
        return shown_time(value)
    return str(value)


def _inspected(path: Path, book: Any, sheet: Any) -> Iterator[str]:
    """Yield notices about what the cells alone do not show. Raises TableError for formulas without stored values."""
    formulas = hidden = merged = 0
    with _damage(path), sheet._get_source() as source:
        rest = b""
        while chunk := source.read(_CHUNK):
            text = rest + chunk
            # A match that reaches into the overlap is counted with the next chunk.
            limit = len(text) - _OVERLAP if len(chunk) == _CHUNK else len(text)
            formulas += sum(b't="str"' not in hit[1] for hit in _FORMULA.finditer(text) if hit.start() < limit)
            hidden += sum(hit.start() < limit for hit in _HIDDEN_ROW.finditer(text))
            merged += sum(hit.start() < limit for hit in _MERGED.finditer(text))
            rest = text[max(limit, 0) :]
    if formulas:
        raise TableError(
            f"{counted(formulas, 'cell')} of the sheet {quoted(sheet.title)} with a formula but without its value.",
            where=str(path),
            next_step="open the workbook in Excel or LibreOffice and save it: that stores the values",
        )
    if hidden:
        yield f"{counted(hidden, 'row')} of the sheet {quoted(sheet.title)} hidden in Excel: read like the others"
    if merged:
        yield f"the sheet {quoted(sheet.title)} has merged cells: only the first cell of each has its text"


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    refuse_other_containers(path)
    with ExitStack() as opened:
        with _damage(path):
            source = opened.enter_context(readable(path))
            book = load_book(source)
        opened.callback(book.close)
        yield book


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    with reading(path), damage_as(TableError, path):
        yield
