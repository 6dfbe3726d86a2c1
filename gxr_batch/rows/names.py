"""Column names: cleaned as the contract says, and looked for with the nearest ones at hand."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gxr_batch.errors import TableError

RESERVED_PREFIX = "gxr_"
_SHOWN = 20


class Cleaned(NamedTuple):
    """The names that are kept, the place of each in the file (from 0), and a sentence for each one changed."""

    names: tuple[str, ...]
    places: tuple[int, ...]
    notices: tuple[str, ...]


def clean(raw: Sequence[str]) -> Cleaned:
    """Trim names, name the nameless by their place, number the repeated, drop those of the results."""
    trimmed = [name.strip() for name in raw]
    # A name that stands in the file is never given to another column.
    taken = set(trimmed)
    seen: set[str] = set()
    names, places, notices = [], [], []
    for place, (before, name) in enumerate(zip(raw, trimmed, strict=True)):
        if name.startswith(RESERVED_PREFIX):
            notices.append(f"column {name} is left out: names that begin with {RESERVED_PREFIX} belong to the results")
            continue
        final = name
        if not name:
            final = next(_free(f"column_{place + 1}", taken, first=True))
            notices.append(f"column {place + 1} has no name and is called {final}")
        elif name in seen:
            final = next(_free(name, taken, first=False))
            notices.append(f"the column name {name} is repeated: column {place + 1} is called {final}")
        elif name != before:
            notices.append(f"blanks round the column name {name} are left out")
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
    near = difflib.get_close_matches(name.lower(), [other.lower() for other in names], n=3, cutoff=0.5)
    nearest = [other for other in names if other.lower() in near]
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    raise TableError(
        f"The table has no column {name}.",
        where=key,
        next_step=f"did you mean {' or '.join(nearest)}?" if nearest else f"its columns: {shown}",
    )
