"""Delimited text (CSV, TSV, ...) as Arrow tables of text columns: header, and the rows in batches.

The csv module parses, in strict mode. This module counts lines, so that every error names one, checks cells that span
lines (a stray quote can swallow rows and still be valid CSV), and leaves out rows that repeat the header, as in
concatenated files. Decoding is left to `encoding`, the delimiter and odd layouts to `csv_layout`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa

from gxr_batch.cells import is_unicode
from gxr_batch.errors import TableError
from gxr_batch.job import InputSection
from gxr_batch.rows.columns import counted
from gxr_batch.rows.csv_layout import (
    BACKSLASH,
    CHARACTERS_A_CELL,
    LINE_END,
    Layout,
    find_layout,
    fits,
    is_unnamed_header,
    kept_backslashes,
    notices_of,
    take_sample,
    with_row_names,
)
from gxr_batch.rows.encoding import BYTE_ORDER_MARK, Lines, open_lines, scan, stored_as
from gxr_batch.rows.source_files import Look, NothingInside, Say, SourceFile, changed_error

ROWS_A_BATCH, _BYTES_A_BATCH = 16_384, 2**23
_MISREAD_MARK = "\u00ef\u00bb\u00bf"  # a byte order mark in the middle of a file that is read as cp1252
_LINES_NAMED = 5
_ROWS_COMPARED = 20  # with a first row that does not fit the header
_UPPER_LINES = 25  # rows that do not fit here may be below a title


@dataclass(frozen=True, kw_only=True)
class DelimitedFile(SourceFile):
    """A file of delimited text. `header` has the names as written, `named` is True if the job names the columns."""

    header: tuple[str, ...]
    layout: Layout
    compression: str = ""
    named: bool = False

    @property
    def reading(self) -> str:
        """Everything that decides how the file is read, except encoding and delimiter."""
        layout = self.layout
        plain = not (layout.escape or layout.skip_lines or layout.extra or self.named)
        return "" if plain else f" {layout[1:]!r} {self.header!r}"

    def own_batches(self, nulls: Collection[str], say: Say) -> Iterator[pa.Table]:
        """Yield the rows as tables of `own_schema`."""
        return batches(self, nulls, say)


def look(path: Path, section: InputSection) -> Look:
    """Return the names, encoding and layout of a file. Raises TableError."""
    compression, notices = stored_as(path)
    encoding, sha256, note, escapes = scan(path, section.encoding, compression)
    with open_lines(path, encoding, compression) as lines:
        sample = take_sample(lines)
    named = len(section.column_names)
    layout = find_layout(path, sample, section, "" if section.escape == "auto" else section.escape)
    if section.escape == "auto" and escapes and not fits(path, encoding, compression, layout, named):
        other = find_layout(path, sample, section, BACKSLASH)
        layout = other if fits(path, encoding, compression, other, named) else layout
    names = list(section.column_names) or _read_header(path, encoding, compression, layout)
    if section.column_names and not any(line.strip() for line in sample.lines[layout.skip_lines :]):
        raise NothingInside("The file is empty.", where=str(path), next_step="it needs at least one row")
    header = tuple(names)
    first, *rows = sample.records(layout.delimiter, layout.escape, layout.skip_lines) or [[]]
    if section.column_names and [cell.strip() for cell in first] != names and is_unnamed_header(first, rows):
        notices.append(
            f"line {layout.skip_lines + 1} looks like a header, but is read as a row because input.column_names is "
            f"set; input.skip_lines = {layout.skip_lines + 1} leaves it out"
        )
    if layout.extra == "row names":
        names = with_row_names(names)
    fields = {
        "encoding": encoding,
        "delimiter": layout.delimiter,
        "header": header,
        "layout": layout,
        "compression": compression,
        "named": bool(section.column_names),
    }
    notices += [note] * bool(note) + list(notices_of(layout, section))
    return Look(names, [pa.string()] * len(names), sha256, DelimitedFile, fields, tuple(notices))


def _read_header(path: Path, encoding: str, compression: str, layout: Layout) -> list[str]:
    """Return the column names as written in the file. Raises TableError if there are none."""
    with open_lines(path, encoding, compression) as lines:
        records, _ = _Records(path, lines, layout, ()).take(1, None)
    if not records:
        raise NothingInside(
            "The file has no header line.", where=str(path), next_step="add a first line that names the columns"
        )
    line = layout.skip_lines + 1
    if any("\0" in name for name in records[0]):
        raise TableError(
            "The header contains NUL characters.",
            where=f"{path}, line {line}",
            next_step='the file may be UTF-16 without a byte order mark: try input.encoding = "utf-16-le"',
        )
    if not is_unicode("".join(records[0])):
        raise _not_a_character(path, line)
    return records[0]


def batches(file: DelimitedFile, nulls: Collection[str], say: Say) -> Iterator[pa.Table]:
    """Yield the rows as tables of `file.own_schema`. Cells that are empty or one of `nulls` are null.

    Rows without any cell at the end are left out: a spreadsheet writes them for cells that were cleared. Raises
    TableError for a row that cannot be read, and if the file changed since the survey.
    """
    missing = frozenset(nulls) | {""}
    schema = file.own_schema
    width = file.width + (file.layout.extra == "trailing delimiter")
    with open_lines(file.path, file.encoding, file.compression) as lines:
        records = _Records(file.path, lines, file.layout, file.header, named=file.named)
        if not file.named:
            records.take(1, None)
        empty: list[pa.Table] = []  # rows that are left out unless others follow
        while True:
            rows, starts = records.take(ROWS_A_BATCH, width)
            if not rows:
                break
            columns = records.checked(list(zip(*rows, strict=True)), rows, starts)
            arrays = [_text_column(file, columns[place], missing, starts) for place in file.places]
            table, filled = pa.Table.from_arrays(arrays, schema=schema), _filled(rows)
            if filled:
                yield from empty
                yield table.slice(0, filled)
                empty = []
            empty += [table.slice(filled)] if filled < len(rows) else []
        if lines.sha256() != file.sha256:
            raise changed_error(file)
    if empty:
        say(f"{file.path}: {counted(sum(map(len, empty)), 'row')} without any cell at the end, left out")
    for notice in records.notices():
        say(f"{file.path}: {notice}")


def _filled(rows: Sequence[Sequence[str]]) -> int:
    """Return how many rows there are up to the last one with a cell; a row of one column is one all the same."""
    return next((at for at in range(len(rows), 0, -1) if len(rows[at - 1]) == 1 or any(rows[at - 1])), 0)


def _text_column(
    file: DelimitedFile, cells: Sequence[str], missing: Collection[str], starts: Sequence[int]
) -> pa.Array:
    values = [None if cell in missing else cell for cell in cells]
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:
        for start, cell in zip(starts, cells, strict=True):
            if not is_unicode(cell):
                raise _not_a_character(file.path, start) from None
        raise


def _not_a_character(path: Path, line: int) -> TableError:
    return TableError(
        "A cell contains half of a surrogate pair, which is not a character.",
        where=f"{path}, line {line}",
        next_step="fix the cell, or set input.encoding to the encoding of the file",
    )


class _Records:
    """The records of one file, with the line on which each starts (from 1)."""

    def __init__(self, path: Path, lines: Lines, layout: Layout, header: Sequence[str], *, named: bool = False) -> None:
        self._path, self._lines, self._layout, self._named = path, lines, layout, named
        self._header = [name.strip() for name in header]
        # How the first name may be written in a header line that is repeated further down.
        self._first_names = {
            mark + quote + name + quote
            for name in {*header[:1], *self._header[:1]}
            for mark in ("", BYTE_ORDER_MARK, _MISREAD_MARK)
            for quote in ("", '"')
        }
        try:
            lines.skip(layout.skip_lines)
            self._reader = csv.reader(
                kept_backslashes(lines, layout),
                delimiter=layout.delimiter,
                escapechar=layout.escape or None,
                strict=True,
            )
        except (TypeError, ValueError):
            raise TableError(
                "This character cannot be a delimiter.", where="input.delimiter", next_step='e.g. ";" or "auto"'
            ) from None
        except UnicodeError:
            raise self._undecodable() from None
        self._width = len(header) if named else 0
        self._begun = False
        self._blank = 0
        self._repeated: list[int] = []
        self._doubtful = 0
        self._first_doubtful = 0

    def take(self, most: int, width: int | None) -> tuple[list[list[str]], list[int]]:
        """Return up to `most` records and their lines, fewer if they are long. `width` None = any (the header)."""
        rows: list[list[str]] = []
        starts: list[int] = []
        reader = self._reader
        above = self._layout.skip_lines  # lines are counted from below them, for speed
        line = reader.line_num
        bytes_before = self._lines.bytes_taken
        with _long_cells():
            try:
                for row in reader:
                    start, line = line + 1, reader.line_num
                    if len(row) != width and not self._fits(row, width, start + above, first=not rows):
                        continue
                    if line != start:
                        self._look_twice(row, start + above, line + above)
                    rows.append(row)
                    starts.append(start)
                    if len(rows) == most or self._lines.bytes_taken - bytes_before > _BYTES_A_BATCH:
                        break
            except csv.Error:
                raise self._unbalanced(line + 1 + above) from None
            except UnicodeError:
                raise self._undecodable() from None
        self._begun = self._begun or (width is not None and bool(rows))
        return rows, [start + above for start in starts] if above else starts

    def checked(
        self, columns: list[tuple[str, ...]], rows: list[list[str]], starts: list[int]
    ) -> list[tuple[str, ...]]:
        """Return a batch's columns without rows that repeat the header, which also leave `rows` and `starts`."""
        if self._layout.extra == "trailing delimiter" and any(columns[-1]):
            at = next(place for place, cell in enumerate(columns[-1]) if cell)
            raise self._misfit(rows[at], starts[at], len(columns) - 1)
        if self._first_names.isdisjoint(columns[0]):
            return columns
        again = [place for place, row in enumerate(rows) if row[0] in self._first_names and self._is_header(row)]
        for place in reversed(again):
            self._repeated.append(starts[place])
            del rows[place], starts[place]
        return list(zip(*rows, strict=True)) if rows else [()] * len(columns)

    def _is_header(self, row: Sequence[str]) -> bool:
        """Return whether a row repeats the header, perhaps after a byte order mark."""
        if not row or row[0] not in self._first_names:
            return False
        cells = [cell.strip() for cell in row]
        return cells[1:] == self._header[1:] or (cells[1:-1] == self._header[1:] and not cells[-1])

    def notices(self) -> Iterator[str]:
        """Yield notices about the lines read so far."""
        if self._repeated:
            lines = sorted(self._repeated)
            named = ", ".join(f"{line:,}" for line in lines[:_LINES_NAMED])
            named += ", ..." if len(lines) > _LINES_NAMED else ""
            one = len(lines) == 1
            yield f"{'line' if one else 'lines'} {named} {'repeats' if one else 'repeat'} the header: left out"
        if self._blank and self._width == 1:
            yield f'{counted(self._blank, "blank line")} skipped; write a row with one empty cell as ""'
        if self._doubtful:
            yield (
                f"{counted(self._doubtful, 'cell')} spanning lines that look like rows, the first on "
                f"line {self._first_doubtful}: if rows are missing, look for a stray quote there"
            )

    def _fits(self, row: list[str], width: int | None, start: int, *, first: bool) -> bool:
        """Return whether a record of unexpected width is kept (a header is, a blank line is not), or raise."""
        if not row or (len(row) == 1 and width != 1 and not row[0].strip()):
            self._blank += 1
            return False
        if width is None:
            self._width = len(row)
            return True
        if self._layout.extra and self._is_header(row):
            self._repeated.append(start)
            return False
        # A delimiter at the end of the header alone.
        if len(row) == width - 1 and len(self._header) == width and not self._header[-1]:
            row.append("")
            return True
        named = width - bool(self._layout.extra)
        odd_names = self._named or len(row) < named
        if first and not self._begun and odd_names and self._next_widths() == {len(row)}:
            raise self._odd_names(row, start, named)
        even = first and not self._begun and self._next_widths() == {len(row)}
        raise self._misfit(row, start, named, even=even)

    @property
    def _delimiter(self) -> str:
        return {"\t": "a tab", " ": "a space"}.get(self._layout.delimiter, self._layout.delimiter)

    def _misfit(self, row: Sequence[str], start: int, width: int, *, even: bool = False) -> TableError:
        """Return the error for a row of another width; `even` if the next rows have the same one."""
        title = "; if the header is below other lines, set input.skip_lines" if start <= _UPPER_LINES else ""
        if even and len(row) > width:
            title += (
                f"; if every row has {len(row)} cells, give {len(row)} names in input.column_names and set "
                f"input.skip_lines = {start - 1}"
            )
        names = "input.column_names" if self._named else "the header"
        return TableError(
            f"A row has {counted(len(row), 'cell')}; {names} has {width}.",
            where=f"{self._path}, line {start}",
            next_step=(
                "fix that line: put quotes around cells that contain the delimiter or a line break "
                f"(the delimiter is {self._delimiter}){title}"
            ),
        )

    def _next_widths(self) -> set[int]:
        """Return the widths of the next rows, which are then consumed: an error must follow."""
        with suppress(csv.Error, UnicodeError):
            return {len(row) for row in islice(self._reader, _ROWS_COMPARED) if row}
        return set()

    def _odd_names(self, row: Sequence[str], start: int, width: int) -> TableError:
        """Return the error for rows that agree with each other, but not with their names."""
        cells = counted(len(row), "cell")
        if self._named:
            return TableError(
                f"The rows have {cells}; input.column_names has {width}.",
                where=f"{self._path}, line {start}",
                next_step=f"name every column, from the first to the last one (the delimiter is {self._delimiter})",
            )
        return TableError(
            f"The rows have {cells}; the header has {width}.",
            where=f"{self._path}, line {self._layout.skip_lines + 1}",
            next_step=f"put quotes around names that contain the delimiter (it is {self._delimiter}), or give the "
            f"{len(row)} names in input.column_names and set input.skip_lines = {start - 1}",
        )

    def _look_twice(self, row: list[str], start: int, end: int) -> None:
        """Raise if a multi-line record is almost certainly rows swallowed by a stray quote; count doubtful ones."""
        doubt = swallowed(row, self._layout.delimiter)
        if doubt == "sure":
            raise TableError(
                f"A quote opened on line {start} is closed only on line {end}; the lines between look like rows.",
                where=f"{self._path}, line {start}",
                next_step="remove the stray quote or double it; if the cell is correct, save the table as Parquet",
            )
        if doubt == "maybe":
            self._doubtful += 1
            self._first_doubtful = self._first_doubtful or start

    def _unbalanced(self, start: int) -> TableError:
        return TableError(
            f"The row that starts on line {start} has unbalanced quotes.",
            where=f"{self._path}, line {start} (noticed on line {self._reader.line_num + self._layout.skip_lines})",
            next_step="double every quote inside a quoted cell, and put a delimiter after its closing quote; if quotes "
            "are escaped with another character, set input.escape",
        )

    def _undecodable(self) -> TableError:
        return TableError(
            "The file cannot be decoded in its detected encoding.",
            where=f"{self._path}, near line {self._reader.line_num + self._layout.skip_lines + 1}",
            next_step="set input.encoding to the encoding of the file",
        )


