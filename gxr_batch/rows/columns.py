"""Column names: cleaned as the contract says, and looked for with the nearest ones at hand.

A table without a header line has the cells of its first row in the place of names. No cell may stand in a message, so
names are shown only where all of them look like names.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from gxr_batch.errors import TableError

RESERVED_PREFIX = "gxr_"
_SHOWN = 20
_LONGEST, _MOST_WORDS = 48, 5
_SENTENCE = re.compile(r"[.!?;](\s|$)|,\s|\n|\r")


class Cleaned(NamedTuple):
    """The names that are kept, the place of each in the file (from 0), and a sentence for each one changed."""

    names: tuple[str, ...]
    places: tuple[int, ...]
    notices: tuple[str, ...]


def plausible(names: Iterable[str]) -> bool:
    """Return whether all of these look like column names: short, with a letter, no sentence, number or date."""
    return all(_plausible(name) for name in names)


def _plausible(name: str) -> bool:
    short = len(name) <= _LONGEST and len(name.split()) <= _MOST_WORDS
    return not name.strip() or (short and not _SENTENCE.search(name) and any(map(str.isalpha, name)))


def spoken(place: int, names: Sequence[str]) -> str:
    """Return how a message calls the column at a place: by its name, or by its number where it may be a cell."""
    return names[place] if plausible(names) else f"number {place + 1}"


def listed(names: Sequence[str]) -> str:
    """Return the names for a message, or how many there are where they look like the cells of a row."""
    if not plausible(names):
        return f"its first line has {counted(len(names), 'cell')} that look like a row: does it lack a header line?"
    return f"its columns: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"


def nearest(name: str, names: Sequence[str], most: int = 1, cutoff: float = 0.6) -> list[str]:
    """Return the names that are most like `name`; none where they look like the cells of a row."""
    if not plausible(names):
        return []
    near = difflib.get_close_matches(name.lower(), [other.lower() for other in names], n=most, cutoff=cutoff)
    return [other for other in names if other.lower() in near]


def clean(raw: Sequence[str]) -> Cleaned:
    """Trim names, name the nameless by their place, number the repeated, drop those of the results."""
    trimmed = [name.strip() for name in raw]
    # A name that stands in the file is never given to another column.
    taken = set(trimmed)
    seen: set[str] = set()
    names, places, notices = [], [], []
    for place, (before, name) in enumerate(zip(raw, trimmed, strict=True)):
        if name.startswith(RESERVED_PREFIX):
            called = spoken(place, trimmed)
            notices.append(
                f"column {called} is left out: names that begin with {RESERVED_PREFIX} belong to the results"
            )
            continue
        final = name
        if not name:
            final = next(_free(f"column_{place + 1}", taken, first=True))
            notices.append(f"column {place + 1} has no name and is called {final}")
        elif name in seen:
            final = next(_free(name, taken, first=False))
            called = f" is called {final}" if plausible(trimmed) else " gets a number after its name"
            notices.append(f"the column name {spoken(place, trimmed)} is repeated: column {place + 1}{called}")
        elif name != before:
            notices.append(f"blanks round the column name {spoken(place, trimmed)} are left out")
        seen.add(name)
        taken.add(final)
        names.append(final)
        places.append(place)
    return Cleaned(tuple(names), tuple(places), tuple(notices))


def _free(name: str, taken: set[str], *, first: bool) -> Iterator[str]:
    """Yield free names: `name` itself if `first`, then "name (2)", "name (3)" and so on."""
    if first and name not in taken:
        yield name
    number = 2
    while True:
        if (numbered := f"{name} ({number})") not in taken:
            yield numbered
        number += 1


def counted(number: int, thing: str) -> str:
    """Return "1 row", "2,000 rows"."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def require_column(name: str, names: Sequence[str], *, key: str) -> None:
    """Raise TableError, with the nearest names, where the column that the job key asks for is not in the table."""
    if not name or name in names:
        return
    near = nearest(name, names, 3, 0.5)
    raise TableError(
        f"The table has no column {name}.",
        where=key,
        next_step=f"did you mean {' or '.join(near)}?" if near else listed(names),
    )
