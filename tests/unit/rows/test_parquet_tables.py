"""Parquet: every type passes through unchanged; damage is reported and never quoted."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tables import CANARY, look, refused, take

from gxr_batch.errors import TableError
from gxr_batch.rows.columns import FieldMap
from gxr_batch.rows.ingest import ingest
from gxr_batch.rows.table_reader import read_rows

NS = 1_700_000_000_123_456_789
MOMENT = dt.datetime(2024, 1, 2, 3, 4, 5, 678)
COLUMNS = {
    "text": pa.array(["a", None, ""]),
    "large text": pa.array(["a", None, "b"], pa.large_string()),
    "category": pa.array(["x", None, "x"]).dictionary_encode(),
    "small category": pa.array(["x", None, "x"]).cast(pa.dictionary(pa.int8(), pa.string())),
    "number": pa.array([1, None, -3], pa.int16()),
    "unsigned": pa.array([1, None, 2**64 - 1], pa.uint64()),
    "float": pa.array([1.5, None, float("nan")], pa.float32()),
    "flag": pa.array([True, None, False]),
    "price": pa.array([Decimal("1.50"), None, Decimal("2.00")], pa.decimal128(9, 2)),
    "bytes": pa.array([b"\xff\x00", None, b""], pa.binary()),
    "fixed bytes": pa.array([b"abcd", None, b"efgh"], pa.binary(4)),
    "day": pa.array([dt.date(2024, 1, 2), None, dt.date(1900, 1, 1)]),
    "clock": pa.array([dt.time(1, 2, 3), None, dt.time(0)], pa.time64("us")),
    "fine clock": pa.array([1001, None, 0], pa.time64("ns")),
    "moment": pa.array([MOMENT, None, MOMENT], pa.timestamp("ms", tz="UTC"), safe=False),
    "fine moment": pa.array([NS, None, 0], pa.timestamp("ns")),
    "zoned moment": pa.array([NS, None, 0], pa.timestamp("ns", tz="Europe/Berlin")),
    "length": pa.array([NS, None, 0], pa.duration("ns")),
    "list": pa.array([[1, None], None, []], pa.list_(pa.int64())),
    "struct": pa.array(
        [{"a": "x", "b": [NS]}, None, {"a": None, "b": None}],
        pa.struct([("a", pa.string()), ("b", pa.list_(pa.timestamp("ns")))]),
    ),
    "map": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
    "nothing": pa.nulls(3),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cases.parquet"


def test_every_type_passes_through_unchanged(path):
    pq.write_table(pa.table(COLUMNS), path)
    original = pq.read_table(path)
    table, taken = take(path)
    assert taken.rows == 3
    assert table.column_names == [*COLUMNS, "gxr_row_id", "gxr_content_hash"]
    for name in COLUMNS:
        assert table.schema.field(name).type == original.schema.field(name).type, name
        assert str(table[name].combine_chunks()) == str(original[name].combine_chunks()), name


VIEWS = {
    "text": (pa.array(["a", None, "a"], pa.string_view()), pa.string()),
    "bytes": (pa.array([b"a", None, b"a"], pa.binary_view()), pa.binary()),
    "list": (pa.array([["a"], None, ["a"]], pa.list_(pa.string_view())), pa.list_(pa.string())),
    "struct": (
        pa.array([{"x": "a"}, None, {"x": "a"}], pa.struct([("x", pa.string_view())])),
        pa.struct([("x", "str")]),
    ),
}


def test_view_types_become_plain_types_whose_rows_can_be_selected(path):
    pq.write_table(pa.table({name: column for name, (column, _) in VIEWS.items()}), path)
    fields = FieldMap(templates={"t": ("f",)}, default="t", columns={"f": "text"})
    table, _ = take(path, fields=fields, id_column="text", null_values=("b",))
    for name, (column, plain) in VIEWS.items():
        assert table.schema.field(name).type == plain, name
        assert table[name].to_pylist() == column.to_pylist(), name
        assert table.take(pa.array([2]))[name].to_pylist() == column.to_pylist()[2:], name
    assert table["gxr_row_id"].to_pylist()[::2] == ["a", "a#2"]


CATEGORY = pa.dictionary(pa.int8(), pa.string())


@pytest.mark.parametrize(
    ("kind", "cell"),
    [
        (pa.list_(CATEGORY), ["a", "b"]),
        (pa.list_(CATEGORY, 2), ["a", "b"]),
        (pa.large_list(pa.struct([("x", CATEGORY)])), [{"x": "a"}]),
        (pa.map_(pa.string(), CATEGORY), [("k", "a")]),
    ],
    ids=str,
)
def test_categories_inside_other_types_are_read_from_any_number_of_row_groups(path, kind, cell):
    pq.write_table(pa.table({"id": ["1", "1", "2"], "one": pa.array([cell, None, cell], kind)}), path, row_group_size=2)
    table, _ = take(path, id_column="id")  # ids that repeat are written in a second pass
    assert table["one"].to_pylist() == [cell, None, cell]
    assert "dictionary" not in str(table.schema.field("one").type)


@pytest.mark.parametrize("name", [name for name in COLUMNS if name != "bytes"])
def test_every_type_can_fill_a_field(path, name):
    pq.write_table(pa.table(COLUMNS), path)
    fields = FieldMap(templates={"t": ("f",)}, default="t", columns={"f": name})
    table, _ = take(path, fields=fields)
    rows = list(read_rows(path.with_name("taken.parquet"), fields, None))
    assert [row.content_hash for row in rows] == table["gxr_content_hash"].to_pylist()
    assert rows[1].values == {"f": None}
    assert not any(type(row.values["f"]).__module__.startswith("pandas") for row in rows)


def test_bytes_that_are_no_text_fill_no_field_and_the_error_names_file_and_column(path):
    pq.write_table(pa.table(COLUMNS), path)
    fields = FieldMap(templates={"t": ("f",), "u": ()}, default="t", columns={"f": "bytes"})
    error = refused(path, fields=fields)
    assert error.what == "The column bytes holds bytes that are not UTF-8 text, which no prompt can show."
    assert error.where == f"{path}, column bytes"


def test_a_column_that_only_templates_of_no_row_use_may_hold_anything(path):
    pq.write_table(pa.table({"kind": ["u", "u"], "bytes": [b"\xff", b"\x00"]}), path)
    fields = FieldMap(templates={"t": ("f",), "u": ()}, default="t", template_column="kind", columns={"f": "bytes"})
    assert take(path, fields=fields)[1].rows == 2
    assert len(list(read_rows(path.with_name("taken.parquet"), fields, None))) == 2


def test_times_finer_than_microseconds_are_truncated_in_the_prompt_only(path):
    pq.write_table(pa.table({"t": COLUMNS["fine moment"], "s": COLUMNS["struct"]}), path)
    fields = FieldMap(templates={"t": ("t", "s")}, default="t", columns={"t": "t", "s": "s"})
    table, _ = take(path, fields=fields)
    (row, *_) = read_rows(path.with_name("taken.parquet"), fields, None)
    moment = dt.datetime(2023, 11, 14, 22, 13, 20, 123456)
    assert row.values == {"t": moment, "s": {"a": "x", "b": [moment]}}
    assert table["t"].cast(pa.int64())[0].as_py() == NS


def test_a_time_that_python_cannot_hold_names_its_column_only_if_a_template_uses_it(path):
    pq.write_table(pa.table({"when": pa.array([2**58], pa.timestamp("ms"))}), path)
    assert take(path)[1].rows == 1
    fields = FieldMap(templates={"t": ("f",)}, default="t", columns={"f": "when"})
    error = refused(path, fields=fields)
    assert error.where == f"{path}, column when"
    assert "the year 9999" in error.what


def test_categories_of_many_row_groups_keep_their_small_index(path):
    kind = pa.dictionary(pa.int8(), pa.string())
    with pq.ParquetWriter(path, pa.schema([("c", kind)])) as writer:
        for group in range(5):
            words = pa.array([f"{group}-{number}" for number in range(100)])
            writer.write_table(pa.table({"c": words.dictionary_encode().cast(kind)}))
    table, _ = take(path)
    assert table.schema.field("c").type == kind
    assert [str(word) for word in table["c"].cast(pa.string())] == [f"{g}-{n}" for g in range(5) for n in range(100)]


def test_names_of_parquet_columns_are_cleaned_too(path):
    arrays = [pa.array([number]) for number in range(6)]
    pq.write_table(pa.Table.from_arrays(arrays, names=[" a ", "a", "", "gxr_error", "gxr_row_id", "b"]), path)
    seen = look(path)
    assert seen.schema.names == ["a", "a (2)", "column_3", "b"]
    assert len(seen.notices) == 4
    table, _ = take(path)
    assert table.select(seen.schema.names).to_pylist() == [{"a": 0, "a (2)": 1, "column_3": 2, "b": 5}]


def test_a_column_whose_name_contains_a_dot_is_not_taken_for_a_nested_one(path):
    pq.write_table(pa.table({"a": [{"b": "x"}], "a.b": ["y"]}), path)
    fields = FieldMap(templates={"t": ("f", "g")}, default="t", columns={"f": "a", "g": "a.b"})
    take(path, fields=fields)
    (row,) = read_rows(path.with_name("taken.parquet"), fields, None)
    assert row.values == {"f": {"b": "x"}, "g": "y"}


def test_null_values_reach_text_columns_of_every_kind_and_no_others(path):
    words = ["NA", "x", None]
    pq.write_table(
        pa.table(
            {
                "plain": words,
                "large": pa.array(words, pa.large_string()),
                "category": pa.array(words).dictionary_encode(),
                "bytes": pa.array([b"NA", b"x", None]),
                "list": [["NA"], [], None],
            }
        ),
        path,
    )
    before = pq.read_table(path)
    table, _ = take(path, null_values=("NA",))
    for name in ("plain", "large", "category"):
        assert table[name].to_pylist() == [None, "x", None]
        assert table.schema.field(name).type == before.schema.field(name).type
    assert table["bytes"].to_pylist() == [None, b"x", None]
    assert table.schema.field("bytes").type == pa.binary()
    assert table["list"].to_pylist() == [["NA"], [], None]


@pytest.mark.parametrize("content", [CANARY.encode() * 9, b"PAR1" + CANARY.encode() * 9 + b"PAR1"])
def test_a_file_that_is_not_parquet_is_reported_without_the_readers_text(path, content):
    path.write_bytes(content)
    error = refused(path)
    assert error.what == "The file is damaged, truncated, or not Parquet."
    assert error.where == str(path)


def test_a_parquet_file_truncated_anywhere_is_refused(path):
    pq.write_table(pa.table({"a": [CANARY] * 1000, "b": list(range(1000))}), path)
    whole = path.read_bytes()
    for size in range(1, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:size])
        assert "damaged, truncated" in refused(path).what


def test_parquet_with_any_byte_flipped_is_read_or_refused(path):
    pq.write_table(pa.table({"a": [CANARY, "x", None] * 50, "b": [[1], [], None] * 50}), path)
    whole = path.read_bytes()
    for place in range(4, len(whole), 7):
        path.write_bytes(whole[:place] + bytes((whole[place] ^ 0xFF,)) + whole[place + 1 :])
        assert CANARY not in complaint(path)


def complaint(path):
    try:
        take(path)
    except TableError as error:
        return str(error)
    return ""


def test_text_that_is_not_utf8_names_row_and_column(path):
    raw = pa.array([b"fine"] * 40_000 + [CANARY.encode() + b"\xff"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    pq.write_table(pa.table({"number": list(range(len(raw))), "findings": text}), path)
    error = refused(path)
    assert error.where == f"{path}, row 40001, column findings"


def test_one_name_with_two_types_names_column_files_and_types(tmp_path):
    (tmp_path / "a.csv").write_text("age,x\n1,2\n")
    pq.write_table(pa.table({"x": ["y"], "age": [5]}), tmp_path / "b.parquet")
    error = refused(tmp_path / "*.*")
    assert error.what == (f"The column age has two types: string in {tmp_path}/a.csv, int64 in {tmp_path}/b.parquet.")


def test_a_column_without_values_takes_the_type_it_has_in_other_files(tmp_path):
    pq.write_table(pa.table({"x": pa.nulls(2), "y": pa.nulls(2)}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"x": [1], "z": [[1]]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"x": pa.nulls(1), "c": pa.array(["k"]).dictionary_encode()}), tmp_path / "c.parquet")
    table, _ = take(tmp_path / "*.parquet")
    assert table.select(["x", "y", "z", "c"]).to_pydict() == {
        "x": [None, None, 1, None],
        "y": [None] * 4,
        "z": [None, None, [1], None],
        "c": [None, None, None, "k"],
    }
    assert table.schema.field("x").type == pa.int64()


def test_parquet_without_rows_and_without_columns(path):
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), path)
    assert take(path)[1].rows == 0
    pq.write_table(pa.table({}), path)
    assert refused(path).what == "The file has no columns."


def test_a_limit_takes_the_first_rows_of_parquet(path):
    pq.write_table(pa.table({"a": list(range(50_000))}), path)
    assert take(path, limit=40_000)[0]["a"].to_pylist() == list(range(40_000))


def test_rows_of_long_cells_come_in_small_batches(path, tmp_path):
    pq.write_table(pa.table({"a": ["x" * 200_000 + str(number) for number in range(300)]}), path, use_dictionary=False)
    fields = FieldMap(templates={"t": ("f",)}, default="t", columns={"f": "a"})
    target = tmp_path / "t.parquet"
    ingest(look(path), fields, target, id_column="", prior=None, limit=None)
    assert pq.read_metadata(target).num_row_groups > 1
    assert [row.values["f"][200_000:] for row in read_rows(target, fields, None)] == [str(n) for n in range(300)]
