"""Reads reviewed sheets as rows of named cells: workbooks, and CSV files saved by a spreadsheet.

The header is found by its column gxr_row_id, not by position: there may be a banner above it, added sheets and moved
columns. parse_row interprets the cells.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from gxr_batch.cells import quoted, unguard
from gxr_batch.disk import storage_errors
from gxr_batch.errors import RunError
from gxr_batch.rows.encoding import open_lines, scan, separator_line
from gxr_batch.rows.workbook_container import (
    damage_as,
    is_zip,
    load_book,
    numbered_rows,
    readable,
    refuse_other_containers,
    unescaped,
)

KEY, STATUS = "gxr_row_id", "gxr_review_status"
_HEADER_WITHIN = 20  # rows from the top that are searched for a header
_MOST_CHARACTERS = 2**24  # in one CSV cell
_SAMPLED_CHARACTERS = 2**20  # read to detect the delimiter


class SheetRow(NamedTuple):
    """One row: its sheet and row number as a spreadsheet shows them, and its cells by column name.

    Cells are text, numbers or dates as in the file, and all text in a CSV. Empty cells are left out. `encoding` is that
    of a CSV, "" for a workbook. `out_of_sight`: Excel does not even list the sheet among the hidden ones.
    """

    sheet: str
    number: int
    cells: Mapping[str, Any]
    encoding: str = ""
    out_of_sight: bool = False


def read_sheets(path: Path) -> Iterator[SheetRow]:
    """Yield the rows below each header with gxr_row_id. Raises RunError if there is none, TableError, StorageError."""
    _refuse_unsupported(path)
    refuse_other_containers(path)
    book = path.suffix.lower() in {".xlsx", ".xlsm"} or is_zip(path)
    encoding = "" if book else scan(path, "auto").encoding
    sheets = _workbook_rows(path) if book else iter([_Sheet(path.name, "", _csv_cells(path, encoding))])
    found = False
    for sheet in sheets:
        for row in _below_header(sheet.name, sheet.rows):
            found = True
            if row is not None:
                yield row._replace(encoding=encoding, out_of_sight=sheet.visibility == "veryHidden")
    if not found:
        raise RunError(
            f"No sheet of this file has a column {KEY}.",
            where=str(path.absolute()),
            next_step="give the workbook that `gxr-batch export` wrote and a reviewer filled in, or its sheet Cases "
            "saved as CSV",
        )


def _refuse_unsupported(path: Path) -> None:
    if not path.is_file():
        raise RunError("The sheet does not exist.", where=str(path.absolute()), next_step="check the path")
    if path.suffix.lower() in {".ods", ".xls", ".xlsb", ".numbers", ".fods"}:
        raise RunError(
            f"A {quoted(path.suffix)} file cannot be read.",
            where=str(path.absolute()),
            next_step="save it as .xlsx or as CSV and import that",
        )


def _below_header(name: str, rows: Iterable[tuple[int, Sequence[Any]]]) -> Iterator[SheetRow | None]:
    """Yield None for the header if it is found, then the non-empty rows below it."""
    header: list[str] = []
    for number, cells in rows:
        if header:
            pairs = zip(header, cells, strict=False)
            # In the CSV for Excel, an apostrophe guards texts that look like formulas.
            named = {
                column: unguard(cell) if isinstance(cell, str) else cell
                for column, cell in pairs
                if column and cell is not None
            }
            if named and named.get(KEY) != KEY:  # skip a repeated header
                yield SheetRow(name, number, named)
        elif KEY in (names := [str(cell).strip() if cell is not None else "" for cell in cells]):
            header = names
            _refuse_header(name, header)
            yield None
        elif number >= _HEADER_WITHIN:
            return


def _refuse_header(sheet: str, header: Sequence[str]) -> None:
    twice = [name for name in dict.fromkeys(header) if name.startswith("gxr_") and header.count(name) > 1]
    missing = [name for name in (STATUS, "gxr_text") if name not in header]
    if twice or missing:
        what = (
            f"repeats a column: {', '.join(map(quoted, twice))}" if twice else f"lacks a column: {', '.join(missing)}"
        )
        raise RunError(
            f"The sheet's header {what}.",
            where=f"sheet {quoted(sheet)}",
            next_step="restore the column names, each once",
        )


class _Sheet(NamedTuple):
    """A sheet's name, its `state` in a workbook, and its numbered rows."""

    name: str
    visibility: str
    rows: Iterator[tuple[int, Sequence[Any]]]


def _workbook_rows(path: Path) -> Iterator[_Sheet]:
    with ExitStack() as opened:
        with _damage(path):
            source = opened.enter_context(readable(path))
            book = load_book(source)
        opened.callback(book.close)
        for sheet in book.worksheets:
            yield _Sheet(sheet.title, sheet.sheet_state, _sheet_rows(path, sheet))


def _sheet_rows(path: Path, sheet: Any) -> Iterator[tuple[int, Sequence[Any]]]:
    return numbered_rows(path, sheet, lambda: _damage(path), _typed, None)


def _typed(cell: Any) -> Any:
    """Return a workbook's cell as typed, None for a blank one."""
    if isinstance(cell.value, str):
        text = unescaped(cell.value)
        return text if text.strip() else None
    return cell.value


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    with storage_errors(path), damage_as(RunError, path):
        yield


def _csv_cells(path: Path, encoding: str) -> Iterator[tuple[int, Sequence[Any]]]:
    csv.field_size_limit(_MOST_CHARACTERS)
    with open_lines(path, encoding) as lines:
        delimiter = _delimiter(lines.sample(_SAMPLED_CHARACTERS))
    with open_lines(path, encoding) as lines:
        try:
            for number, cells in enumerate(csv.reader(lines, delimiter=delimiter), start=1):
                yield number, [cell if cell.strip() else None for cell in cells]
        except csv.Error:  # its message may quote the file
            raise RunError(
                "This CSV file cannot be read; it may have a stray quote.",
                where=str(path.absolute()),
                next_step="open it in a spreadsheet and save it again",
            ) from None


def _delimiter(text: str) -> str:
    """Return the delimiter of the header; it depends on the spreadsheet's language."""
    for line in text.split("\n", _HEADER_WITHIN)[:_HEADER_WITHIN]:
        if named := separator_line(line):
            return named
        if KEY in line:
            return max(",;\t", key=line.count)
    return ","
