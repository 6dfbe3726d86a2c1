"""Cells as Python values and as text, as a person reads them, and what a spreadsheet must not run or cannot hold.

`values_of` reads a column for exports, `prompt_values_of` for templates. A number of 16 or 32 bits has the shortest
digits that mean the same number, not the noise of its binary form. In prompts, bytes that are UTF-8 are text, lists are
`Items`, structs `Record`s, and maps `Pairs`.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# What may start a formula, a command or a field in a spreadsheet (OWASP's list), full-width forms included.
FORMULA_STARTS = frozenset("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
# Excel's limits for one cell: UTF-16 units, and line feeds above which it reports the file as damaged.
MOST_UNITS, MOST_LINE_FEEDS = 32_767, 253
CUT_MARK = " […cut: the whole text stands in results.parquet]"
_LINE_MARK = " ⏎ "
MOST_QUOTED = 80  # characters of a foreign name in a message
# Characters that XML 1.0 does not allow: control characters, lone surrogates, two non-characters.
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
# What could move the cursor, hide text or reverse it: C0 and C1 controls, direction marks, lone surrogates.
_NOT_TERMINAL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u061c\u2028\u2029\ufeff\u2066-\u2069\U000e0000-\U000e007f\ud800-\udfff]"
)

_WHOLE = 10**15  # a larger float is a magnitude, not a whole number
_UNREADABLE = "<value out of range>"
# Control characters that bytes of text may have: tabs and line ends.
_NOT_BYTES_OF_TEXT = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
# A number with more digits is not exact in a spreadsheet.
_EXACT_DIGITS = 15

Convert = Callable[[Any], Any]


class NotText(ValueError):
    """Bytes that are not text fill a field."""


class Items(list[Any]):
    """A list cell in a prompt, without its missing items. As text, the items are joined with "; "."""

    def __str__(self) -> str:
        return "; ".join(str(printed(item)).strip() for item in self)


class Record(dict[str, Any]):
    """A struct cell in a prompt. As text, for screening and flags, its members are joined with "; "."""

    def __str__(self) -> str:
        return "; ".join(str(printed(value)) for value in self.values() if not _missing(value))


class Pairs(list[tuple[Any, Any]]):
    """A map cell in a prompt: pairs of key and value, and the value of a key, None if the map lacks it."""

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int | slice):
            return super().__getitem__(key)
        return dict(self).get(key)

    def items(self) -> list[tuple[Any, Any]]:
        """Return the pairs, as of a dict."""
        return list(self)

    def __str__(self) -> str:
        return "; ".join(str(printed(value)) for _, value in self if not _missing(value))


class CellText(NamedTuple):
    """A text that one cell of a workbook can hold; `cut` if some of it was removed."""

    text: str
    cut: bool = False


def printed(value: Any) -> Any:
    """Return a value as a prompt shows it: whole numbers without ".0", no exponents in decimals, "" for missing."""
    if value is None:
        return ""
    if isinstance(value, float):
        return str(int(value)) if math.isfinite(value) and abs(value) < _WHOLE and value == int(value) else value
    if isinstance(value, Decimal) and value.is_finite():
        return str(int(value)) if value == value.to_integral_value() else format(value, "f")
    if isinstance(value, timedelta) and value < timedelta(0):
        return f"-{-value}"
    return value


def as_text(value: Any) -> str:
    """Return a cell's text in exports: empty for null, ISO for times, JSON for lists and bytes that are not text."""
    if value is None or value == []:
        return ""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="microseconds" if value.microsecond % 1000 else "milliseconds")
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=_in_json)
    return _readable(value)


def _readable(value: Any) -> str:
    if isinstance(value, bytes):
        text = text_of(value)
        return json.dumps(plain(value)) if text is None else text
    if isinstance(value, Decimal):
        return format(value, "f")
    return plain(printed(value)) if isinstance(value, timedelta) else plain(value)


def _in_json(value: Any) -> str:
    return text_of(value) or plain(value) if isinstance(value, bytes) else _readable(value)


def text_of(value: bytes) -> str | None:
    """Return the text that UTF-8 bytes hold, without the zeros that fill a fixed width; None if they hold none."""
    try:
        text = value.rstrip(b"\0").decode()
    except UnicodeDecodeError:
        return None
    return None if _NOT_BYTES_OF_TEXT.search(text) or (value and not text) else text


def plain(value: Any) -> str:
    """Return a value that JSON lacks as text: bytes in base64, times in ISO form, anything else as Python prints it."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if isinstance(value, date | time | datetime) else str(value)


def values_of(column: pa.ChunkedArray | pa.Array) -> list[Any]:
    """Return a column as Python values for exports: bytes and lists as they are, short digits, no type of pandas."""
    return _values(column, as_prompt=False)


def prompt_values_of(column: pa.ChunkedArray | pa.Array) -> list[Any]:
    """Return a column as templates get it: bytes as text, lists as Items, structs as Records, maps as Pairs.

    Raises NotText for other bytes, and ValueError, OverflowError or ArrowException for times that Python lacks.
    """
    return _values(column, as_prompt=True)


def rows_of(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table for exports, with the values of `values_of`."""
    columns = [values_of(column) for column in table.columns]
    yield from (dict(zip(table.column_names, cells, strict=True)) for cells in zip(*columns, strict=True))


