"""Finds the rows of a table by their ids, in 28 bytes a row: ten million of them fit beside a model.

An id is kept as 128 bits of its hash, sorted by the first 64; rows that share those are told apart by the others. That
two ids share all 128 by chance is less likely than a bit of memory that flips.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gxr_batch.ledger.table import keys_in, opened

Positions = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]


class Index:
    """The ids and contents of the table in one input.parquet. Raises RunError where it is damaged, StorageError."""

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
        """Return where the rows with these ids stand in the table, -1 for an id that it does not have."""
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
        """Return where a row was found and has this content. Of one id, two contents share a mark once in 2^64."""
        same = position >= 0
        same[same] = self._contents[position[same]] == _content_marks(contents)[same]
        return same


def _hashes(ids: pa.Array) -> tuple[_Words, _Words]:
    texts = ids.cast(pa.binary()).to_pylist()
    words = np.frombuffer(b"".join([blake2b(text, digest_size=16).digest() for text in texts]), np.uint64)
    return words[::2], words[1::2]


def _content_marks(contents: pa.Array) -> npt.NDArray[np.int64]:
    """Return 64 bits for each content hash, the same within this process."""
    return np.fromiter(map(hash, contents.to_pylist()), np.int64, len(contents))
