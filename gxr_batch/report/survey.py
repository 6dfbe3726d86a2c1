"""Reads the rows of a run once: counts all of them, and keeps those that the page's table shows."""

from __future__ import annotations

from typing import NamedTuple

from gxr_batch.ledger import RunReader
from gxr_batch.report.aggregate import Tally
from gxr_batch.report.chosen import Chooser
from gxr_batch.report.digest import Digest

# Rows of which the page's table shows every one; of a longer run it says which it shows and where the others are.
MOST_CASES = 10_000


class Surveyed(NamedTuple):
    """A run after one pass over its rows; `digest` only where it is to be compared."""

    reader: RunReader
    tally: Tally
    chooser: Chooser
    digest: Digest | None
    include_held: bool


def survey(
    reader: RunReader, *, most_cases: int = MOST_CASES, compared: bool = False, include_held: bool = False
) -> Surveyed:
    """Read all finished rows; held ones come with their text only where asked for. Raises RunError, StorageError."""
    tally, chooser, digest = Tally(), Chooser(most_cases), Digest() if compared else None
    for table in reader.finished(include_held=include_held):
        chooser.add(table, tally.add(table))
        if digest is not None:
            digest.add(table)
    return Surveyed(reader, tally, chooser, digest, include_held)