def _values(column: pa.ChunkedArray | pa.Array, *, as_prompt: bool) -> list[Any]:
    column = _stored(column)
    try:
        plain_kind = _plain(column.type)
        if plain_kind != column.type:
            column = column.cast(plain_kind, safe=False)
    except pa.ArrowNotImplementedError:
        pass  # Arrow cannot convert every nested type; `convert` does it cell by cell
    if pa.types.is_float32(column.type):
        return _shortest(column)
    convert = _converter(column.type, as_prompt)
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError):
        if as_prompt:
            raise
        values = [_one(cell) for cell in column]
    return values if convert is None else [None if value is None else convert(value) for value in values]


def _one(cell: pa.Scalar) -> Any:
    """Return a cell of a column that has values which Python cannot hold."""
    try:
        return cell.as_py()
    except (ValueError, OverflowError):
        return _UNREADABLE


def _stored(column: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """Return a column without run-length encoding, and without an extension type whose values are storage values."""
    kind = column.type
    if pa.types.is_run_end_encoded(kind):
        return _stored(pc.run_end_decode(column))
    if not isinstance(kind, pa.BaseExtensionType) or isinstance(kind, _READABLE_EXTENSIONS):
        return column
    if isinstance(column, pa.ChunkedArray):
        return _stored(pa.chunked_array([chunk.storage for chunk in column.chunks], kind.storage_type))
    return _stored(column.storage)


# Their Python values are what a person reads: UUID and bool.
_READABLE_EXTENSIONS = (pa.UuidType, pa.Bool8Type)


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return the type without dictionaries, and with nanoseconds as microseconds, the resolution of Python's times."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_nested(kind):
        return _plain_nested(kind)
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    return pa.time64("us") if pa.types.is_time64(kind) else kind


def _plain_nested(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_plain(kind.key_type), kind.item_field.with_type(_plain(kind.item_type)))
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_plain(kind.value_type)))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)), kind.list_size)
    return kind


def _shortest(column: pa.ChunkedArray | pa.Array) -> list[Any]:
    """Return 32-bit numbers as floats with the shortest digits; whole numbers are exact."""
    exact = column.cast(pa.float64())
    short = column.cast(pa.string()).cast(pa.float64())
    whole = pc.and_(pc.equal(pc.trunc(exact), exact), pc.less(pc.abs(exact), _WHOLE))
    values: list[Any] = pc.if_else(whole, exact, short).to_pylist()
    return values


def _short(value: float, kind: type[np.floating[Any]]) -> float:
    whole = value.is_integer() and abs(value) < _WHOLE
    return value if whole or not math.isfinite(value) else float(str(kind(value)))


def _converter(kind: pa.DataType, as_prompt: bool) -> Convert | None:
    """Return what makes a value of `to_pylist` readable; None if nothing does."""
    types = pa.types
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _converter(kind.value_type, as_prompt)
    if isinstance(kind, pa.BaseExtensionType) and not isinstance(kind, _READABLE_EXTENSIONS):
        return _converter(kind.storage_type, as_prompt)
    makers: tuple[tuple[Callable[[pa.DataType], bool], Callable[[], Convert | None]], ...] = (
        (types.is_float32, lambda: lambda value: _short(value, np.float32)),
        (types.is_float16, lambda: lambda value: _short(value, np.float16)),
        (types.is_temporal, lambda: _pythons),
        (is_bytes, lambda: _text_or_raise if as_prompt else None),
        (types.is_struct, lambda: _struct_converter(kind, as_prompt)),
        (types.is_map, lambda: _map_converter(kind, as_prompt)),
        (is_list, lambda: _list_converter(kind, as_prompt)),
    )
    return next((make() for is_kind, make in makers if is_kind(kind)), None)


def _struct_converter(kind: pa.StructType, as_prompt: bool) -> Convert:
    members = {field.name: _converter(field.type, as_prompt) for field in kind}
    made = Record if as_prompt else dict
    return lambda value: made({name: _converted(member, members.get(name)) for name, member in value.items()})


def _map_converter(kind: pa.MapType, as_prompt: bool) -> Convert:
    key, item = _converter(kind.key_type, as_prompt), _converter(kind.item_type, as_prompt)
    made = Pairs if as_prompt else list
    return lambda value: made([(_converted(name, key), _converted(one, item)) for name, one in value])


