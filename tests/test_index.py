"""Rows are found by the hashes of their ids, exactly."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from test_ledger import write_input

from gxr_batch.ledger import index as indexing
from gxr_batch.ledger.index import Index


def found(path, ids):
    return Index(path).find(pa.array(ids, pa.string())).tolist()


@pytest.mark.parametrize("rows", [0, 1, 2, 50_000])
def test_every_row_is_found_at_its_place_and_no_other_id_is(tmp_path, rows):
    ids = [f"{number * 7919 % rows}-é" for number in range(rows)]
    write_input(tmp_path / "t", ids)
    assert found(tmp_path / "t", [*ids[::-1], "x", "", "0"]) == [*range(rows)[::-1], -1, -1, -1]
    assert found(tmp_path / "t", []) == []


def test_ids_that_share_their_first_64_bits_are_told_apart(tmp_path, monkeypatch):
    real = indexing._hashes

    def alike(ids):
        high, low = real(ids)
        return high % np.uint64(3), low

    monkeypatch.setattr(indexing, "_hashes", alike)
    ids = [f"r{number}" for number in range(40)]
    write_input(tmp_path / "t", ids)
    assert found(tmp_path / "t", [*ids[::-1], "x", "y", "z"]) == [*range(40)[::-1], -1, -1, -1]


def test_the_content_is_compared_where_the_row_was_found(tmp_path):
    write_input(tmp_path / "t", ["a", "b"])
    index = Index(tmp_path / "t")
    position = index.find(pa.array(["b", "a", "c"]))
    same = index.same_content(position, pa.array(["hash of b", "edited", "hash of c"]))
    assert same.tolist() == [True, False, False]


def test_an_index_takes_28_bytes_a_row(tmp_path):
    write_input(tmp_path / "t", [f"r{number}" for number in range(1000)])
    assert sum(array.nbytes for array in vars(Index(tmp_path / "t")).values()) == 28 * 1000
