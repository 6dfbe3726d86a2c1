"""Row ids: all unique, and the same for the same row whatever happens to other rows."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import CANARY, look, refused

from gxr_batch.errors import RunError
from gxr_batch.rows.columns import FieldMap
from gxr_batch.rows.ingest import ingest

FIELDS = FieldMap(templates={"t": ("f",)}, default="t", columns={"f": "findings"})


def ingested(folder: Path, rows, *, id_column="id", prior=None):
    """Ingest rows of (id, findings); return their ids in order and the file, which can be the next call's prior."""
    path = folder / "cases.parquet"
    columns = {"id": [row[0] for row in rows], "findings": [row[1] for row in rows]}
    pq.write_table(pa.table({name: pa.array(cells, pa.string()) for name, cells in columns.items()}), path)
    target = folder / f"input-{len(list(folder.iterdir()))}.parquet"
    taken = ingest(look(path), FIELDS, target, id_column=id_column, prior=prior, limit=None)
    assert not list(folder.glob("*.ids"))
    return pq.read_table(target)["gxr_row_id"].to_pylist(), target, taken.notices


def ids(folder, rows, **keys):
    return ingested(folder, rows, **keys)[0]


def test_ids_that_do_not_repeat_are_the_cells_text(tmp_path):
    assert ids(tmp_path, [("A", "x"), ("007", "y"), (" b ", "z"), ("A#2", "w")]) == ["A", "007", " b ", "A#2"]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (pa.array([1, 2**63 - 1], pa.int64()), ["1", str(2**63 - 1)]),
        (pa.array([1.0, 2.5]), ["1", "2.5"]),
        (pa.array([1e20, -3.0]), [str(10**20), "-3"]),
        (pa.array([Decimal("5.00"), Decimal("5.50")]), ["5", "5.50"]),
        (pa.array([dt.date(2024, 1, 2), dt.date(2024, 1, 3)]), ["2024-01-02", "2024-01-03"]),
        (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
        (pa.array(["a", "b"], pa.large_string()), ["a", "b"]),
        (pa.array([b"a", b"b"]), ["a", "b"]),
        (pa.array([1.2, 3.0], pa.float32()), ["1.2000000476837158", "3"]),  # as earlier versions made them
    ],
)
def test_ids_of_other_types_are_their_text(tmp_path, cells, expected):
    pq.write_table(pa.table({"id": cells, "findings": ["x", "y"]}), tmp_path / "cases.parquet")
    seen = look(tmp_path / "cases.parquet")
    ingest(seen, FIELDS, tmp_path / "t.parquet", id_column="id", prior=None, limit=None)
    assert pq.read_table(tmp_path / "t.parquet")["gxr_row_id"].to_pylist() == expected


@pytest.mark.parametrize("cells", [[[CANARY]], [{"a": CANARY}]])
def test_columns_that_cannot_be_ids_are_refused(tmp_path, cells):
    pq.write_table(pa.table({"id": cells, "findings": ["x"]}), tmp_path / "cases.parquet")
    error = refused(tmp_path / "cases.parquet", id_column="id")
    assert "cannot be row ids" in error.what
    assert error.where == "input.id_column"


def test_bytes_that_are_no_text_cannot_be_ids(tmp_path):
    path = tmp_path / "cases.parquet"
    pq.write_table(pa.table({"id": [CANARY.encode() + b"\xff"], "findings": ["x"]}), path)
    error = refused(path, id_column="id")
    assert error.what == "The column id holds bytes that are not UTF-8 text, which no prompt can show."
    assert error.where == f"{path}, column id"


def test_rows_without_an_id_get_one_from_their_content_with_one_notice(tmp_path):
    rows = [("A", "x"), (None, "y"), ("", "z"), ("  ", "w")]
    found, target, notices = ingested(tmp_path, rows)
    hashes = pq.read_table(target)["gxr_content_hash"].to_pylist()
    assert found == ["A", *(content[:16] for content in hashes[1:])]
    assert notices == ("3 rows without id: ids come from the content",)


