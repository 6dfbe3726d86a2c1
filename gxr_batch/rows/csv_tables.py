"""Delimited text (CSV, TSV, ...) as Arrow tables of text columns: delimiter, header, and the rows in batches.

The csv module parses, in strict mode. This module counts lines, so that every error names one, and checks cells that
span lines: a stray quote can swallow rows and still be valid CSV. Decoding is left to `encoding`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import pyarrow as pa

from gxr_batch.errors import TableError
from gxr_batch.rows.columns import counted
from gxr_batch.rows.encoding import Lines, open_lines, separator_line
from gxr_batch.rows.source_files import SourceFile, changed_error

ROWS_A_BATCH, _BYTES_A_BATCH = 16_384, 2**23
# The most a single cell may hold: a longer one is an unclosed quote, and must not be read into memory to the end.
CHARACTERS_A_CELL = 2**24
_LINE_END = re.compile(r"\r\n|\r|\n")
_DELIMITERS = ",;\t|"
_SAMPLE_CHARACTERS = 2**16
_SAMPLE_RECORDS = 20


def find_delimiter(path: Path, encoding: str) -> str:
    """Return a file's delimiter: the one that gives most of the first rows as many columns as the header.

    A .tsv file whose header contains a tab is always tab-separated.
    """
    with open_lines(path, encoding) as lines:
        sample = lines.sample(_SAMPLE_CHARACTERS)
    header, *_ = _LINE_END.split(sample, maxsplit=1)
    if named := separator_line(header):
        return named
    if path.suffix.lower() == ".tsv" and "\t" in header:
        return "\t"
    if len(sample) == _SAMPLE_CHARACTERS and "\n" in sample:
        sample = sample[: sample.rindex("\n") + 1]
    # On a tie the first one wins, so the comma comes first.
    return max(_DELIMITERS, key=lambda delimiter: _score(sample, delimiter))


def _score(sample: str, delimiter: str) -> tuple[int, int]:
    """Return how many of the first records are as wide as the header, and that width; zeros for a single column."""
    widths: list[int] = []
    try:
        for record in csv.reader(StringIO(sample, newline=""), delimiter=delimiter):
            if record:
                widths.append(len(record))
            if len(widths) > _SAMPLE_RECORDS:
                break
    except csv.Error:
        pass  # a cell over the csv module's limit: score the records before it
    if not widths or widths[0] == 1:
        return 0, 0
    return widths.count(widths[0]), widths[0]


def read_header(path: Path, encoding: str, delimiter: str) -> list[str]:
    """Return the column names as written in the file. Raises TableError if there are none."""
    with open_lines(path, encoding) as lines:
        records, _ = _Records(path, lines, delimiter).take(1, None)
    if not records:
        raise TableError(
            "The file has no header line.", where=str(path), next_step="add a first line that names the columns"
        )
    if any("\0" in name for name in records[0]):
        raise TableError(
            "The header contains NUL characters.",
            where=f"{path}, line 1",
            next_step='the file may be UTF-16 without a byte order mark: try input.encoding = "utf-16-le"',
        )
    try:
        "".join(records[0]).encode()
    except UnicodeEncodeError:
        raise _not_a_character(path, 1) from None
    return records[0]


def batches(file: SourceFile, nulls: Collection[str], say: Callable[[str], None]) -> Iterator[pa.Table]:
    """Yield the rows as tables of `file.schema`. Cells that are empty or one of `nulls` are null.

    Raises TableError for a row that cannot be read, and if the file changed since the survey.
    """
    missing = frozenset(nulls) | {""}
    with open_lines(file.path, file.encoding) as lines:
        records = _Records(file.path, lines, file.delimiter)
        records.take(1, None)
        while True:
            rows, starts = records.take(ROWS_A_BATCH, file.width)
            if not rows:
                break
            columns = list(zip(*rows, strict=True))
            yield pa.Table.from_arrays(
                [_text_column(file, columns[place], missing, starts) for place in file.places], schema=file.schema
            )
        if lines.sha256() != file.sha256:
            raise changed_error(file)
    for notice in records.notices():
        say(f"{file.path}: {notice}")


def _text_column(file: SourceFile, cells: Sequence[str], missing: Collection[str], starts: Sequence[int]) -> pa.Array:
    values = [None if cell in missing else cell for cell in cells]
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:
        for start, cell in zip(starts, cells, strict=True):
            if not _encodable(cell):
                raise _not_a_character(file.path, start) from None
        raise


def _encodable(cell: str) -> bool:
    try:
        cell.encode()
    except UnicodeEncodeError:
        return False
    return True


def _not_a_character(path: Path, line: int) -> TableError:
    return TableError(
        "A cell contains half of a surrogate pair, which is not a character.",
        where=f"{path}, line {line}",
        next_step="fix the cell, or set input.encoding to the encoding of the file",
    )


class _Records:
    """The records of one file, with the line on which each starts (from 1)."""

    def __init__(self, path: Path, lines: Lines, delimiter: str) -> None:
        self._path, self._lines, self._delimiter = path, lines, delimiter
        try:
            self._reader = csv.reader(iter(lines), delimiter=delimiter, strict=True)
        except (TypeError, ValueError):
            raise TableError(
                "This character cannot be a delimiter.", where="input.delimiter", next_step='e.g. ";" or "auto"'
            ) from None
        except UnicodeError:
            raise self._undecodable() from None
        self._width = 0
        self._blank = 0
        self._doubtful = 0
        self._first_doubtful = 0

    def take(self, most: int, width: int | None) -> tuple[list[list[str]], list[int]]:
        """Return up to `most` records and their lines, fewer if they are long. `width` None = any (the header)."""
        rows: list[list[str]] = []
        starts: list[int] = []
        reader = self._reader
        line = reader.line_num
        bytes_before = self._lines.bytes_taken
        with _long_cells():
            try:
                for row in reader:
                    start, line = line + 1, reader.line_num
                    if len(row) != width and not self._fits(row, width, start):
                        continue
                    if line != start:
                        self._look_twice(row, start, line)
                    rows.append(row)
                    starts.append(start)
                    if len(rows) == most or self._lines.bytes_taken - bytes_before > _BYTES_A_BATCH:
                        break
            except csv.Error:
                raise self._unbalanced(line + 1) from None
            except UnicodeError:
                raise self._undecodable() from None
        return rows, starts

    def notices(self) -> Iterator[str]:
        """Yield notices about the lines read so far."""
        if self._blank and self._width == 1:
            yield f'{counted(self._blank, "blank line")} skipped; write a row with one empty cell as ""'
        if self._doubtful:
            yield (
                f"{counted(self._doubtful, 'cell')} spanning lines that look like rows, the first on "
                f"line {self._first_doubtful}: if rows are missing, look for a stray quote there"
            )

    def _fits(self, row: list[str], width: int | None, start: int) -> bool:
        """Return whether a record of unexpected width is kept (a header is, a blank line is not), or raise."""
        if not row or (len(row) == 1 and width != 1 and not row[0].strip()):
            self._blank += 1
            return False
        if width is None:
            self._width = len(row)
            return True
        raise TableError(
            f"A row has {counted(len(row), 'cell')}; the header has {width}.",
            where=f"{self._path}, line {start}",
            next_step=(
                "fix that line: put quotes around cells that contain the delimiter or a line break "
                f"(the delimiter is {'a tab' if self._delimiter == chr(9) else self._delimiter})"
            ),
        )

    def _look_twice(self, row: list[str], start: int, end: int) -> None:
        """Raise if a multi-line record is almost certainly rows swallowed by a stray quote; count doubtful ones."""
        doubt = swallowed(row, self._delimiter)
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
            where=f"{self._path}, line {start} (noticed on line {self._reader.line_num})",
            next_step="double every quote inside a quoted cell, and put a delimiter after its closing quote",
        )

    def _undecodable(self) -> TableError:
        return TableError(
            "The file cannot be decoded in its detected encoding.",
            where=f"{self._path}, near line {self._reader.line_num + 1}",
            next_step="set input.encoding to the encoding of the file",
        )


def swallowed(row: Sequence[str], delimiter: str) -> str:
    """Return "sure", "maybe" or "" for a multi-line record that may be rows inside one stray pair of quotes.

    "maybe": every line has as many delimiters as a row. "sure": each line also starts like the first one, with
    something that contains a digit, as case numbers do.
    """
    held = [(place, cell) for place, cell in enumerate(row) if "\n" in cell or "\r" in cell]
    if len(held) != 1 or len(row) == 1:
        return ""
    place, cell = held[0]
    first, *middle, last = _LINE_END.split(cell)
    full = len(row) - 1
    counts = [place + first.count(delimiter), *(line.count(delimiter) for line in middle)]
    if any(count != full for count in counts) or last.count(delimiter) != place:
        return ""
    beginnings = [first if place == 0 else row[0], *middle, last]
    shape, *others = (_shape(text.split(delimiter)[0]) for text in beginnings)
    if "9" in shape and len(shape) + full > 2 and all(other == shape for other in others):
        return "sure"
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