def _list_converter(kind: pa.DataType, as_prompt: bool) -> Convert | None:
    inner = _converter(kind.value_type, as_prompt)
    if not as_prompt:
        return None if inner is None else lambda value: [_converted(one, inner) for one in value]

    def items(value: list[Any]) -> Items | None:
        kept = Items([one for one in (_converted(one, inner) for one in value) if not _missing(one)])
        return kept if str(kept) else None

    return items


def _converted(value: Any, convert: Convert | None) -> Any:
    return value if value is None or convert is None else convert(value)


def _missing(value: Any) -> bool:
    """Return whether an item or a member is missing: null, blank, or not a number (NaN)."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text_or_raise(value: bytes) -> str | None:
    text = text_of(value)
    if text is None:
        raise NotText
    return text or None


def _pythons(value: Any) -> Any:
    """Return a time or a duration of pandas, which Arrow makes of nanoseconds, as Python's own type."""
    if isinstance(value, datetime) and hasattr(value, "to_pydatetime"):
        return value.to_pydatetime(warn=False)
    return value.to_pytimedelta() if hasattr(value, "to_pytimedelta") else value


def is_list(kind: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's list types."""
    types = pa.types
    return bool(
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )


def is_text(kind: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's text types."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_bytes(kind: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's binary types."""
    types = pa.types
    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )


def exact_number(value: Any) -> float | str | None:
    """Return a number as a spreadsheet holds it, as text if it has more digits than a spreadsheet keeps."""
    if value is None or isinstance(value, float):
        return value
    number = Decimal(value)
    digits = len(number.normalize().as_tuple().digits)
    if abs(number) >= _WHOLE or digits > _EXACT_DIGITS:
        return as_text(value)
    return float(value)


def is_number(kind: pa.DataType) -> bool:
    """Return whether cells of this type are numbers, which no spreadsheet reads as a formula."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def is_unicode(text: str) -> bool:
    """Return whether a text has no half of a surrogate pair, which is no character and cannot be written to a file."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def for_terminal(text: str) -> str:
    """Return the text with control characters and direction marks as escapes such as \\x1b; lines and tabs stay."""
    return _escaped(text.replace("\r\n", "\n"))


def _escaped(text: str) -> str:
    return _NOT_TERMINAL.sub(lambda sign: sign[0].encode("unicode_escape").decode("ascii"), text)


def quoted(name: object) -> str:
    """Return a foreign name as messages show it: on one line, control characters as escapes, cut to 80 characters.

    For names that others choose: row ids, columns, sheets, keys, hosts, users. A Path is not cut, because it must lead
    to its file.
    """
    text, whole = str(name), isinstance(name, PurePath)
    text = text if whole else text[: MOST_QUOTED + 1]  # escaping a megabyte takes time
    if not text.isprintable():
        text = _escaped(text).replace("\n", r"\n").replace("\t", r"\t")
    return text if whole or len(text) <= MOST_QUOTED else f"{text[: MOST_QUOTED - 1]}…"


def in_json(line: str) -> str:
    """Return JSON of the same value in which no character can control the terminal of a person who looks at it."""
    if line.isprintable():
        return line
    return _NOT_TERMINAL.sub(lambda sign: json.dumps(sign[0])[1:-1], line)


def in_xml(text: str) -> str:
    """Return the text with a replacement character for each one that XML does not allow."""
    return _NOT_XML.sub("\ufffd", text)


def guard(text: str) -> str:
    """Return the text so that no spreadsheet runs it."""
    return f"'{text}" if text.lstrip(" \u00a0\u3000")[:1] in FORMULA_STARTS and text else text


def unguard(text: str) -> str:
    """Return a text without the apostrophe that `guard` adds."""
    return text[1:] if text[:1] == "'" and guard(text[1:]) == text else text


def for_workbook(text: str) -> CellText:
    """Return the text as one cell of a workbook can hold it: line ends as LF, only XML characters, within limits."""
    if text.isascii() and text.isprintable() and len(text) <= MOST_UNITS and not text.startswith("<r>"):
        return CellText(text)
    text = in_xml(text.replace("\r\n", "\n").replace("\r", "\n"))
    if text.startswith("<r>"):  # the workbook writer would read it as markup
        text = f" {text}"
    feeds = text.count("\n")
    if feeds > MOST_LINE_FEEDS:
        lines = text.split("\n")
        text = "\n".join(lines[:MOST_LINE_FEEDS]) + _LINE_MARK + _LINE_MARK.join(lines[MOST_LINE_FEEDS:])
    if _units(text) <= MOST_UNITS:
        return CellText(text, cut=feeds > MOST_LINE_FEEDS)
    limit = MOST_UNITS - _units(CUT_MARK)
    kept = text.encode("utf-16-le")[: 2 * limit].decode(
        "utf-16-le", "ignore"
    )  # half a surrogate pair at the end is dropped
    return CellText(kept + CUT_MARK, cut=True)


def _units(text: str) -> int:
    return len(text) + sum(character > "\uffff" for character in text) if not text.isascii() else len(text)
