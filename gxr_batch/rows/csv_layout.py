"""How a delimited text file is laid out: delimiter, escape character, lines above the header, odd cells in every row.

Only a layout that leaves no doubt is recognised: the file could not be read otherwise, and every row must fit it.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

from gxr_batch.job import InputSection
from gxr_batch.rows.columns import plausible
from gxr_batch.rows.encoding import Lines, open_lines, separator_line

# What the rows have that the header lacks: nothing, row names in front (R), or a delimiter at the end of every line.
Extra = Literal["", "row names", "trailing delimiter"]

BACKSLASH = "\\"
LINE_END = re.compile(r"\r\n|\r|\n")
CHARACTERS_A_CELL = 2**24
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_DELIMITERS = ",;\t|"
_SAMPLE_CHARACTERS = 2**16
_SAMPLE_RECORDS = 20
_MOST_TITLE_LINES = 20
_FEW_COLUMNS, _SHORT_NAME = 3, 2  # columns, words
_MOST_DIGITS = 19  # of the number of a row
ROW_NAMES = "row_names"
# R's write.table: every name in quotes, a space between them.
_SPACED = re.compile(r'"[^"]*"( "[^"]*")+\s*')


class Layout(NamedTuple):
    """How to read a file. `skip_lines` counts the lines above the header, or above the first row without a header."""

    delimiter: str
    escape: str = ""
    skip_lines: int = 0
    extra: Extra = ""


class Sample(NamedTuple):
    """The first lines of a file with their line ends; `whole` if there are no others."""

    lines: tuple[str, ...]
    whole: bool

    def below(self, start: int) -> tuple[str, ...]:
        """Return the lines from `start` on, without a first one such as `sep=;`, which `Lines` leaves out too."""
        lines = self.lines[start:]
        return lines[1:] if lines and separator_line(lines[0]) else lines

    def records(self, delimiter: str, escape: str, start: int) -> list[list[str]]:
        """Return up to 21 records from a line on, without blank ones. A cell that is too long ends them."""
        records: list[list[str]] = []
        reader = _reader(self.below(start), delimiter, escape)
        try:
            for record in reader:
                if len(record) > 1 or "".join(record).strip():
                    records.append(record)
                if len(records) > _SAMPLE_RECORDS:
                    return records
        except csv.Error:  # a cell over the csv module's limit
            return records
        # The last record of an incomplete sample may be half of one.
        return records if self.whole or len(records) < 2 else records[:-1]


def take_sample(lines: Lines) -> Sample:
    """Read the beginning of a file. The stream cannot be read as lines afterwards."""
    text = lines.sample(_SAMPLE_CHARACTERS)
    whole = len(text) < _SAMPLE_CHARACTERS
    if not whole and "\n" in text:
        text = text[: text.rindex("\n") + 1]
    return Sample(tuple(_LINE.findall(text)), whole)


def find_layout(path: Path, sample: Sample, section: InputSection, escape: str) -> Layout:
    """Return the layout of a file with an escape character ("" = none), as far as the job leaves it open."""
    named = len(section.column_names)
    skip = 0 if section.skip_lines == "auto" else section.skip_lines
    delimiter = _delimiter(path, sample, section.delimiter, escape, skip)
    extra = _extra(sample, delimiter, escape, skip, named)
    if section.skip_lines == "auto" and not (extra or named):
        skip, delimiter = _title(sample, section.delimiter, delimiter, escape) or (skip, delimiter)
        extra = _extra(sample, delimiter, escape, skip, named)
    return Layout(delimiter=delimiter, escape=escape, skip_lines=skip, extra=extra)


def fits(path: Path, encoding: str, compression: str, layout: Layout, named: int) -> bool:
    """Return whether all of a file can be read with a layout; `named` counts input.column_names, 0 without them."""
    before = csv.field_size_limit(CHARACTERS_A_CELL)
    width = named + bool(named and layout.extra)
    try:
        with open_lines(path, encoding, compression) as lines:
            lines.skip(layout.skip_lines)
            reader = csv.reader(
                kept_backslashes(lines, layout),
                delimiter=layout.delimiter,
                escapechar=layout.escape or None,
                strict=True,
            )
            for record in reader:
                if not width and any(map(str.strip, record)):
                    width = len(record) + bool(layout.extra)
                elif len(record) not in {0, 1, width, width - 1}:  # blank lines, repeated headers
                    return False
            return True
    except (csv.Error, UnicodeError):
        return False
    finally:
        csv.field_size_limit(before)


def kept_backslashes(lines: Lines, layout: Layout) -> Iterator[str]:
    r"""Yield the lines so that only escapes of a quote, a delimiter, a line end or an escape are resolved.

    The csv module would drop every other backslash: `\N` would be N, and C:\temp C:temp.
    """
    if not layout.escape:
        return iter(lines)
    escape = re.escape(layout.escape)
    pair = re.compile(f"{escape}(.|$)", re.DOTALL)
    resolved = {'"', layout.delimiter, layout.escape, "\r", "\n"}
    return (
        pair.sub(lambda found: found[0] if found[1] in resolved else layout.escape + found[0], line)
        if layout.escape in line
        else line
        for line in lines
    )


def with_row_names(names: Sequence[str]) -> list[str]:
    """Return the header with a name for R's row names in front."""
    name = ROW_NAMES
    while name in names:
        name += "_"
    return [name, *names]