def test_missing_numbers_are_missing_ids(tmp_path):
    cells = pa.array([1.0, float("nan"), None])
    pq.write_table(pa.table({"id": cells, "findings": ["x", "y", "z"]}), tmp_path / "cases.parquet")
    taken = ingest(
        look(tmp_path / "cases.parquet"), FIELDS, tmp_path / "t.parquet", id_column="id", prior=None, limit=None
    )
    assert taken.notices == ("2 rows without id: ids come from the content",)


def test_repeated_ids_are_numbered_and_reported(tmp_path):
    found, _, notices = ingested(tmp_path, [("A", "x"), ("B", "y"), ("A", "z"), ("A", "x")])
    assert sorted(found) == ["A", "A#2", "A#3", "B"]
    assert found[1] == "B"
    assert notices == ("2 rows with the id of another row: numbered #2, #3, ...",)


def test_identical_rows_are_numbered_without_an_id_column(tmp_path):
    found, _, notices = ingested(tmp_path, [("A", "x"), ("B", "x"), ("C", "y")], id_column="")
    assert found[1] == f"{found[0]}#2"
    assert notices == ("1 row with the content of another row: numbered #2, #3, ...",)


def test_a_made_id_never_equals_one_in_a_cell(tmp_path):
    found = ids(tmp_path, [("A", "x"), ("A", "y"), ("A#2", "z"), ("A#4", "w"), ("A", "v"), ("A#2", "u")])
    assert sorted(found) == ["A", "A#2", "A#2#2", "A#3", "A#4", "A#5"]
    assert {found[2], found[5]} == {"A#2", "A#2#2"}
    assert found[3] == "A#4"


def test_content_keeps_its_id_when_a_repeat_is_removed_inserted_or_edited(tmp_path):
    first, table, _ = ingested(tmp_path, [("A", "x"), ("A", "y"), ("A", "z")])
    known = dict(zip("xyz", first, strict=True))
    for keep in ("x", "y", "z"):
        assert ids(tmp_path, [("A", keep)], prior=table) == [known[keep]]
    assert ids(tmp_path, [("A", "z"), ("A", "y")], prior=table) == [known["z"], known["y"]]
    inserted = ids(tmp_path, [("A", "new"), ("A", "z"), ("A", "x"), ("A", "y")], prior=table)
    assert inserted == ["A#4", known["z"], known["x"], known["y"]]
    assert ids(tmp_path, [("A", "z"), ("A", "edited"), ("A", "x")], prior=table) == [known["z"], known["y"], known["x"]]


def test_the_last_of_a_family_keeps_its_id_over_many_invocations(tmp_path):
    first, table, _ = ingested(tmp_path, [("A", "x"), ("A", "y")])
    second = "x" if first[0] == "A#2" else "y"
    for _ in range(3):
        found, table, _ = ingested(tmp_path, [("A", second), ("B", "b")], prior=table)
        assert found == ["A#2", "B"]
    assert ids(tmp_path, [("A", "later"), ("A", second)], prior=table) == ["A", "A#2"]


def test_a_row_never_inherits_an_id_from_a_cell_of_the_previous_table(tmp_path):
    _, table, _ = ingested(tmp_path, [("A", "x"), ("A#2", "y")])
    assert ids(tmp_path, [("A", "y")], prior=table) == ["A"]
    assert ids(tmp_path, [("A", "y"), ("A", "x")], prior=table) == ["A#2", "A"]


def test_a_cell_that_now_holds_a_made_id_gets_it(tmp_path):
    first, table, _ = ingested(tmp_path, [("A", "x"), ("A", "y")])
    known = dict(zip("xy", first, strict=True))
    found = ids(tmp_path, [("A", "x"), ("A", "y"), ("A#2", "z")], prior=table)
    assert found[2] == "A#2"
    assert [found["xy".index(word)] for word in "xy" if known[word] == "A"] == ["A"]
    assert len(set(found)) == 3


def test_long_numbers_after_a_hash_are_taken_as_ids(tmp_path):
    rows = [("A#" + "9" * 5000, "x"), ("A#02", "y"), ("A#1", "z"), ("A", "w"), ("A", "v")]
    _, table, _ = ingested(tmp_path, rows)
    found = ids(tmp_path, rows[::-1], prior=table)
    assert found[2:] == ["A#1", "A#02", "A#" + "9" * 5000]
    assert sorted(found[:2]) == ["A", "A#2"]


