"""Column names, and which columns fill which fields of a template.

Names are cleaned as docs/architecture.md describes; an unknown name is reported with its closest matches. A table
without a header line has the cells of its first row as column names. No cell may appear in a message, so names are
shown only if all of them look like names.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from gxr_batch.cells import NotText, prompt_values_of, quoted
from gxr_batch.errors import TableError

RESERVED_PREFIX = "gxr_"
_SHOWN, _RESERVED_SHOWN = 20, 3
_LONGEST, _LONGEST_IDENTIFIER, _MOST_WORDS = 48, 96, 5
# Among many short names, as in exports of DICOM headers, a tenth may be longer.
_MANY, _LONGEST_OF_MANY, _MOST_WORDS_OF_MANY, _SHORT_SHARE = 20, 80, 10, 0.9
# Characters that join letters of some scripts; everything else of Unicode's category Cf is invisible.
_JOINERS = "\u200c\u200d"
_SENTENCE = re.compile(r"[.!?;](\s|$)|,\s|\n|\r")


class Cleaned(NamedTuple):
    """The names that are kept, the position of each in the file (from 0), and one notice for each name changed."""

    names: tuple[str, ...]
    places: tuple[int, ...]
    notices: tuple[str, ...]


def plausible(names: Iterable[str]) -> bool:
    """Return whether all names look like column names: short, with a letter, not a sentence, number or date.

    A few of many different names may be longer.
    """
    named = [name for name in names if name.strip()]
    short = sum(_plausible(name, _LONGEST, _MOST_WORDS) for name in named)
    if short == len(named):
        return True
    many = len(named) >= _MANY and len(set(named)) == len(named) and short >= _SHORT_SHARE * len(named)
    return many and all(_plausible(name, _LONGEST_OF_MANY, _MOST_WORDS_OF_MANY) for name in named)


def _plausible(name: str, longest: int, most_words: int) -> bool:
    if "_" in name and name.isidentifier():
        longest = _LONGEST_IDENTIFIER
    short = len(name) <= longest and len(name.split()) <= most_words
    return short and not _SENTENCE.search(name) and any(map(str.isalpha, name))


def label(place: int, names: Sequence[str]) -> str:
    """Return what a message calls the column at `place`: its name, or its number if the name may be a cell."""
    return quoted(names[place]) if plausible(names) else f"number {place + 1}"


def listed(names: Sequence[str]) -> str:
    """Return the names for a message, or only their number if they look like the cells of a row."""
    if not plausible(names):
        cells = "1 cell that looks" if len(names) == 1 else f"{len(names):,} cells that look"
        return (
            f"its first line has {cells} like data: is the header line missing? Then "
            "name the columns in input.column_names. Is the header below it? Then set input.skip_lines"
        )
    return f"its columns: {', '.join(map(quoted, names[:_SHOWN]))}{', ...' if len(names) > _SHOWN else ''}"


def nearest(name: str, names: Sequence[str], most: int = 1, cutoff: float = 0.6) -> list[str]:
    """Return the names closest to `name`; none if the names look like the cells of a row."""
    if not plausible(names):
        return []
    near = difflib.get_close_matches(name.lower(), [other.lower() for other in names], n=most, cutoff=cutoff)
    return [other for other in names if other.lower() in near]


def visible(name: str) -> str:
    """Return a name as a reader sees it: composed letters, plain spaces, no invisible characters, trimmed.

    Invisible are byte order marks, zero-width characters, soft hyphens and direction marks.
    """
    if name.isascii() and name.isprintable():
        return name.strip()
    joined = any(unicodedata.category(sign)[0] == "L" and ord(sign) >= 0x590 for sign in name)
    kept = []
    for sign in unicodedata.normalize("NFC", name):
        category = unicodedata.category(sign)
        if category in {"Zs", "Zl", "Zp"}:
            kept.append(" ")
        elif category != "Cf" or (joined and sign in _JOINERS):
            kept.append(sign)
    return "".join(kept).strip()


def clean(raw: Sequence[str], asked: Collection[str] = ()) -> Cleaned:
    """Trim names, name unnamed columns after their position, number repeated names, drop the reserved ones.

    Invisible characters are removed, except from names in `asked`, which the job names with them.
    """
    plain = [name.strip() for name in raw]
    trimmed = [name if name in asked else visible(name) for name in plain]
    # A name that occurs in the file is never given to another column.
    taken = set(trimmed)
    seen: set[str] = set()
    names, places, notices = [], [], []
    reserved: list[str] = []
    for place, (before, name) in enumerate(zip(raw, trimmed, strict=True)):
        if name.startswith(RESERVED_PREFIX):
            reserved.append(label(place, trimmed))
            continue
        final = name
        if not name:
            final = next(_free(f"column_{place + 1}", taken, first=True))
            notices.append(f"column {place + 1} has no name and is called {final}")
        elif name in seen:
            final = next(_free(name, taken, first=False))
            called = f" is called {quoted(final)}" if plausible(trimmed) else " gets a number after its name"
            notices.append(f"the column name {label(place, trimmed)} is repeated: column {place + 1}{called}")
        elif name != plain[place]:
            notices.append(f"the column name {label(place, trimmed)} is read without its invisible characters")
        elif name != before:
            notices.append(f"spaces around the column name {label(place, trimmed)} are removed")
        seen.add(name)
        taken.add(final)
        names.append(final)
        places.append(place)
    if reserved:
        called = ", ".join(reserved[:_RESERVED_SHOWN]) + (", ..." if len(reserved) > _RESERVED_SHOWN else "")
        notices.append(
            f"{counted(len(reserved), 'column')} left out: {called}; names that begin with {RESERVED_PREFIX} are "
            "reserved for results. To read the results of a run, set input.path to the run folder"
        )
    return Cleaned(tuple(names), tuple(places), tuple(notices))


def _free(name: str, taken: set[str], *, first: bool) -> Iterator[str]:
    """Yield free names: `name` itself if `first`, then "name (2)", "name (3)" ...."""
    if first and name not in taken:
        yield name
    number = 2
    while True:
        if (numbered := f"{name} ({number})") not in taken:
            yield numbered
        number += 1


def counted(number: int, thing: str) -> str:
    """Return "1 row", "2,000 rows"."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


