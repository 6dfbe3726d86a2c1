"""Cells as a person reads them, over every Arrow type: in prompts, in exports, and in the content hash."""

from __future__ import annotations

import base64
import datetime as dt
import json
import math
import uuid
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gxr_batch.cells import (
    MOST_QUOTED,
    NotText,
    Pairs,
    Record,
    as_text,
    exact_number,
    printed,
    prompt_values_of,
    quoted,
    values_of,
)
from gxr_batch.rows.columns import FieldMap
from gxr_batch.rows.ids import ContentHasher

DAY, CLOCK = dt.date(2024, 2, 29), dt.time(7, 5, 3, 120)
MOMENT, LENGTH = dt.datetime(2024, 2, 29, 7, 5, 3, 120), dt.timedelta(hours=26, microseconds=7)
WORDS = ["clear lungs", "x", "", " ", "é\n;"]
LEAVES: list[tuple[pa.DataType, list]] = [
    (pa.null(), []),
    (pa.bool_(), [True, False]),
    *((kind, [0, 1, 100]) for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint64())),
    (pa.int64(), [10**15, -(2**63), 2**63 - 1]),
    (pa.float16(), [1.2001953125, 45.0, 65504.0, math.nan, math.inf]),
    (pa.float32(), [1.2, 63.5, 45.0, 1e20, 1e-7, 16777216.0, -0.0, math.nan, -math.inf]),
    (pa.float64(), [1.2, 63.5, 45.0, 1e20, 1e-7, math.nan]),
    *((kind, WORDS) for kind in (pa.string(), pa.large_string(), pa.string_view())),
    *((kind, [one.encode() for one in WORDS]) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())),
    (pa.binary(4), [b"abcd", b"F\0\0\0"]),
    (pa.decimal32(7, 2), [Decimal("1.50"), Decimal("45.00")]),
    (pa.decimal64(12, 9), [Decimal("0.000000001"), Decimal("1.5")]),
    (pa.decimal128(25, 2), [Decimal("12345678901234567890.00"), Decimal("0.10"), Decimal("2.00")]),
    (pa.decimal256(60, 3), [Decimal("12345678901234567890123.125")]),
    (pa.date32(), [DAY]),
    (pa.date64(), [DAY]),
    *((kind, [CLOCK.replace(microsecond=0)]) for kind in (pa.time32("s"), pa.time32("ms"))),
    *((kind, [CLOCK]) for kind in (pa.time64("us"), pa.time64("ns"))),
    *((pa.timestamp(unit), [MOMENT.replace(microsecond=0)]) for unit in ("s", "ms", "us", "ns")),
    *((pa.timestamp(unit, "Europe/Berlin"), [MOMENT.replace(tzinfo=dt.UTC)]) for unit in ("us", "ns")),
    *((pa.duration(unit), [dt.timedelta(seconds=9), -dt.timedelta(seconds=9)]) for unit in ("s", "ms", "us", "ns")),
    (pa.duration("us"), [LENGTH]),
]  # fmt: skip


def columns(values_each: int = 3):
    """Columns of every Arrow type: the leaves, and lists, structs, maps, dictionaries and run lengths of them."""
    leaf = st.sampled_from(LEAVES).map(
        lambda one: (one[0], st.none() | (st.sampled_from(one[1]) if one[1] else st.none()))
    )

    def nested(inner):
        def lists(one):
            kind, value = one
            many = st.none() | st.lists(value, max_size=3)
            fixed = (pa.list_(kind, 2), st.none() | st.lists(value, min_size=2, max_size=2))
            return st.sampled_from(
                [(pa.list_(kind), many), (pa.large_list(kind), many), (pa.list_view(kind), many), fixed]
            )

        def struct(pair):
            (one, value), (other, more) = pair
            made = st.none() | st.fixed_dictionaries({"a": value, "b": more})
            return pa.struct([("a", one), ("b", other)]), made

        def mapped(one):
            made = st.none() | st.lists(st.tuples(st.sampled_from(["k", "l"]), one[1]), max_size=2)
            return pa.map_(pa.string(), one[0]), made

        return inner.flatmap(lists) | st.tuples(inner, inner).map(struct) | inner.map(mapped)

    kinds = st.recursive(leaf, nested, max_leaves=3)
    return kinds.flatmap(
        lambda one: st.lists(one[1], min_size=1, max_size=values_each).map(lambda cells: (one[0], cells))
    )


def made(kind: pa.DataType, cells: list) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(cells, kind, from_pandas=False)])


