"""Delimited text (CSV, TSV and their kin) as Arrow tables of text columns.

Which delimiter a file has, what its header says, and its rows in batches; the parsing is in `csv_records`.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Iterator, Sequence
from io import StringIO
from pathlib import Path

import pyarrow as pa

from gxr_batch.errors import TableError
from gxr_batch.rows.csv_records import LINE_END, Records
from gxr_batch.rows.encoding import open_lines, separator_line
from gxr_batch.rows.source_files import SourceFile, changed_error

ROWS_A_BATCH = 16_384
_DELIMITERS = ",;\t|"
_SAMPLE_CHARACTERS = 2**16
_SAMPLE_RECORDS = 20


def find_delimiter(path: Path, encoding: str) -> str:
    """Return the delimiter of a file: the one that gives the header most columns and the next rows as many.

    A tab-separated file by its ending is never taken for anything else where its header holds a tab.
    """
    with open_lines(path, encoding) as lines:
        sample = lines.sample(_SAMPLE_CHARACTERS)
    header, *_ = LINE_END.split(sample, maxsplit=1)
    if named := separator_line(header):
        return named
    if path.suffix.lower() == ".tsv" and "\t" in header:
        return "\t"
    if len(sample) == _SAMPLE_CHARACTERS and "\n" in sample:
        sample = sample[: sample.rindex("\n") + 1]
    # Of equals the first one wins, so the comma stands first.
    return max(_DELIMITERS, key=lambda delimiter: _score(sample, delimiter))


def _score(sample: str, delimiter: str) -> tuple[int, int]:
    """Return how many of the first records are as wide as the header, and how wide that is; zeros for one column."""
    widths: list[int] = []
    try:
        for record in csv.reader(StringIO(sample, newline=""), delimiter=delimiter):
            if record:
                widths.append(len(record))
            if len(widths) > _SAMPLE_RECORDS:
                break
    except csv.Error:
        pass  # a cell past the module's own limit: judged by what came before it
    if not widths or widths[0] == 1:
        return 0, 0
    return widths.count(widths[0]), widths[0]


def read_header(path: Path, encoding: str, delimiter: str) -> list[str]:
    """Return the column names as they stand in the file. Raises TableError where there are none."""
    with open_lines(path, encoding) as lines:
        records, _ = Records(path, lines, delimiter).take(1, None)
    if not records:
        raise TableError(
            "The file holds no header line.", where=str(path), next_step="its first line names the columns"
        )
    if any("\0" in name for name in records[0]):
        raise TableError(
            "The header holds NUL characters.",
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

    Raises TableError for a row that cannot be read, and where the file is no longer the one that was surveyed.
    """
    missing = frozenset(nulls) | {""}
    with open_lines(file.path, file.encoding) as lines:
        records = Records(file.path, lines, file.delimiter)
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
        "A cell holds half of a surrogate pair, which is no character.",
        where=f"{path}, line {line}",
        next_step="mend the cell, or set input.encoding to what the file was saved in",
    )