def require_column(name: str, names: Sequence[str], *, key: str) -> None:
    """Raise TableError, with the closest names, if the table lacks the column that the job key names."""
    if not name or name in names:
        return
    near = nearest(name, names, 3, 0.5)
    raise TableError(
        f"The table has no column {quoted(name)}.",
        where=key,
        next_step=f"did you mean {' or '.join(map(quoted, near))}?" if near else listed(names),
    )


@dataclass(frozen=True, kw_only=True)
class FieldMap:
    """Which columns fill which fields of which templates.

    `templates` maps a template's name to its fields, `columns` a field to the column that fills it (only fields that
    have one). A row's template is named in its cell of `template_column`; it is `default` if there is no such column or
    the cell is blank. `columns` never maps to a column that the table lacks. `required` are the fields that the default
    template needs, `tested` those that a template of the user tests for truth; both are for notices only.
    """

    templates: Mapping[str, tuple[str, ...]]
    default: str
    template_column: str = ""
    columns: Mapping[str, str]
    required: frozenset[str] = frozenset()
    tested: frozenset[str] = frozenset()

    def used(self) -> tuple[str, ...]:
        """Return the fields of any template that have a column, sorted."""
        fields = {field for names in self.templates.values() for field in names}
        return tuple(sorted(fields & self.columns.keys()))

    def used_by(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the fields of these templates that have a column, sorted."""
        fields = {field for name in names for field in self.templates.get(name, ())}
        return tuple(sorted(fields & self.columns.keys()))

    def needed_columns(self) -> list[str]:
        """Return the columns that fill a field or name a template, each once."""
        named = [self.template_column] if self.template_column else []
        return list(dict.fromkeys(named + [self.columns[field] for field in self.used()]))

    def template_names(self, table: pa.Table) -> list[str]:
        """Return the name of each row's template; it may not exist."""
        if not self.template_column:
            return [self.default] * table.num_rows
        cells = python_values(table, self.template_column)
        return [str(cell).strip() or self.default if cell is not None else self.default for cell in cells]


def prompt_values(table: pa.Table, column: str) -> list[Any]:
    """Return a column as templates get it (see `cells.prompt_values_of`). Times are truncated to microseconds.

    Raises TableError for bytes that are not text, and for times that Python cannot represent.
    """
    try:
        return prompt_values_of(table[column])
    except NotText:
        raise TableError(
            f"The column {quoted(column)} holds bytes that are not UTF-8 text, which no prompt can show.",
            where=f"column {quoted(column)}",
            next_step="map the field to another column, or save this one as text",
        ) from None
    except MemoryError:
        raise
    except (ValueError, OverflowError, LookupError, pa.ArrowException):
        raise _unusable(column) from None


def python_values(table: pa.Table, column: str) -> list[Any]:
    """Return a column as Python values, from which row ids are made. Times are truncated to microseconds.

    Raises TableError for bytes that are not text, and for times that Python cannot represent.
    """
    cells = table[column]
    if not pa.types.is_float32(cells.type) and not pa.types.is_float16(cells.type):
        return prompt_values(table, column)
    values: list[Any] = cells.to_pylist()  # earlier versions made ids of all digits: other ids would be other rows
    return values


def _unusable(column: str) -> TableError:
    return TableError(
        f"The column {quoted(column)} has a value that cannot be used in a prompt, such as a time after the year 9999.",
        where=f"column {quoted(column)}",
        next_step="save the column as text",
    )