def insides(value):
    yield value
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from insides(one)


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(columns())
def test_every_type_is_readable_in_prompts_and_in_exports(column):
    kind, cells = column
    try:
        array = made(kind, cells)
    except pa.ArrowNotImplementedError:  # Arrow cannot make a view of every type
        return
    for value in prompt_values_of(array):
        for one in insides(value):
            assert type(one).__module__.split(".")[0] not in {"pandas", "numpy", "pyarrow"}
            assert not isinstance(one, bytes)
        shown = str(printed(value))
        if not isinstance(value, str | Record | Pairs):
            assert not any(sign in shown for sign in ("b'", "[", "(", "{", "None")), shown
    for value in values_of(array):
        assert isinstance(as_text(value), str)
        assert not any(type(one).__module__.startswith("pandas") for one in insides(value))


def earlier(kind: pa.DataType, cells: list) -> list:
    """What version 0.1 at format 2 made of a column: casts without nanoseconds, then Arrow's own Python values."""

    def plain(kind):
        if pa.types.is_struct(kind):
            return pa.struct([field.with_type(plain(field.type)) for field in kind])
        if pa.types.is_map(kind):
            return pa.map_(plain(kind.key_type), kind.item_field.with_type(plain(kind.item_type)))
        for is_list, make in ((pa.types.is_list, pa.list_), (pa.types.is_large_list, pa.large_list)):
            if is_list(kind):
                return make(kind.value_field.with_type(plain(kind.value_type)))
        if pa.types.is_timestamp(kind) and kind.unit == "ns":
            return pa.timestamp("us", kind.tz)
        if pa.types.is_duration(kind) and kind.unit == "ns":
            return pa.duration("us")
        return pa.time64("us") if pa.types.is_time64(kind) else kind

    return made(kind, cells).cast(plain(kind), safe=False).to_pylist()


