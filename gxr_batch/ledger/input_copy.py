"""The run's copy of the table, input.parquet: its columns, its keys, and an index to find rows by id.

Everything here raises RunError for damage. The index takes 28 bytes per row, so that ten million rows fit: an id is 128
bits of its hash, sorted by the first 64; the others distinguish rows that share those. Two ids sharing all 128 bits by
chance are less likely than a bit flip in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gxr_batch.disk import reading, sha256_of, table_copy
from gxr_batch.errors import RunError

KEY_COLUMNS_OF_INPUT = ("gxr_row_id", "gxr_content_hash")
_ROWS_A_BATCH = 16_384


def sha256_of_copy(path: Path) -> str:
    """Return the sha256 of the copy's bytes, hex. Raises RunError, StorageError."""
    with table_copy(path):
        return sha256_of(path)


def rows_of(path: Path) -> int:
    """Return how many rows the table has."""
    with table_copy(path):
        return int(pq.read_metadata(path).num_rows)


def key_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield the rows' ids and content hashes, in batches."""
    with opened(path) as file:
        yield from keys_in(file)


@contextmanager
def opened(path: Path) -> Iterator[pq.ParquetFile]:
    """Open the table; everything read inside is from one table, even if it is replaced meanwhile."""
    with table_copy(path), pq.ParquetFile(path) as file:
        yield file


def keys_in(file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """Like `key_batches`, for an open table."""
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
        if len(names) < len(own) or any(name.startswith("gxr_") for name in names):  # as in a results file
            raise ValueError
    return own


def batches_of(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield the rows with all columns."""
    with table_copy(path), pq.ParquetFile(path) as file:
        yield from file.iter_batches(_ROWS_A_BATCH)


def is_sound(path: Path) -> bool:
    """Return whether the copy is readable and valid. Raises StorageError if the disk is at fault."""
    try:
        own_fields(path)
        for _ in key_batches(path):
            pass
    except RunError:
        return False
    return True


def has_footer(path: Path) -> bool:
    """Return whether a Parquet file was written completely. Raises StorageError if the disk is at fault."""
    try:
        with reading(path, RunError("")):
            pq.read_metadata(path)
    except RunError:
        return False
    return True


Positions = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]


class Index:
    """The ids and contents of the table in one input.parquet. Raises RunError if it is damaged, StorageError."""

    def __init__(self, path: Path) -> None:
        with opened(path) as file:
            self.rows = rows = file.metadata.num_rows
            high, self._low = np.empty(rows, np.uint64), np.empty(rows, np.uint64)
            self._contents = np.empty(rows, np.int64)
            start = 0
            for batch in keys_in(file):
                here = slice(start, start + batch.num_rows)
                high[here], self._low[here] = _hashes(batch.column(0))
                self._contents[here] = _content_marks(batch.column(1))
                start = here.stop
        self._order = np.argsort(high).astype(np.int32)
        self._high = high[self._order]

    def find(self, ids: pa.Array) -> Positions:
        """Return the positions of the rows with these ids in the table, -1 for an id that it lacks."""
        high, low = _hashes(ids)
        position = np.full(len(high), -1)
        asked, at = np.arange(len(high)), np.searchsorted(self._high, high)
        while asked.size:
            inside = at < len(self._high)
            inside[inside] = self._high[at[inside]] == high[asked[inside]]
            asked, at = asked[inside], at[inside]
            row = self._order[at]
            hit = self._low[row] == low[asked]
            position[asked[hit]] = row[hit]
            asked, at = asked[~hit], at[~hit] + 1  # another id with the same first 64 bits
        return position

    def same_content(self, position: Positions, contents: pa.Array) -> npt.NDArray[np.bool_]:
        """Return where a row was found with this content. Two contents of one id collide with a chance of 2^-64."""
        same = position >= 0
        same[same] = self._contents[position[same]] == _content_marks(contents)[same]
        return same


def _hashes(ids: pa.Array) -> tuple[_Words, _Words]:
    texts = ids.cast(pa.binary()).to_pylist()
    words = np.frombuffer(b"".join([blake2b(text, digest_size=16).digest() for text in texts]), np.uint64)
    return words[::2], words[1::2]


def _content_marks(contents: pa.Array) -> npt.NDArray[np.int64]:
    """Return 64 bits for each content hash, stable within this process."""
    return np.fromiter(map(hash, contents.to_pylist()), np.int64, len(contents))