def swallowed(row: Sequence[str], delimiter: str) -> str:
    """Return "sure", "maybe" or "" for a multi-line record that may be rows inside one stray pair of quotes.

    "maybe": every line has as many delimiters as a row. "sure": each line also starts like the first one, with
    something that contains a digit, as case numbers do, and has delimiters without a space after them.
    """
    held = [(place, cell) for place, cell in enumerate(row) if "\n" in cell or "\r" in cell]
    if len(held) != 1 or len(row) == 1:
        return ""
    place, cell = held[0]
    first, *middle, last = LINE_END.split(cell)
    full = len(row) - 1
    counts = [place + first.count(delimiter), *(line.count(delimiter) for line in middle)]
    if any(count != full for count in counts) or last.count(delimiter) != place:
        return ""
    beginnings = [first if place == 0 else row[0], *middle, last]
    shape, *others = (_shape(text.split(delimiter)[0]) for text in beginnings)
    if "9" in shape and len(shape) + full > 2 and all(other == shape for other in others):
        # A list in prose may look the same: "S6, 12 mm".
        return "sure" if re.search(re.escape(delimiter) + "(?! )", cell) else "maybe"
    return "maybe" if full > 1 else ""


def _shape(text: str) -> str:
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "9", text.strip().strip('"')))


@contextmanager
def _long_cells() -> Iterator[None]:
    """Raise the csv module's cell size limit for the block. The limit is global, so it is restored at once."""
    before = csv.field_size_limit(CHARACTERS_A_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)
