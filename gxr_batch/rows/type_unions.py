"""One type for a column that several files have with different types, if no value loses anything; and the conversion.

What differs harmlessly between the parts of one table is unified: widths of numbers, whole numbers next to floats (a
column with a gap), kinds of text, categories, units of times.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_UNITS = ("s", "ms", "us", "ns")
_DIGITS = {8: 3, 16: 5, 32: 10, 64: 20}  # of the largest integer with this many bits
_UTC = frozenset({"UTC", "Etc/UTC", "Z", "+00:00", "GMT"})


def union(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Return a type that holds every value of both types unchanged, None if there is none.

    Whole numbers next to floats become floats; `converted` refuses a whole number that a float cannot hold.
    """
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if pa.types.is_dictionary(one) or pa.types.is_dictionary(other):
        return union(_decoded(one), _decoded(other))
    for rule in (_texts, _numbers, _times, _lists, _structs):
        if (found := rule(one, other)) is not None:
            return found
    return None


def converted(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Return a column as another type. Raises ArrowInvalid if a value would change."""
    own = column.type
    if own == kind:
        return column
    if pa.types.is_dictionary(own):
        return converted(column.cast(own.value_type), kind)
    if pa.types.is_floating(own) and pa.types.is_floating(kind):
        return pa.chunked_array([_with_the_same_digits(chunk, kind) for chunk in column.chunks], kind)
    return column.cast(kind, safe=True)


def _decoded(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _texts(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    def long(kind: pa.DataType) -> bool:
        return bool(pa.types.is_large_string(kind) or pa.types.is_large_binary(kind))

    def text(kind: pa.DataType) -> bool:
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))

    def raw(kind: pa.DataType) -> bool:
        is_one = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
        return any(check(kind) for check in is_one)

    large = long(one) or long(other)
    if raw(one) and raw(other):
        return pa.large_binary() if large else pa.binary()
    if all(text(kind) or raw(kind) for kind in (one, other)):  # bytes must be UTF-8 then
        return pa.large_string() if large else pa.string()
    return None


def _numbers(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    kinds = (one, other)
    if all(map(pa.types.is_integer, kinds)):
        return _integers(one, other)
    if all(pa.types.is_decimal(kind) or pa.types.is_integer(kind) for kind in kinds):
        scale = max(_scale(kind) for kind in kinds)
        digits = max(_whole_digits(kind) for kind in kinds) + scale
        return pa.decimal128(digits, scale) if digits <= 38 else pa.decimal256(digits, scale) if digits <= 76 else None
    if all(pa.types.is_floating(kind) or pa.types.is_integer(kind) for kind in kinds):
        floats = [kind.bit_width for kind in kinds if pa.types.is_floating(kind)]
        return pa.float64() if len(floats) == 1 or max(floats) == 64 else pa.float32()
    return None


def _integers(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    signed = {8: pa.int8(), 16: pa.int16(), 32: pa.int32(), 64: pa.int64()}
    unsigned = {8: pa.uint8(), 16: pa.uint16(), 32: pa.uint32(), 64: pa.uint64()}
    with_sign = [kind.bit_width for kind in (one, other) if pa.types.is_signed_integer(kind)]
    without = [kind.bit_width for kind in (one, other) if pa.types.is_unsigned_integer(kind)]
    if not with_sign:
        return unsigned[max(without)]
    bits = max([*with_sign, *(2 * width for width in without)])
    return signed.get(bits, pa.decimal128(20, 0))


def _scale(kind: pa.DataType) -> int:
    return int(kind.scale) if pa.types.is_decimal(kind) else 0


def _whole_digits(kind: pa.DataType) -> int:
    return int(kind.precision - kind.scale) if pa.types.is_decimal(kind) else _DIGITS[kind.bit_width]


def _times(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if all(map(pa.types.is_date, (one, other))):
        return pa.date32()
    if all(map(pa.types.is_time, (one, other))):
        unit = _finest(one.unit, other.unit)
        return pa.time64(unit) if unit in {"us", "ns"} else pa.time32(unit)
    if all(map(pa.types.is_duration, (one, other))):
        return pa.duration(_finest(one.unit, other.unit))
    if all(map(pa.types.is_timestamp, (one, other))) and _same_zone(one.tz, other.tz):
        return pa.timestamp(_finest(one.unit, other.unit), one.tz)
    return None


def _same_zone(one: str | None, other: str | None) -> bool:
    return one == other or {one, other} <= _UTC


def _finest(one: str, other: str) -> Any:
    return max(one, other, key=_UNITS.index)


def _lists(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not all(any(is_list(kind) for is_list in lists) for kind in (one, other)):
        return None
    item = union(one.value_type, other.value_type)
    if item is None or not all(_castable(kind.value_type, item) for kind in (one, other)):
        return None
    large = any(map(pa.types.is_large_list, (one, other)))
    return pa.large_list(item) if large else pa.list_(item)


def _structs(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if not all(map(pa.types.is_struct, (one, other))):
        return None
    fields = {field.name: field.type for field in one}
    if fields.keys() != {field.name for field in other} or len(fields) != one.num_fields:
        return None
    members = []
    for field in other:
        member = union(fields[field.name], field.type)
        if member is None or not all(_castable(kind, member) for kind in (fields[field.name], field.type)):
            return None
        members.append((field.name, member))
    order = {name: place for place, name in enumerate(fields)}
    return pa.struct(sorted(members, key=lambda member: order[member[0]]))


def _castable(kind: pa.DataType, target: pa.DataType) -> bool:
    """Return whether Arrow converts the type inside a list or a struct without changing a digit."""
    if kind == target:
        return True
    if pa.types.is_floating(kind) and pa.types.is_floating(target):
        return False
    try:
        pa.array([], kind).cast(target)
    except MemoryError:
        raise
    except pa.ArrowException:
        return False
    return True


def _with_the_same_digits(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return floats as wider ones with the same digits: 1.2 stays 1.2 and is not 1.2000000476837158."""
    valid = column.drop_null()
    short = valid.to_numpy(zero_copy_only=False)
    wide = np.array([float(str(value)) for value in short], np.float64)
    values = pa.array(wide, pa.float64()).cast(kind)
    return pc.replace_with_mask(pa.nulls(len(column), kind), column.is_valid(), values)
