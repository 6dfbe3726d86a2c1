"""Which rows an export takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from gxr_batch.errors import RunError
from gxr_batch.ledger import Counts, RunReader

_ROWS_A_BATCH = 16_384


class Source(NamedTuple):
    """The rows of an export: their schema, the tables that hold them, its counts, and whether some are missing."""

    reader: RunReader
    schema: pa.Schema
    tables: Iterator[pa.Table]
    counts: Counts
    partial: bool


class Exported(NamedTuple):
    """What was written: the file, its rows, and sentences that the user should read."""

    path: Path
    rows: int
    partial: bool
    notes: tuple[str, ...] = ()


def open_source(reader: RunReader, *, partial: bool) -> Source:
    """Return the rows of the last complete state, or with `partial` those that are done now.

    Raises RunError where the run is unfinished and `partial` is not set.
    """
    counts = reader.state.counts()
    if partial:
        return Source(reader, reader.schema, reader.finished(), counts, counts.left > 0)
    if reader.results is None:
        raise RunError(
            f"This run is unfinished: {counts.left:,} rows are still to do.",
            where=str(reader.folder),
            next_step="add --partial to export the rows that are done, or let `gxr-batch run` finish it",
        )
    with damage(reader.results):
        schema = pq.read_schema(reader.results)  # of the file itself: the table may have got other columns since
    return Source(reader, schema, _stored(reader.results), counts, partial=False)


def _stored(results: Path) -> Iterator[pa.Table]:
    with damage(results), pq.ParquetFile(results) as file:
        for batch in file.iter_batches(_ROWS_A_BATCH):
            table = pa.Table.from_batches([batch])
            table.validate(full=True)
            yield table


@contextmanager
def damage(results: Path) -> Iterator[None]:
    """Turn what the Parquet reader raises inside the block into a RunError; its text may quote the file."""
    try:
        yield
    except (OSError, pa.ArrowException, ValueError):
        raise RunError(
            "The run's results are damaged.",
            where=str(results.absolute()),
            next_step=f"rename them to {results.name}.damaged and run the job again: they are put together anew",
        ) from None
