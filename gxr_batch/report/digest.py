"""Each row of a run as a few numbers, so that two runs of a million rows can be laid side by side."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

_SEPARATOR = "\x1f"


def keys_of(table: pa.Table) -> pa.Array:
    """Return row id and sample of every row as one text."""
    joined = pc.binary_join_element_wise(table["gxr_row_id"], table["gxr_sample"].cast(pa.string()), _SEPARATOR)
    return joined.combine_chunks() if isinstance(joined, pa.ChunkedArray) else joined


class Digest:
    """Key, text and prompt of each row that was added. Hashes hold within this process only; 0 = no text."""

    def __init__(self) -> None:
        self._keys: list[pa.Array] = []
        self._texts: list[npt.NDArray[np.int64]] = []
        self._prompts: list[npt.NDArray[np.int64]] = []
        self._lengths: list[npt.NDArray[np.float64]] = []

    def add(self, table: pa.Table) -> None:
        """Take in finished rows."""
        self._keys.append(keys_of(table))
        self._texts.append(_hashes(table["gxr_text"]))
        self._prompts.append(_hashes(table["gxr_prompt_sha256"]))
        length = pc.utf8_length(table["gxr_text"]).cast(pa.float64())
        self._lengths.append(np.asarray(length.to_numpy(), np.float64))

    @cached_property
    def keys(self) -> pa.Array:
        """The keys, in the order of the rows."""
        return pa.chunked_array(self._keys, pa.string()).combine_chunks()

    @cached_property
    def texts(self) -> npt.NDArray[np.int64]:
        """A hash of each generated text."""
        return np.concatenate([np.zeros(0, np.int64), *self._texts])

    @cached_property
    def prompts(self) -> npt.NDArray[np.int64]:
        """A hash of each prompt."""
        return np.concatenate([np.zeros(0, np.int64), *self._prompts])

    @cached_property
    def lengths(self) -> npt.NDArray[np.float64]:
        """Characters of each generated text, NaN where there is none."""
        return np.concatenate([np.zeros(0), *self._lengths])


def _hashes(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    return np.fromiter((0 if text is None else hash(text) for text in column.to_pylist()), np.int64, len(column))
