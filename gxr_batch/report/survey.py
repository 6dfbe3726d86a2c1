"""Reads the rows of a run once: counts all of them, and keeps those that the page's table shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

from gxr_batch.ledger import RunReader
from gxr_batch.report.chosen import Chooser
from gxr_batch.report.digest import Digest
from gxr_batch.report.tally import Tally

# Rows of which the page's table shows every one; of a longer run it says which it shows and where the others are.
MOST_CASES = 10_000


class Surveyed(NamedTuple):
    """A run after one pass over its rows; `digest` only where it is to be compared."""

    reader: RunReader
    tally: Tally
    chooser: Chooser
    digest: Digest | None


def survey(reader: RunReader, *, most_cases: int = MOST_CASES, compared: bool = False) -> Surveyed:
    """Read all finished rows. Raises RunError, StorageError."""
    tally, chooser, digest = Tally(), Chooser(most_cases), Digest() if compared else None
    for table in rows_of(reader):
        chooser.add(table, tally.add(table))
        if digest is not None:
            digest.add(table)
    return Surveyed(reader, tally, chooser, digest)


def rows_of(reader: RunReader) -> Iterator[pa.Table]:
    """Yield the finished rows. The columns of held rows are withheld later, in columns.py."""
    return reader.finished()
