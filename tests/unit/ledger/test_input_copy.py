"""Rows are found exactly by the hashes of their ids."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from small_runs import result, start, write_input

from gxr_batch.ledger import input_copy, open_run
from gxr_batch.ledger.input_copy import Index
from gxr_batch.ledger.state import State


def found(path, ids):
    return Index(path).find(pa.array(ids, pa.string())).tolist()


@pytest.mark.parametrize("rows", [0, 1, 2, 50_000])
def test_every_row_is_found_at_its_position_and_no_other_id_is(tmp_path, rows):
    ids = [f"{number * 7919 % rows}-é" for number in range(rows)]
    write_input(tmp_path / "t", ids)
    assert found(tmp_path / "t", [*ids[::-1], "x", "", "0"]) == [*range(rows)[::-1], -1, -1, -1]
    assert found(tmp_path / "t", []) == []


def test_ids_that_share_their_first_64_bits_are_distinguished(tmp_path, monkeypatch):
    real = input_copy._hashes

    def alike(ids):
        high, low = real(ids)
        return high % np.uint64(3), low

    monkeypatch.setattr(input_copy, "_hashes", alike)
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
    arrays = [value for value in vars(Index(tmp_path / "t")).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) == 28 * 1000


@pytest.mark.parametrize("rows", [5, 20, 40])
def test_a_table_replaced_while_being_indexed_is_read_as_the_old_or_the_new_one(tmp_path, monkeypatch, rows):
    """A reader during an invocation that reads another table sees one of them, whole."""
    real = input_copy.keys_in
    with open_run(tmp_path) as ledger:
        start(ledger, ids := [f"r{number}" for number in range(20)])
        for position in (1, 19):
            ledger.add(position, result(ids[position]))
        ledger.seal()

        def keys_in(file):
            start(ledger, [f"r{number}" for number in range(rows)])
            return real(file)

        monkeypatch.setattr(input_copy, "keys_in", lambda file: monkeypatch.undo() or keys_in(file))
        found = State.scan(tmp_path, tmp_path / "input.parquet", 1)
    assert found.status[:, 0].tolist() == [int(number in (1, 19)) for number in range(20)]
