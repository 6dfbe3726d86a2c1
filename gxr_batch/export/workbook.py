"""Writes the workbook for reviewers: a README sheet, then one row per case, in constant memory.

Uses XlsxWriter directly, because it checks what it writes and holds one row at a time. Every text is written as text:
no formulas, links or guessed numbers. Cells longer than Excel allows are cut, marked and flagged. Review dates are date
cells (`_rows`, formatted by workbook_layout); all other dates and times are text from cells.as_text, and those of the
README sheet are written by workbook_readme.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from gxr_batch.cells import as_text, exact_number, for_workbook, is_number, printed
from gxr_batch.errors import StorageError
from gxr_batch.export.export_rows import Exported, Source, cells_of
from gxr_batch.export.workbook_layout import Column, Formats, layout, make_formats, row_height
from gxr_batch.export.workbook_readme import approved_banner, state, write_readme
from gxr_batch.files import scratch_folder
from gxr_batch.forms import PREFIX, Content, Form, in_a_cell, parts_of
from gxr_batch.ledger.exports import ExportFile
from gxr_batch.records import DISCLAIMER, ERROR_COUNTS, LIST_COLUMNS, REVIEW_QUALITIES, REVIEW_STATUSES, review_schema
from gxr_batch.rows.columns import counted
from gxr_batch.text_checks.descriptions import SHORTENED

# Excel's limit is 1,048,576 rows per sheet; banner and header need some of them.
ROWS_A_SHEET = 1_000_000
_BANNER_ROW, _CAPTION_ROW, _HEADER_ROW, _FIRST_ROW = 0, 1, 2, 3
_FROZEN_COLUMNS = 1
_REVIEW_TYPES = {field.name: field.type for field in review_schema()}
_WHOLE_TEXTS = ("gxr_text", "gxr_review_text")
_MOST_CHOICES = 255  # characters
_MOST_KNOWN = 200  # characters of a message that lists them
_BANNER = f"AI-GENERATED, UNREVIEWED until a status says otherwise. {DISCLAIMER}"
_OPTIONS = {
    "constant_memory": True,
    "strings_to_formulas": False,
    "strings_to_urls": False,
    "strings_to_numbers": False,
    "nan_inf_to_errors": True,
    "use_zip64": True,  # a sheet of more than half a million cases exceeds 2 GiB
}


def write_xlsx(source: Source, file: ExportFile) -> Exported:
    """Write the workbook. Raises StorageError."""
    from xlsxwriter import Workbook
    from xlsxwriter.exceptions import FileCreateError

    written: list[Exported] = []

    def write(target: BinaryIO) -> None:
        # XlsxWriter's temporary rows go next to the workbook: texts of a run must not be written elsewhere.
        with scratch_folder(file.path.name, file.path.parent) as scratch:
            workbook = Workbook(target, _OPTIONS | {"tmpdir": str(scratch)})
            try:
                written.append(_Book(workbook, source).fill(file.path))
                workbook.close()
            except FileCreateError as error:  # it wraps the OSError
                raise error.args[0] from None
            finally:
                _abandon(workbook)

    file.write(write)
    return written[-1]


def _abandon(workbook: Any) -> None:
    """Close the files of an abandoned workbook; its destructor would try to write it again."""
    workbook.fileclosed = True
    for sheet in workbook.worksheets():
        if sheet.row_data_fh is not None and not sheet.row_data_fh.closed:
            with suppress(OSError):
                sheet.row_data_fh.close()


class _Book:
    """A workbook while it is written."""

    def __init__(self, workbook: Any, source: Source) -> None:
        self._workbook, self._source = workbook, source
        self._formats = make_formats(workbook)
        self._shortened = self._rows = 0
        self._one_answer = source.reader.manifest.job.get("sampling", {}).get("samples_per_row", 1) == 1
        floats = {field.name for field in source.schema if pa.types.is_floating(field.type)}
        self._measured = {name for name in floats if name.startswith("gxr_") and not name.startswith(PREFIX)}
        self._form = source.reader.form
        self._banner = approved_banner(self._form) if source.approved else ""
        self._sheet: Any = None
        self._at = _FIRST_ROW
        workbook.set_properties(
            {
                "title": "Teaching cases" if source.blind else f"Teaching cases: {source.reader.manifest.name}",
                "subject": self._banner or DISCLAIMER,
                "category": "AI-generated",
                "keywords": f"AI-generated, {state(source)}, research and education only",
                "comments": self._banner or DISCLAIMER,
            }
        )
        workbook.set_custom_property("AI-generated", True)

    def fill(self, path: Path) -> Exported:
        """Write every sheet."""
        write_readme(self._workbook, self._formats, self._source)
        tables = iter(self._source.tables)
        first = next(tables, self._source.schema.empty_table())
        columns = layout(self._source.schema.names, _longest(first), self._form)
        for table in chain([first], tables):
            for row in _rows(_with_corrections(table, self._form), columns):
                if self._sheet is None or self._at - _FIRST_ROW == ROWS_A_SHEET:
                    self._close_sheet(columns)
                    self._open_sheet(columns)
                self._write_row(columns, row)
        if self._sheet is None:
            self._open_sheet(columns)
        self._close_sheet(columns)
        note = (
            f"{counted(self._shortened, 'row')} with a cell longer than Excel allows: it is cut and marked, gxr_flags "
            f"has {SHORTENED}, and results.parquet has the full text"
        )
        return Exported(path, self._rows, self._source.partial, (note,) if self._shortened else ())

    def _open_sheet(self, columns: Sequence[Column]) -> None:
        number = sum(sheet.get_name().startswith("Cases") for sheet in self._workbook.worksheets()) + 1
        sheet = self._sheet = self._workbook.add_worksheet("Cases" if number == 1 else f"Cases {number}")
        self._at = _FIRST_ROW
        for place, column in enumerate(columns):
            # Hidden if each row has one sample; the import still reads it.
            hidden = {"hidden": column.name == "gxr_sample" and self._one_answer}
            sheet.set_column(place, place, column.width, _column_format(column, self._formats), hidden)
        sheet.set_row(_BANNER_ROW, 20, self._formats.strip)
        _text(sheet, _BANNER_ROW, 0, self._banner or _BANNER, self._formats.strip)
        self._write_header(columns)
        sheet.freeze_panes(_FIRST_ROW, _FROZEN_COLUMNS)
        sheet.ignore_errors({"number_stored_as_text": "A1:XFD1048576"})
        sheet.set_landscape()
        sheet.set_paper(8)  # A3
        sheet.fit_to_pages(1, 0)
        sheet.repeat_rows(_CAPTION_ROW, _HEADER_ROW)
        sheet.set_footer("&LAI-generated teaching material, not for clinical use&RPage &P of &N")

    def _write_header(self, columns: Sequence[Column]) -> None:
        """Write the captions, then the names. Constant memory requires that rows are written in order."""
        formats = self._formats
        self._sheet.set_row(_CAPTION_ROW, 62)
        for place, column in enumerate(columns):
            form = formats.caption_review if column.role == "review" else formats.caption
            _text(self._sheet, _CAPTION_ROW, place, for_workbook(column.caption).text, form)
        self._sheet.set_row(_HEADER_ROW, 18)
        for place, column in enumerate(columns):
            form = formats.name_review if column.role == "review" else formats.name
            _text(self._sheet, _HEADER_ROW, place, for_workbook(column.name).text, form)

    def _close_sheet(self, columns: Sequence[Column]) -> None:
        """Add what depends on the row count: filter, drop-downs, colours."""
        if self._sheet is None:
            return
        sheet, last = self._sheet, max(self._at - 1, _FIRST_ROW)
        sheet.autofilter(_HEADER_ROW, 0, last, len(columns) - 1)
        # Print the cases only; with the review and provenance columns they would be too small to read.
        sheet.print_area(_BANNER_ROW, 0, last, max(at for at, column in enumerate(columns) if column.role == "text"))
        places = {column.name: place for place, column in enumerate(columns)}
        status = places["gxr_review_status"]
        _choose(sheet, status, last, REVIEW_STATUSES, "Choose a status.")
        _choose(sheet, places["gxr_review_quality"], last, REVIEW_QUALITIES, "1 = unusable … 5 = ready to teach with.")
        for part in self._form.parts if self._form else ():
            if _fits_a_list(part.choices):
                _choose(sheet, places[part.review_column], last, part.choices, "Empty = good as generated.")
        for name in ERROR_COUNTS:
            _count(sheet, places[f"gxr_review_{name}"], last)
        _day(sheet, places["gxr_reviewed_at"], last)
        for value, colour in self._formats.statuses.items():
            rule = {"type": "cell", "criteria": "==", "value": f'"{value}"', "format": colour}
            sheet.conditional_format(_FIRST_ROW, status, last, status, rule)
        flags = places["gxr_flags"]
        sheet.conditional_format(_FIRST_ROW, flags, last, flags, {"type": "no_blanks", "format": self._formats.flagged})

    def _write_row(self, columns: Sequence[Column], row: Sequence[Any]) -> None:
        texts = [for_workbook(cell) if isinstance(cell, str) else None for cell in row]
        shortened = any(text.cut for text in texts if text is not None)
        self._shortened += shortened
        self._sheet.set_row(self._at, row_height(columns, [text and text.text for text in texts]))
        for place, (column, cell, text) in enumerate(zip(columns, row, texts, strict=True)):
            if column.name == "gxr_flags" and shortened:
                flags = f"{cell}, {SHORTENED}" if cell else SHORTENED
                _text(self._sheet, self._at, place, flags, self._formats.text)
            elif text is not None:
                if text.text or column.role == "review":
                    _text(self._sheet, self._at, place, text.text, _column_format(column, self._formats))
            elif isinstance(cell, date):
                form = _column_format(column, self._formats)
                _checked(self._sheet.write_datetime(self._at, place, cell, form))
            elif cell is not None:
                _checked(self._sheet.write_number(self._at, place, cell, self._number_format(column)))
            elif column.role == "review":
                _text(self._sheet, self._at, place, "", _column_format(column, self._formats))
        self._at += 1
        self._rows += 1

    def _number_format(self, column: Column) -> Any:
        """Return a number's format: two decimals for our measured seconds and rates, General for the rest."""
        if column.role == "review":
            return _column_format(column, self._formats)
        return self._formats.fraction if column.name in self._measured else self._formats.number


