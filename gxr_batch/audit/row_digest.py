"""What is kept of a run's rows to compare them with another run's: a few numbers each, so that a million rows fit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gxr_batch.audit.paired_tests import Bools
from gxr_batch.audit.summary import Finding, finding_of, is_read, overall
from gxr_batch.cells import as_text, values_of
from gxr_batch.ledger import RunReader
from gxr_batch.records import CONTENT_HASH, FLAGS_OF_REVIEWS, Key

Hashes = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.int32]
Figures = npt.NDArray[np.float32]
FINDINGS: tuple[Finding | None, ...] = (None, "good", "erroneous", "unknown")
ANY_FLAG = "any flag"
_SEPARATOR = "\x1f"


def keys_of(table: pa.Table) -> pa.Array:
    """Return row id and sample of each row as one string."""
    joined = pc.binary_join_element_wise(table["gxr_row_id"], table["gxr_sample"].cast(pa.string()), _SEPARATOR)
    return joined.combine_chunks() if isinstance(joined, pa.ChunkedArray) else joined


class Digest:
    """Keys, hashes and figures of a run's finished rows, in input order. Hashes are valid within this process only."""

    def __init__(self, reader: RunReader, other: RunReader) -> None:
        self.reader = reader
        self.size = 0
        self._columns = _shared_columns(reader, other)
        reviewed = {review.key.row_id for review in reader.reviews.all if is_read(review)}
        self._reviewed = pa.array(reviewed, pa.string())
        self._keys: list[pa.Array] = []
        self._kept: dict[str, list[npt.NDArray[Any]]] = defaultdict(list)
        self._flagged: dict[str, list[Numbers]] = defaultdict(list)

    def add(self, table: pa.Table) -> None:
        """Add finished rows with their content hashes."""
        if not table.num_rows:
            return
        self._keys.append(keys_of(table))
        ids = table["gxr_row_id"].combine_chunks()
        first = np.append(True, pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False))  # samples adjoin
        before = self._kept["rows"][-1][-1] if self._kept["rows"] else -1
        for name, values in {
            "rows": (before + np.cumsum(first)).astype(np.int32),
            "contents": _hashes(table[CONTENT_HASH].to_pylist()),
            "texts": _hashes(table["gxr_text"].to_pylist()),
            "prompts": _hashes(table["gxr_prompt_sha256"].to_pylist()),
            "lengths": _numbers(pc.utf8_length(table["gxr_text"])),
            "tokens": _numbers(table["gxr_new_tokens"]),
            "findings": self._findings(table),
            "cells": self._cells(table),
        }.items():
            self._kept[name].append(values)
        self._add_flags(table["gxr_flags"])
        self.size += table.num_rows

    def _cells(self, table: pa.Table) -> Hashes:
        if not self._columns:
            return np.zeros(0, np.int64)
        columns = [map(as_text, values_of(table[name])) for name in self._columns]
        return _hashes(list(zip(*columns, strict=True)))

    def _findings(self, table: pa.Table) -> npt.NDArray[np.int8]:
        found = np.zeros(table.num_rows, np.int8)
        at = np.flatnonzero(pc.is_in(table["gxr_row_id"], value_set=self._reviewed).to_numpy())
        names = ("gxr_row_id", "gxr_sample", "gxr_text", "gxr_prompt_sha256")
        rows = zip(*(table[name].take(pa.array(at)).to_pylist() for name in names), strict=True)
        for place, (row_id, sample, text, prompt) in zip(at, rows, strict=True):
            said = self.reader.reviews.valid(Key(row_id, sample), text, prompt)
            found[place] = FINDINGS.index(overall([finding_of(review) for review in said if is_read(review)]))
        return found

    def _add_flags(self, column: pa.ChunkedArray) -> None:
        lists = column.combine_chunks()
        names, places = pc.list_flatten(lists), pc.list_parent_indices(lists)
        own = pc.and_(names.is_valid(), pc.invert(pc.is_in(names, value_set=pa.array(FLAGS_OF_REVIEWS, pa.string()))))
        coded = names.filter(own).dictionary_encode()
        at = places.filter(own).to_numpy().astype(np.int32) + np.int32(self.size)
        if not len(at):
            return
        codes = coded.indices.to_numpy()
        order = np.argsort(codes, kind="stable")
        ends = np.cumsum(np.bincount(codes, minlength=len(coded.dictionary)))[:-1]
        for name, own_places in zip(coded.dictionary.to_pylist(), np.split(at[order], ends), strict=True):
            self._flagged[name].append(own_places)
        self._flagged[ANY_FLAG].append(at)

    @property
    def flags(self) -> set[str]:
        """The flags of any of the rows, without those that reviews add."""
        return set(self._flagged) - {ANY_FLAG}

    def has_flag(self, name: str) -> Bools:
        """Return which rows have a flag, or ANY_FLAG."""
        found = np.zeros(self.size, np.bool_)
        for places in self._flagged.get(name, ()):
            found[places] = True
        return found

    @cached_property
    def keys(self) -> pa.Array:
        """The keys, in row order."""
        pieces, self._keys = self._keys, []
        return pa.chunked_array(pieces, pa.string()).combine_chunks()

    @cached_property
    def rows(self) -> Numbers:
        """The number of each row in order, the same for all its samples."""
        return self._all("rows", np.int32)

    @cached_property
    def contents(self) -> Hashes:
        """A hash of the cells that each row's template uses."""
        return self._all("contents", np.int64)

    @cached_property
    def cells(self) -> Hashes | None:
        """A hash of the cells in the columns that both tables have; None if `contents` decide alone."""
        return self._all("cells", np.int64) if self._columns else None

    @cached_property
    def texts(self) -> Hashes:
        """A hash of each generated text."""
        return self._all("texts", np.int64)

    @cached_property
    def prompts(self) -> Hashes:
        """A hash of each prompt."""
        return self._all("prompts", np.int64)

    @cached_property
    def lengths(self) -> Figures:
        """Characters of each generated text, NaN if there is none."""
        return self._all("lengths", np.float32)

    @cached_property
    def tokens(self) -> Figures:
        """New tokens of each row, NaN if unknown."""
        return self._all("tokens", np.float32)

    @cached_property
    def findings(self) -> npt.NDArray[np.int8]:
        """What reviewers found in each text, as indices into FINDINGS."""
        return self._all("findings", np.int8)

    def forget(self, *names: str) -> None:
        """Free the memory of arrays that are not needed again."""
        for name in names:
            self.__dict__.pop(name, None)

    def _all(self, name: str, kind: type[np.generic]) -> npt.NDArray[Any]:
        return np.concatenate([np.zeros(0, kind), *self._kept.pop(name, ())])


def _shared_columns(reader: RunReader, other: RunReader) -> Sequence[str]:
    """Return the user's columns in which to look for changes besides the content hash; none if the hash suffices.

    It covers the cells that a template uses, so it differs if the templates use other columns.
    """
    prompts, tables = ([one.manifest.job[section] for one in (reader, other)] for section in ("prompt", "input"))
    templates = [
        (one.manifest.format, one.manifest.fingerprint.get("template"), one.manifest.fingerprint.get("templates"))
        for one in (reader, other)
    ]
    chosen_by = {prompt["template_column"] for prompt in prompts}
    if templates[0] == templates[1] and tables[0]["columns"] == tables[1]["columns"] and len(chosen_by) == 1:
        return ()
    there = set(other.schema.names)
    shared = sorted(name for name in reader.schema.names if name in there and not name.startswith("gxr_"))
    return [name for name in shared if name not in chosen_by]


def _hashes(values: Sequence[Any]) -> Hashes:
    return np.fromiter(map(hash, values), np.int64, len(values))


def _numbers(column: pa.ChunkedArray) -> Figures:
    return np.asarray(column.cast(pa.float32(), safe=False).to_numpy(), np.float32)