def test_a_damaged_previous_table_is_named_with_a_next_step(tmp_path):
    _, table, _ = ingested(tmp_path, [("A", "x"), ("A", "y")])
    table.write_bytes(table.read_bytes()[:-50])
    with pytest.raises(RunError, match="copy of the table is damaged") as caught:
        ids(tmp_path, [("A", "x"), ("A", "y")], prior=table)
    assert caught.value.where == str(table)


def test_a_previous_table_without_the_id_column_still_counts(tmp_path):
    first, table, _ = ingested(tmp_path, [("A", "x"), ("A", "y")], id_column="")
    assert ids(tmp_path, [("B", "x"), ("B", "y")], id_column="", prior=table) == first


id_cells = st.sampled_from(["A", "B", "A#2", "A#3", "A#2#2", "#2", "", None])
tables = st.lists(st.tuples(id_cells, st.sampled_from(["x", "y", "z"])), max_size=9)
quick = settings(max_examples=60, deadline=None)


def by_content(rows, found):
    """Return how often each (cell, findings, id) occurs, whatever the order."""
    return Counter((cell or "", text, row_id) for (cell, text), row_id in zip(rows, found, strict=True))


@quick
@given(first=tables, second=tables)
def test_ids_are_always_unique_and_a_cell_that_does_not_repeat_is_its_rows_id(tmp_path_factory, first, second):
    folder = tmp_path_factory.mktemp("ids")
    _, table, _ = ingested(folder, first)
    for prior in (None, table):
        found = ids(folder, second, prior=prior)
        assert len(set(found)) == len(found)
        cells = Counter(row[0] for row in second)
        for (cell, _), row_id in zip(second, found, strict=True):
            if cell:
                assert row_id == cell or row_id.startswith(f"{cell}#")
            if cell and prior is None and cells[cell] == 1:
                assert row_id == cell


@quick
@given(rows=tables, data=st.data())
def test_a_reordered_table_gives_the_same_ids_to_the_same_rows(tmp_path_factory, rows, data):
    folder = tmp_path_factory.mktemp("ids")
    found, table, _ = ingested(folder, rows)
    shuffled = data.draw(st.permutations(rows))
    assert by_content(shuffled, ids(folder, shuffled)) == by_content(rows, found)
    assert by_content(shuffled, ids(folder, shuffled, prior=table)) == by_content(rows, found)


@quick
@given(rows=tables, data=st.data())
def test_removing_rows_does_not_change_the_ids_of_the_others(tmp_path_factory, rows, data):
    folder = tmp_path_factory.mktemp("ids")
    found, table, _ = ingested(folder, rows)
    kept = [row for row in data.draw(st.permutations(rows)) if data.draw(st.booleans())]
    after = by_content(kept, ids(folder, kept, prior=table))
    # Rows with the same cell and content are interchangeable: either may keep its id.
    assert set(after) <= set(by_content(rows, found))


@quick
@given(
    rows=tables,
    more=st.lists(st.tuples(st.sampled_from(["A", "B", ""]), st.sampled_from("vwx")), max_size=4),
    data=st.data(),
)
def test_inserted_rows_do_not_change_the_ids_of_the_others(tmp_path_factory, rows, more, data):
    folder = tmp_path_factory.mktemp("ids")
    found, table, _ = ingested(folder, rows)
    mixed = data.draw(st.permutations(rows + more))
    after = ids(folder, mixed, prior=table)
    assert set(by_content(rows, found)) <= set(by_content(mixed, after))


def test_ids_with_colliding_marks_are_unchanged(tmp_path, monkeypatch):
    """If 64 bits of two ids are equal, the texts decide."""
    monkeypatch.setattr("gxr_batch.rows.ingest.marks", lambda ids: np.zeros(len(ids), np.int64))
    monkeypatch.setattr("gxr_batch.rows.ids.marks", lambda ids: np.zeros(len(ids), np.int64))
    rows = [("A", "x"), ("B", "y"), ("A", "z"), ("C", "x")]
    found, table, notices = ingested(tmp_path, rows)
    assert [found[1], found[3]] == ["B", "C"]
    assert {found[0], found[2]} == {"A", "A#2"}
    assert notices == ("1 row with the id of another row: numbered #2, #3, ...",)
    assert ids(tmp_path, rows[2:], prior=table) == [found[2], "C"]