def _column_format(column: Column, formats: Formats) -> Any:
    kind = _REVIEW_TYPES.get(column.name)
    if column.role == "review" and kind is not None and not pa.types.is_string(kind):
        return formats.review_date if pa.types.is_date(kind) else formats.review_number
    by_role = {"key": formats.key, "text": formats.generated, "whole": formats.generated, "review": formats.review}
    return by_role.get(column.role, formats.text)


def _rows(table: pa.Table, columns: Sequence[Column]) -> Iterator[tuple[Any, ...]]:
    """Yield the rows in the sheet's order: numbers as numbers, review dates as dates, everything else as text.

    Numbers with more digits than a spreadsheet keeps are text.
    """
    cells: list[Sequence[Any]] = []
    for column in columns:
        values = cells_of(table, column.name)
        if is_number(table.schema.field(column.name).type):
            cells.append([exact_number(value) for value in values])
        elif column.name == "gxr_reviewed_at":
            cells.append(values)
        elif column.name in LIST_COLUMNS:
            cells.append([", ".join(value or ()) for value in values])
        else:
            cells.append([as_text(value) for value in values])
    yield from zip(*cells, strict=True)


def _with_corrections(table: pa.Table, form: Form | None) -> pa.Table:
    """Return the table with the columns in which sections are corrected, as text: those that a reviewer changed."""
    if form is None:
        return table
    rows = [_changed(form, *texts) for texts in zip(*(table[name].to_pylist() for name in _WHOLE_TEXTS), strict=True)]
    for at, part in enumerate(form.parts):
        table = table.append_column(part.review_column, pa.array([row[at] for row in rows], pa.string()))
    return table