def notices_of(layout: Layout, section: InputSection) -> Iterator[str]:
    """Yield a notice about everything in the layout that was recognised without being asked for."""
    if section.skip_lines == "auto" and layout.skip_lines:
        first = "line is" if layout.skip_lines == 1 else f"{layout.skip_lines} lines are"
        yield f"the first {first} skipped as a title; input.skip_lines = 0 makes line 1 the header"
    if section.escape == "auto" and layout.escape:
        yield "quotes are escaped with a backslash, which input.escape would name"
    if layout.extra == "row names":
        yield f"every row has one cell more than the header: the first ones are R's row names, column {ROW_NAMES}"
    elif layout.extra == "trailing delimiter":
        yield "every row ends with a delimiter that the header lacks, which is ignored"


def _reader(lines: Sequence[str], delimiter: str, escape: str) -> Iterator[list[str]]:
    return csv.reader(StringIO("".join(lines), newline=""), delimiter=delimiter, escapechar=escape or None)


def _delimiter(path: Path, sample: Sample, wanted: str, escape: str, skip: int) -> str:
    """Return the delimiter: the one that gives most of the first rows as many columns as the header.

    A .tsv file whose header contains a tab is always tab-separated.
    """
    if wanted != "auto":
        return wanted
    header = next(iter(sample.lines[skip:]), "")
    if named := separator_line(header):
        return named
    if ".tsv" in [suffix.lower() for suffix in path.suffixes[-2:]] and "\t" in header:
        return "\t"
    # On a tie the first one wins, so the comma comes first.
    best = max(_DELIMITERS, key=lambda delimiter: _score(sample.records(delimiter, escape, skip)))
    if _SPACED.fullmatch(header) and _score(sample.records(best, escape, skip)) == (0, 0):
        return " "
    return best


def _score(records: Sequence[Sequence[str]]) -> tuple[int, int]:
    """Return how many of the first records are as wide as the header, and that width; zeros for a single column."""
    widths = [len(record) for record in records]
    if not widths or widths[0] == 1:
        return 0, 0
    return widths.count(widths[0]), widths[0]


def _title(sample: Sample, wanted: str, delimiter: str, escape: str) -> tuple[int, str] | None:
    """Return how many lines are above the header, and the delimiter below them; None if the first line may be it."""
    candidates = [wanted] if wanted != "auto" else list(dict.fromkeys([delimiter, *_DELIMITERS]))
    if _begins_with_the_header(sample.records(delimiter, escape, 0)):
        return None
    for skip in range(1, min(_MOST_TITLE_LINES, len(sample.lines) - 1) + 1):
        title = Sample(sample.lines[:skip], whole=True)
        for other in candidates if sample.lines[skip].strip() else ():
            above, below = title.records(other, escape, 0), sample.records(other, escape, skip)
            if is_header_below(above, below) and not (
                other == "," and skip == 1 and _may_be_a_column_of_prose(above, len(below[0]))
            ):
                return skip, other
    return None


