"""The content hash, and reading rows back from input.parquet."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import look, refused

from gxr_batch.errors import RunError
from gxr_batch.rows.columns import FieldMap
from gxr_batch.rows.ids import ContentHasher, canonical_json
from gxr_batch.rows.ingest import ingest
from gxr_batch.rows.table_reader import read_rows

FIELDS = FieldMap(
    templates={"case": ("findings", "age", "history"), "short": ("findings",), "plain": ()},
    default="case",
    columns={"findings": "report", "age": "age"},
)
CHOSEN = FieldMap(templates=FIELDS.templates, default="case", template_column="kind", columns=FIELDS.columns)


def table_of(folder, text, fields=FIELDS, **keys):
    path = folder / "cases.csv"
    path.write_text(text)
    target = folder / "input.parquet"
    ingest(look(path), fields, target, id_column="", prior=None, limit=None, **keys)
    return target


def sha256(content):
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_content_hash_covers_the_templates_cells_as_canonical_json(tmp_path):
    target = table_of(tmp_path, 'report,age,other\n"é ""x""\n%s %",007,y\n,5,z\n')
    assert pq.read_table(target)["gxr_content_hash"].to_pylist() == [
        sha256({"findings": 'é "x"\n%s %', "age": "007"}),
        sha256({"findings": None, "age": "5"}),
    ]


def test_without_an_id_column_the_id_is_the_start_of_the_hash(tmp_path):
    table = pq.read_table(table_of(tmp_path, "report,age\nx,1\ny,2\n"))
    assert table["gxr_row_id"].to_pylist() == [text[:16] for text in table["gxr_content_hash"].to_pylist()]


def test_the_template_named_in_a_column_is_part_of_the_content(tmp_path):
    target = table_of(tmp_path, "report,age,kind\nx,1,\nx,1,short\nx,1, case \nx,1,no%such\nx,1,plain\n", CHOSEN)
    assert pq.read_table(target)["gxr_content_hash"].to_pylist() == [
        sha256({"": "case", "findings": "x", "age": "1"}),
        sha256({"": "short", "findings": "x"}),
        sha256({"": "case", "findings": "x", "age": "1"}),
        sha256({"": "no%such"}),
        sha256({"": "plain"}),
    ]
    rows = list(read_rows(target, CHOSEN, None))
    assert [(row.template, dict(row.values)) for row in rows] == [
        ("case", {"findings": "x", "age": "1", "history": None}),
        ("short", {"findings": "x"}),
        ("case", {"findings": "x", "age": "1", "history": None}),
        ("no%such", {}),
        ("plain", {}),
    ]


def test_a_missing_template_column_is_reported_with_the_closest_name(tmp_path):
    (tmp_path / "cases.csv").write_text("report,age,kinds\nx,1,short\n")
    error = refused(tmp_path / "cases.csv", fields=CHOSEN)
    assert error.what == "The table has no column kind."
    assert error.where == "prompt.template_column"
    assert error.next_step == "did you mean kinds?"


def test_other_columns_and_their_order_do_not_change_the_content(tmp_path):
    before = pq.read_table(table_of(tmp_path, "report,age\nx,1\n"))
    after = pq.read_table(table_of(tmp_path, "new,age,report\nz,1,x\n"))
    assert before["gxr_content_hash"] == after["gxr_content_hash"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(json_values)
def test_canonical_json_is_json(value):
    text = canonical_json(value)
    assert text == json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.none() | st.text(st.characters(codec="utf-8")), st.none() | st.integers(0, 9)), max_size=5)
)
def test_hashes_by_column_equal_hashes_by_row(rows):
    table = pa.table(
        {
            "report": pa.array([row[0] for row in rows], pa.string()),
            "age": pa.array([row[1] for row in rows], pa.int64()),
        }
    )
    assert ContentHasher(FIELDS).hashes(table) == [sha256({"findings": row[0], "age": row[1]}) for row in rows]


@pytest.fixture
def many(tmp_path):
    return table_of(tmp_path, "report,age\n" + "".join(f"r{number},{number % 7}\n" for number in range(150_000)))


def test_rows_come_in_input_order_with_their_positions(many):
    rows = list(read_rows(many, FIELDS, None))
    assert [row.position for row in rows] == list(range(150_000))
    assert rows[99_999].values == {"findings": "r99999", "age": "4", "history": None}
    assert [row.row_id for row in rows] == pq.read_table(many)["gxr_row_id"].to_pylist()


def test_only_wanted_rows_come_and_other_row_groups_are_not_read(many, monkeypatch):
    wanted = np.zeros(150_000, np.bool_)
    wanted[[3, 70_000, 70_001]] = True
    read = []
    whole = pq.ParquetFile.iter_batches

    def counting(self, *arguments, **keys):
        read.extend(keys["row_groups"])
        return whole(self, *arguments, **keys)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counting)
    rows = list(read_rows(many, FIELDS, wanted))
    assert [(row.position, row.values["findings"]) for row in rows] == [
        (3, "r3"),
        (70_000, "r70000"),
        (70_001, "r70001"),
    ]
    assert read == [0, 1]
    assert list(read_rows(many, FIELDS, np.zeros(150_000, np.bool_))) == []


def test_an_empty_table_yields_no_rows(tmp_path):
    target = table_of(tmp_path, "report,age\n")
    assert list(read_rows(target, FIELDS, None)) == []
    assert list(read_rows(target, FIELDS, np.zeros(0, np.bool_))) == []


def test_a_damaged_copy_is_named(many):
    many.write_bytes(many.read_bytes()[:-100])
    with pytest.raises(RunError, match="copy of the table is damaged") as caught:
        list(read_rows(many, FIELDS, None))
    assert caught.value.where == str(many)
