"""The run's copy of the table, input.parquet, as the ledger reads it. Everything here raises RunError for damage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gxr_batch.errors import RunError
from gxr_batch.storage import reading, table_copy

KEY_COLUMNS_OF_INPUT = ("gxr_row_id", "gxr_content_hash")
_ROWS_A_BATCH = 16_384


def rows_of(path: Path) -> int:
    """Return how many rows the table has."""
    with table_copy(path):
        return int(pq.read_metadata(path).num_rows)


def key_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield row id and content hash of the rows, a batch at a time."""
    with opened(path) as file:
        yield from keys_in(file)


@contextmanager
def opened(path: Path) -> Iterator[pq.ParquetFile]:
    """Open the table; what is read inside is of one table, also where another takes its place meanwhile."""
    with table_copy(path), pq.ParquetFile(path) as file:
        yield file


def keys_in(file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """Yield what `key_batches` does, of a table that is open."""
    for batch in file.iter_batches(_ROWS_A_BATCH, columns=list(KEY_COLUMNS_OF_INPUT)):
        keys = batch.select(list(KEY_COLUMNS_OF_INPUT))
        keys.validate(full=True)
        if any(column.type != pa.string() or column.null_count for column in keys.columns):
            raise ValueError
        yield keys


def own_fields(path: Path) -> list[pa.Field]:
    """Return the user's columns."""
    with table_copy(path):
        own = [field for field in pq.read_schema(path) if field.name not in KEY_COLUMNS_OF_INPUT]
        names = {field.name for field in own}
        if len(names) < len(own) or any(name.startswith("gxr_") for name in names):  # as in a file of results
            raise ValueError
    return own


def batches_of(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield the rows with all columns."""
    with table_copy(path), pq.ParquetFile(path) as file:
        yield from file.iter_batches(_ROWS_A_BATCH)


def is_sound(path: Path) -> bool:
    """Return whether the copy can be read and is one. Raises StorageError where the disk is at fault."""
    try:
        own_fields(path)
        for _ in key_batches(path):
            pass
    except RunError:
        return False
    return True


def has_footer(path: Path) -> bool:
    """Return whether a Parquet file was written to its end. Raises StorageError where the disk is at fault."""
    try:
        with reading(path, RunError("")):
            pq.read_metadata(path)
    except RunError:
        return False
    return True
