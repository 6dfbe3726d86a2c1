"""Types of one column in several files: unified if no value changes, else refused with both files."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tables import refused, take

from gxr_batch.rows.type_unions import converted, union


def read(folder, *columns, **keys):
    for number, column in enumerate(columns):
        pq.write_table(pa.table({"x": column}), folder / f"{number}.parquet")
    return take(folder / "*.parquet", **keys)[0]["x"]


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        (pa.int8(), pa.int64(), pa.int64()),
        (pa.uint8(), pa.int8(), pa.int16()),
        (pa.uint32(), pa.int32(), pa.int64()),
        (pa.uint16(), pa.uint64(), pa.uint64()),
        (pa.uint64(), pa.int8(), pa.decimal128(20, 0)),
        (pa.int64(), pa.float64(), pa.float64()),
        (pa.int8(), pa.float32(), pa.float64()),
        (pa.float16(), pa.float32(), pa.float32()),
        (pa.string(), pa.large_string(), pa.large_string()),
        (pa.string(), pa.binary(), pa.string()),
        (pa.binary(4), pa.large_binary(), pa.large_binary()),
        (pa.dictionary(pa.int8(), pa.string()), pa.large_string(), pa.large_string()),
        (pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int16(), pa.string()), pa.string()),
        (pa.timestamp("s"), pa.timestamp("ns"), pa.timestamp("ns")),
        (pa.timestamp("us", "UTC"), pa.timestamp("ms", "Etc/UTC"), pa.timestamp("us", "UTC")),
        (pa.time32("s"), pa.time64("us"), pa.time64("us")),
        (pa.duration("ms"), pa.duration("us"), pa.duration("us")),
        (pa.date32(), pa.date64(), pa.date32()),
        (pa.decimal128(5, 2), pa.decimal128(10, 1), pa.decimal128(11, 2)),
        (pa.decimal128(5, 2), pa.int32(), pa.decimal128(12, 2)),
        (pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.large_list(pa.int64())),
        (pa.struct([("a", pa.int8())]), pa.struct([("a", pa.int16())]), pa.struct([("a", pa.int16())])),
        (pa.null(), pa.bool_(), pa.bool_()),
        (pa.int64(), pa.string(), None),
        (pa.bool_(), pa.int8(), None),
        (pa.timestamp("s"), pa.timestamp("s", "UTC"), None),
        (pa.timestamp("s", "Europe/Vienna"), pa.timestamp("s", "UTC"), None),
        (pa.date32(), pa.timestamp("s"), None),
        (pa.decimal128(5, 2), pa.float64(), None),
        (pa.list_(pa.float32()), pa.list_(pa.float64()), None),
        (pa.struct([("a", pa.int8())]), pa.struct([("b", pa.int8())]), None),
    ],
)
def test_two_types_have_one_that_holds_both_or_none(one, other, both):
    assert union(one, other) == both
    if both is not None and not pa.types.is_nested(both):
        for kind in (one, other):
            assert converted(pa.chunked_array([pa.nulls(2, kind)]), both).type == both


def test_a_gap_makes_whole_numbers_floats_and_ids_stay_whole(tmp_path):
    pq.write_table(pa.table({"id": [7, 8], "x": [45, 46]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"id": [9.0], "x": pa.array([None], pa.float64())}), tmp_path / "1.parquet")
    table, _ = take(tmp_path / "*.parquet", id_column="id")
    assert table["x"].to_pylist() == [45.0, 46.0, None]
    assert table["gxr_row_id"].to_pylist() == ["7", "8", "9"]


def test_narrow_floats_keep_their_digits(tmp_path):
    values = read(
        tmp_path, pa.array([1.2, None, 0.1], pa.float32()), pa.array([2.3], pa.float64()), pa.array([7], pa.int8())
    )
    assert values.to_pylist() == [1.2, None, 0.1, 2.3, 7.0]


def test_categories_and_texts_and_units_become_one_column(tmp_path):
    assert read(tmp_path, pa.array(["PA"]).dictionary_encode(), pa.array(["AP"], pa.large_string())).to_pylist() == [
        "PA",
        "AP",
    ]
    day = dt.datetime(2024, 5, 31, 12)
    times = read(tmp_path, pa.array([day], pa.timestamp("us")), pa.array([day], pa.timestamp("ns")))
    assert [time.as_py().isoformat() for time in times] == ["2024-05-31T12:00:00"] * 2
    assert read(tmp_path, pa.array([2**64 - 1], pa.uint64()), pa.array([-1])).to_pylist() == [
        Decimal(2**64 - 1),
        Decimal(-1),
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.array([2**53 + 1]), pa.array([0.5])),
        (pa.array(["x"]), pa.array([b"\xff"])),
        (pa.array([dt.datetime(9000, 1, 1)], pa.timestamp("s")), pa.array([0], pa.timestamp("ns"))),
    ],
)
def test_a_value_that_the_common_type_cannot_hold_names_both_files(tmp_path, one, other):
    for number, column in enumerate((one, other)):
        pq.write_table(pa.table({"x": column}), tmp_path / f"{number}.parquet")
    error = refused(tmp_path / "*.parquet")
    assert "The column x has two types" in error.what
    assert f"{tmp_path}/0.parquet" in error.what
    assert f"{tmp_path}/1.parquet" in error.what
