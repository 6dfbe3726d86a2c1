"""Which cells of a row its template uses, as Python values, and the content hash over them.

The content hash is the sha256 of canonical JSON: sorted keys, no blanks, no escapes beyond what JSON needs. Values that
JSON lacks stand in it as text: times in ISO form, bytes in base64, anything else as Python prints it.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any

import pyarrow as pa

from gxr_batch.errors import TableError


@dataclass(frozen=True, kw_only=True)
class FieldMap:
    """Which columns fill which fields of which templates.

    `templates` maps a template's name to the fields that it uses, `columns` a field to the column that fills it (only
    fields that have one). A row's template is named in its cell of `template_column`; `default` where there is no such
    column or the cell is blank. `columns` never maps to a column that the table lacks.
    """

    templates: Mapping[str, tuple[str, ...]]
    default: str
    template_column: str = ""
    columns: Mapping[str, str]

    def used(self) -> tuple[str, ...]:
        """Return the fields of any template that have a column, sorted."""
        fields = {field for names in self.templates.values() for field in names}
        return tuple(sorted(fields & self.columns.keys()))

    def needed_columns(self) -> list[str]:
        """Return the columns that fill a field or name a template, each once."""
        named = [self.template_column] if self.template_column else []
        return list(dict.fromkeys(named + [self.columns[field] for field in self.used()]))

    def template_names(self, table: pa.Table) -> list[str]:
        """Return the name of each row's template; it need not be one that exists."""
        if not self.template_column:
            return [self.default] * table.num_rows
        cells = python_values(table, self.template_column)
        return [str(cell).strip() or self.default if cell is not None else self.default for cell in cells]


def python_values(table: pa.Table, column: str) -> list[Any]:
    """Return a column as Python values. Times finer than a microsecond are cut to it.

    Raises TableError for times that Python cannot hold, and for text that is not UTF-8.
    """
    cells = table[column]
    plain = _plain(cells.type)
    try:
        if plain != cells.type:
            cells = cells.cast(plain, safe=False)
        values: list[Any] = cells.to_pylist()
    except (ValueError, OverflowError, LookupError, pa.ArrowException):
        raise TableError(
            f"The column {column} holds a value that cannot be put into a prompt, such as a time after the year 9999.",
            where=f"column {column}",
            next_step="write the column as text",
        ) from None
    return values


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return the type with nanoseconds made microseconds, where Python's own times end, and dictionaries undone."""
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


class ContentHasher:
    """Hashes the content of rows, column by column."""

    def __init__(self, fields: FieldMap) -> None:
        self._fields = fields
        self._used = fields.used()
        self._plans: dict[str, tuple[str, tuple[str, ...]]] = {}

    def hashes(self, table: pa.Table) -> list[str]:
        """Return each row's content hash, 64 hex digits."""
        columns = {field: _json_texts(python_values(table, self._fields.columns[field])) for field in self._used}
        names = self._fields.template_names(table)
        rows = {name: self._rows(name, columns, table.num_rows) for name in dict.fromkeys(names)}
        sha256 = hashlib.sha256
        return [sha256(rows[name][number].encode()).hexdigest() for number, name in enumerate(names)]

    def _rows(self, name: str, columns: Mapping[str, Sequence[str]], size: int) -> list[str]:
        """Return the canonical JSON that every row would have under a template."""
        form, fields = self._plan(name)
        if not fields:
            return [form % ()] * size
        return [form % cells for cells in zip(*(columns[field] for field in fields), strict=True)]

    def _plan(self, name: str) -> tuple[str, tuple[str, ...]]:
        """Return the JSON of a template's rows with a %s for each cell, and the fields of these cells."""
        fields = tuple(field for field in self._used if field in self._fields.templates.get(name, ()))
        members = [f"{encode_basestring(field)}:".replace("%", "%%") + "%s" for field in fields]
        if self._fields.template_column:
            members.insert(0, f'"":{encode_basestring(name)}'.replace("%", "%%"))  # the empty key sorts first
        return "{" + ",".join(members) + "}", fields


def _json_texts(values: list[Any]) -> list[str]:
    """Return each value's canonical JSON."""
    quote = encode_basestring
    return [
        "null" if value is None else quote(value) if type(value) is str else canonical_json(value) for value in values
    ]


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_as_text)


def _as_text(value: Any) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    return str(value)