def earlier_form(value) -> str:
    """How a prompt of that version showed a value; a blank one was missing, as now."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    fractional = isinstance(value, float | Decimal) and math.isfinite(value)
    if fractional and abs(value) < 10**15 and value == int(value):
        return str(int(value))
    return str(value).strip()


def earlier_hash(value) -> str:
    import hashlib

    def text(one):
        if isinstance(one, bytes):
            return base64.b64encode(one).decode()
        return one.isoformat() if isinstance(one, dt.date | dt.time) else str(one)

    made = json.dumps({"f": value}, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=text)
    return hashlib.sha256(made.encode()).hexdigest()


FIELDS = FieldMap(templates={"t": ("f",)}, default="t", columns={"f": "f"})


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(columns())
def test_a_cell_has_another_hash_than_before_if_and_only_if_a_prompt_shows_it_otherwise(column):
    kind, cells = column
    try:
        before = earlier(kind, cells)
    except (pa.ArrowException, ValueError):  # refused then
        return
    if pa.types.is_struct(kind) or pa.types.is_map(kind) or "struct" in str(kind) or "map" in str(kind):
        return  # cannot be printed; the members are tested as columns
    array = made(kind, cells)
    hashes = ContentHasher(FIELDS).hashes(pa.table({"f": array}))
    for old, new, content in zip(before, prompt_values_of(array), hashes, strict=True):
        now = "" if isinstance(new, float) and math.isnan(new) else str(printed(new)).strip()
        assert (content == earlier_hash(old)) == (now == earlier_form(old)), (old, new)


@given(st.floats(width=32, allow_nan=False))
def test_a_32_bit_number_has_the_shortest_digits_that_mean_it(value):
    (shown,) = prompt_values_of(made(pa.float32(), [value]))
    assert np.float32(shown) == np.float32(value)
    if abs(value) >= 10**15 or value != int(value):
        assert len(repr(shown)) <= len(repr(float(str(np.float32(value)))))


@given(st.floats(width=16, allow_nan=False))
def test_a_16_bit_number_has_the_shortest_digits_that_mean_it(value):
    (shown,) = prompt_values_of(made(pa.float16(), [value]))
    assert np.float16(shown) == np.float16(value)


@pytest.mark.parametrize(
    ("kind", "cell", "words"),
    [
        (pa.float32(), 1.2, "1.2"),
        (pa.float16(), 3.4, "3.4"),
        (pa.float32(), 45.0, "45"),
        (pa.binary(), b"Clear lungs", "Clear lungs"),
        (pa.binary(4), b"F\0\0\0", "F"),
        (pa.binary(), b"", ""),
        (pa.list_(pa.string()), ["Left effusion", None, " ", "nodule"], "Left effusion; nodule"),
        (pa.list_(pa.float32()), [1.2, 3.0], "1.2; 3"),
        (pa.list_(pa.list_(pa.string())), [["a", "b"], [], ["c"]], "a; b; c"),
        (pa.list_(pa.string()), [], ""),
        (pa.list_(pa.string()), [None, ""], ""),
        (pa.decimal128(20, 10), Decimal("0.0000001000"), "0.0000001000"),
        (pa.decimal128(25, 2), Decimal("12345678901234567890.00"), "12345678901234567890"),
        (pa.duration("s"), -dt.timedelta(seconds=90), "-0:01:30"),
        (pa.date32(), DAY, "2024-02-29"),
        (pa.timestamp("ns"), MOMENT, "2024-02-29 07:05:03.000120"),
    ],
)
def test_a_prompt_shows_a_cell_as_a_person_reads_it(kind, cell, words):
    (value,) = prompt_values_of(made(kind, [cell]))
    assert str(printed(value)) == words


def test_dictionaries_run_lengths_and_extension_types_are_read_as_their_values():
    words = pa.array(["a", "b", None])
    assert prompt_values_of(words.dictionary_encode()) == ["a", "b", None]
    assert prompt_values_of(pa.array([1.2], pa.float32()).dictionary_encode()) == [1.2]
    assert prompt_values_of(pa.RunEndEncodedArray.from_arrays([2, 3], words.slice(0, 2))) == ["a", "a", "b"]
    kind = pa.list_(pa.dictionary(pa.int8(), pa.string()))
    assert prompt_values_of(pa.array([["a", "b"]], kind)) == [["a", "b"]]
    some = uuid.UUID(int=5)
    stored = pa.array([some.bytes], pa.binary(16))
    assert [str(one) for one in prompt_values_of(pa.ExtensionArray.from_storage(pa.uuid(), stored))] == [str(some)]


@pytest.mark.parametrize("cell", [b"\xff\xd8\xff\xe0", b"\0\x01", "é".encode("latin-1")])
def test_bytes_that_are_no_text_cannot_fill_a_field_and_are_base64_in_exports(cell):
    with pytest.raises(NotText):
        prompt_values_of(made(pa.binary(), [cell]))
    assert as_text(values_of(made(pa.binary(), [cell]))[0]) == json.dumps(base64.b64encode(cell).decode())


def test_lists_stay_json_in_exports_with_short_digits_and_readable_bytes():
    assert as_text(values_of(made(pa.list_(pa.float32()), [[1.2, None]]))[0]) == "[1.2, null]"
    assert as_text(values_of(made(pa.list_(pa.binary()), [[b"clear", b"\xff"]]))[0]) == '["clear", "/w=="]'


def test_times_that_python_cannot_hold_end_no_export():
    assert values_of(pa.chunked_array([pa.array([2**58, 0], pa.timestamp("ms"))]))[1] == dt.datetime(1970, 1, 1)
    assert as_text(values_of(pa.chunked_array([pa.array([2**62], pa.duration("s"))]))[0]) == "<value out of range>"


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        (12, 12.0),
        (999_999_999_999_999, 999_999_999_999_999.0),
        (1_234_567_890_123_456, "1234567890123456"),
        (-(2**63), str(-(2**63))),
        (Decimal("1.50"), 1.5),
        (Decimal("1234567890.1234567"), "1234567890.1234567"),
        (Decimal("0.0000000000000000001"), 1e-19),
        (1.5, 1.5),
        (None, None),
    ],
)
def test_a_number_with_more_digits_than_a_workbook_keeps_is_text_there(value, cell):
    assert exact_number(value) == cell
    assert type(exact_number(value)) is type(cell)


def test_a_map_is_pairs_and_keys():
    (cell,) = prompt_values_of(made(pa.map_(pa.string(), pa.int8()), [[("Edema", 1), ("Nodule", 0)]]))
    assert (cell["Edema"], cell["Mass"], cell[0], list(cell.items())) == (1, None, ("Edema", 1), [*cell])


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("TC-0001", "TC-0001"),
        ("Größe 日本", "Größe 日本"),
        (7, "7"),
        ("a\x1b]0;x\x07b", r"a\x1b]0;x\x07b"),
        ("a\r\nb\tc\n", r"a\r\nb\tc\n"),
        ("a\u202eb\x9bc\ud800", r"a\u202eb\x9bc\ud800"),
        ("", ""),
    ],
)
def test_a_foreign_name_is_one_line_without_control_characters(name, shown):
    assert quoted(name) == shown


def test_a_long_foreign_name_is_cut_and_a_path_is_not():
    assert quoted("x" * 80) == "x" * 80
    assert quoted("x" * 10**6) == "x" * 79 + "…"
    assert len(quoted("\x1b" * 10**6)) == MOST_QUOTED
    assert quoted(Path("/a" * 100 + "\n")) == "/a" * 100 + r"\n"
