"""Reviewed sheets as rows of named cells: workbooks, and the CSV files that a spreadsheet saves.

The header is found by its column gxr_row_id, not by its place: a banner may stand above it, sheets may have been added,
columns moved. What the sheet means is not decided here.
"""

from __future__ import annotations

import csv
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from gxr_batch.cells import unguard
from gxr_batch.disk import storage_errors
from gxr_batch.errors import RunError
from gxr_batch.rows.encoding import open_lines, scan, separator_line

KEY, STATUS = "gxr_row_id", "gxr_review_status"
# What openpyxl and what it stands on make of damaged files.
_NO_WORKBOOK = (
    zipfile.BadZipFile,
    zlib.error,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    SyntaxError,
    EOFError,
    ArithmeticError,
    NotImplementedError,
    RuntimeError,
)
_HEADER_WITHIN = 20  # rows from the top in which a header is looked for
_MOST_CHARACTERS = 2**24  # of one CSV cell
_SAMPLED_CHARACTERS = 2**20  # in which the header's delimiter is looked for


class SheetRow(NamedTuple):
    """One row: the sheet and its row number as a person sees them, and its cells by column name.

    Cells are text, numbers or dates as the file has them; None where empty. Of a CSV all are text.
    """

    sheet: str
    number: int
    cells: Mapping[str, Any]


def read_sheets(path: Path) -> Iterator[SheetRow]:
    """Yield the rows below every header that names gxr_row_id. Raises RunError where there is none, StorageError."""
    _refuse_what_is_no_file(path)
    book = path.suffix.lower() in {".xlsx", ".xlsm"}
    sheets = _workbook_rows(path) if book else iter([(path.name, _csv_cells(path, scan(path, "auto").encoding))])
    found = False
    for name, rows in sheets:
        for row in _below_header(name, rows):
            found = True
            if row is not None:
                yield row
    if not found:
        raise RunError(
            f"No sheet of this file has a column {KEY}.",
            where=str(path.absolute()),
            next_step="give the workbook that `gxr-batch export` wrote and a reviewer filled in, or its sheet Cases "
            "saved as CSV",
        )


def _refuse_what_is_no_file(path: Path) -> None:
    if not path.is_file():
        raise RunError("There is no such sheet.", where=str(path.absolute()), next_step="check the path")
    if path.suffix.lower() in {".ods", ".xls", ".numbers", ".fods"}:
        raise RunError(
            f"A {path.suffix} file cannot be read.",
            where=str(path.absolute()),
            next_step="save it as .xlsx or as CSV and import that",
        )


def _below_header(name: str, rows: Iterable[tuple[int, Sequence[Any]]]) -> Iterator[SheetRow | None]:
    """Yield None for a header that was found, then the rows below it that hold anything."""
    header: list[str] = []
    for number, cells in rows:
        if header:
            pairs = zip(header, cells, strict=False)
            # The CSV for Excel keeps a text from running by an apostrophe in front.
            named = {
                column: unguard(cell) if isinstance(cell, str) else cell
                for column, cell in pairs
                if column and cell is not None
            }
            if named and named.get(KEY) != KEY:  # a header may stand there again
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
        what = f"twice: {', '.join(twice)}" if twice else f"not: {', '.join(missing)}"
        raise RunError(
            f"The sheet's header has a column that is needed {what}.",
            where=f"sheet {sheet}",
            next_step="give each column its name back, once",
        )


def _workbook_rows(path: Path) -> Iterator[tuple[str, Iterator[tuple[int, Sequence[Any]]]]]:
    from openpyxl import load_workbook

    with _damage(path):
        book = load_workbook(path, read_only=True, data_only=True)
    try:
        for sheet in book.worksheets:
            yield sheet.title, _sheet_rows(path, sheet)
    finally:
        book.close()


def _sheet_rows(path: Path, sheet: Any) -> Iterator[tuple[int, Sequence[Any]]]:
    with _damage(path):
        sheet.reset_dimensions()  # a sheet that another program saved may state them wrongly
        for number, cells in enumerate(sheet.iter_rows(values_only=True), start=1):
            yield number, [_unescaped(cell) for cell in cells]


def _unescaped(cell: Any) -> Any:
    """Return a workbook's cell as it was typed: `_x000D_` is how its file writes a carriage return."""
    from openpyxl.utils.escape import unescape

    if isinstance(cell, str):
        text = unescape(cell) if "_x" in cell else cell
        return text if text.strip() else None
    return cell


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn what openpyxl raises for a file that is no workbook into a RunError; its words may quote the file."""
    from openpyxl.utils.exceptions import InvalidFileException

    with storage_errors(path):
        try:
            yield
        except (*_NO_WORKBOOK, InvalidFileException):
            raise RunError(
                "This file is no workbook that can be read.",
                where=str(path.absolute()),
                next_step="open it in a spreadsheet and save it anew as .xlsx",
            ) from None


def _csv_cells(path: Path, encoding: str) -> Iterator[tuple[int, Sequence[Any]]]:
    csv.field_size_limit(_MOST_CHARACTERS)
    with open_lines(path, encoding) as lines:
        delimiter = _delimiter(lines.sample(_SAMPLED_CHARACTERS))
    with open_lines(path, encoding) as lines:
        try:
            for number, cells in enumerate(csv.reader(lines, delimiter=delimiter), start=1):
                yield number, [cell if cell.strip() else None for cell in cells]
        except csv.Error:  # its words may quote the file
            raise RunError(
                "This CSV file cannot be read, perhaps for a stray quote.",
                where=str(path.absolute()),
                next_step="open it in a spreadsheet and save it anew",
            ) from None


def _delimiter(text: str) -> str:
    """Return what separates the cells of the header; which it is depends on the spreadsheet's language."""
    for line in text.split("\n", _HEADER_WITHIN)[:_HEADER_WITHIN]:
        if named := separator_line(line):
            return named
        if KEY in line:
            return max(",;\t", key=line.count)
    return ","