def _begins_with_the_header(records: Sequence[Sequence[str]]) -> bool:
    """Return whether all records have the width of the first one, which does not name only one of several columns."""
    if not records or any(len(record) != len(records[0]) for record in records):
        return False
    width = len(records[0])
    return width > 1 and (width == 2 or sum(bool(cell.strip()) for cell in records[0]) > 1)


def _may_be_a_column_of_prose(above: Sequence[Sequence[str]], width: int) -> bool:
    """Return whether a single line above rows with few commas may be the name of their only column."""
    (line,) = above or [[""]]
    name = line[0].strip()
    return width <= _FEW_COLUMNS and plausible([name]) and len(name.split()) <= _SHORT_NAME and name[:1] != "#"


def is_header_below(above: Sequence[Sequence[str]], below: Sequence[Sequence[str]]) -> bool:
    """Return whether the first of the records `below` is a header, and those `above` it are lines of a title."""
    if len(below) < 2:
        return False
    names, *rows = below
    width = len(names)
    named = width > 1 and all(name.strip() for name in names) and len({name.strip() for name in names}) == width
    prose = any(name.startswith(" ") for name in names[1:])  # a sentence with a comma in it
    fits = bool(rows) and all(len(row) == width for row in rows)
    comments = not names[0].startswith("#")
    narrow = all(_is_title(row, width) or (comments and row[0].startswith("#")) for row in above)
    return named and not prose and fits and narrow and plausible(names)


def is_unnamed_header(first: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Return whether the first row of a table that the job names the columns of looks like a header itself."""
    return bool(rows) and plausible(first) and not any(plausible(row) for row in rows)


def _is_title(row: Sequence[str], width: int) -> bool:
    """Return whether a record is a line of a title: one cell, or fewer cells than the table and not names."""
    cells = [cell for cell in row if cell.strip()]
    return len(cells) <= 1 or (len(row) < width and not plausible(cells))


def _extra(sample: Sample, delimiter: str, escape: str, skip: int, named: int) -> Extra:
    """Return what every row has that the header lacks; `named` counts input.column_names, 0 without them."""
    records = sample.records(delimiter, escape, skip)
    header_line = next((line for line in sample.below(skip) if line.strip()), "")
    width, rows = (named, records) if named else (len(records[0]) if records else 0, records[1:])
    # Header lines of concatenated files are no rows.
    rows = [row for row in rows if named or [*row] != [*records[0]]]
    if not rows or any(len(row) != width + 1 for row in rows):
        return ""
    # "1,Small, left effusion": a sentence with a delimiter in it, not a layout.
    if any(cell.startswith(" ") for row in rows for cell in row[1:]):
        return ""
    first = [row[0] for row in rows]
    if not any(row[-1] for row in rows):
        # R's row names before a column without any value look the same; a guess could shift all cells.
        return "" if not named and header_line.startswith('"') and _ascending(first) else "trailing delimiter"
    if named or len(set(first)) != len(first) or not all(first):
        return ""
    if width < 2 or not all(map(_is_count, first)):
        return "row names" if header_line.startswith('"') and width > 1 else ""
    numbers = list(map(int, first))
    # "1,5,20" may be a number with a decimal comma; R counts its rows from 1.
    counts = numbers == (list(range(1, len(numbers) + 1)) if delimiter == "," else sorted(numbers))
    return "row names" if header_line.startswith('"') or (counts and len(rows) > 1) else ""


def _ascending(cells: Sequence[str]) -> bool:
    """Return whether the cells are whole numbers that grow, as R's row names do."""
    return all(map(_is_count, cells)) and all(int(one) < int(other) for one, other in pairwise(cells))


def _is_count(cell: str) -> bool:
    """Return whether a cell may number a row. Python does not convert thousands of digits."""
    return cell.isdecimal() and len(cell) < _MOST_DIGITS