def _changed(form: Form, text: str | None, edited: str | None) -> list[str | None]:
    after = edited and parts_of(form, edited)
    if not after:
        return [None] * len(form.parts)
    before: Sequence[Content | None] = parts_of(form, text or "") or [None] * len(after)
    return [str(printed(in_a_cell(new))) if new != old else None for old, new in zip(before, after, strict=True)]


def _longest(table: pa.Table) -> Mapping[str, int]:
    """Return the length of the longest cell of each text column."""
    lengths = {}
    for field in table.schema:
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            lengths[field.name] = pc.max(pc.utf8_length(table[field.name])).as_py() or 0
    return lengths


def _text(sheet: Any, row: int, place: int, text: str, form: Any) -> None:
    """Write a text, or a blank cell with the format."""
    _checked(sheet.write_string(row, place, text, form) if text else sheet.write_blank(row, place, None, form))


def _checked(code: int) -> None:
    """Raise StorageError for a nonzero return code, XlsxWriter's only sign that it dropped a cell."""
    if code:
        raise StorageError(
            "A cell does not fit in the workbook.",
            where="the sheet Cases",
            next_step="export as csv, and report this bug",
        )


def _fits_a_list(choices: Sequence[str]) -> bool:
    """Return whether Excel can offer these choices: 255 characters with the commas that separate them."""
    separate = not any(mark in choice for choice in choices for mark in ',"')
    return bool(choices) and separate and len(",".join(choices)) <= _MOST_CHOICES


def _choose(sheet: Any, place: int, last: int, values: Sequence[object], hint: str) -> None:
    rule = {"validate": "list", "source": list(values), "input_message": hint}
    known = ", ".join(map(str, values))
    known = known if len(known) < _MOST_KNOWN else "those in the list"
    sheet.data_validation(_FIRST_ROW, place, last, place, rule | {"error_message": f"Choose one of: {known}"})


def _day(sheet: Any, place: int, last: int) -> None:
    rule = {
        "validate": "date",
        "criteria": ">=",
        "value": date(2020, 1, 1),
        "error_message": "Enter a date: 2026-01-31",
    }
    sheet.data_validation(_FIRST_ROW, place, last, place, rule)


def _count(sheet: Any, place: int, last: int) -> None:
    rule = {
        "validate": "integer",
        "criteria": ">=",
        "value": 0,
        "error_message": "Enter the number of errors: 0, 1, 2 …",
    }
    sheet.data_validation(_FIRST_ROW, place, last, place, rule)
