"""JSON Lines as Arrow tables: one object for each line, its members as columns.

The survey reads every line for the columns and their types. Numbers, true and false keep their types if a column has
nothing else; a column of several kinds is text, with each value as the file writes it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from gxr_batch.errors import TableError
from gxr_batch.job import PROMPT_VERSION, InputSection
from gxr_batch.rows.compression import EXTENSIONS
from gxr_batch.rows.encoding import Lines, open_lines, scan, stored_as
from gxr_batch.rows.source_files import Look, NothingInside, Say, SourceFile, changed_error

_ROWS_A_BATCH, _BYTES_A_BATCH = 16_384, 2**23
_EXACT = 2**53  # whole numbers up to here are exact as floats
_INT64 = range(-(2**63), 2**63)
_MOST_MEMBERS = 1000  # names that are data, such as ids, would make a struct of any size


@dataclass(frozen=True, kw_only=True)
class JsonLinesFile(SourceFile):
    """A file of JSON Lines. `members` has the columns' names as written, `compression` how the file is stored."""

    members: tuple[str, ...]
    compression: str = ""

    def own_batches(self, nulls: Collection[str], say: Say) -> Iterator[pa.Table]:
        """Yield the rows as tables of `own_schema`."""
        return batches(self, nulls)


class _Kind(NamedTuple):
    """What the values of a column or a member are: null, blank, bool, int, big, float, str, list, struct or text.

    `blank` is "" and {}, which tell nothing about the column, as does a list without items. `big` are whole numbers
    that are not exact as floats, `text` is any mixture. `item` is the kind of a list's items, `members` those of a
    struct.
    """

    name: str
    item: _Kind | None = None
    members: Mapping[str, _Kind] = {}


_NULL, _BLANK, _INT, _BIG, _FLOAT, _TEXT = map(_Kind, ("null", "blank", "int", "big", "float", "text"))
_NO_ITEMS = _Kind("list", _Kind("nothing"))
_SIMPLE = {type(None): _NULL, bool: _Kind("bool"), float: _FLOAT, str: _Kind("str")}
_WIDER = {frozenset(("int", "float")): _FLOAT, frozenset(("int", "big")): _BIG}


def look(path: Path, section: InputSection, version: int = PROMPT_VERSION) -> Look:
    """Read a whole file and return its columns and their types. Raises TableError.

    Up to version 1 of the rules, an empty value that is not of a column's type made the whole column text.
    """
    compression, notices = stored_as(path)
    encoding, sha256, note, _ = scan(path, section.encoding, compression)
    found: dict[str, _Kind] = {}
    with open_lines(path, encoding, compression) as lines:
        for _, row in _objects(path, lines):
            for name, value in row.items():
                found[name] = _merged(found.get(name, _NULL), _kind(value, version))
    if not found:
        raise NothingInside(
            "The file has no JSON object.",
            where=str(path),
            next_step="it needs one object for each row, each on a line",
        )
    fields = {"encoding": encoding, "members": tuple(found), "compression": compression}
    types = [_type(kind) for kind in found.values()]
    return Look(list(found), types, sha256, JsonLinesFile, fields, (*notices, *([note] if note else [])))


def batches(file: JsonLinesFile, nulls: Collection[str]) -> Iterator[pa.Table]:
    """Yield the rows as tables of `file.own_schema`; text that is empty or one of `nulls` is null."""
    missing = frozenset(nulls) | {""}
    with open_lines(file.path, file.encoding, file.compression) as lines:
        rows: list[dict[str, Any]] = []
        first = taken = 0
        for line, row in _objects(file.path, lines):
            first = first or line
            rows.append(row)
            if len(rows) == _ROWS_A_BATCH or lines.bytes_taken - taken > _BYTES_A_BATCH:
                yield _table(file, rows, missing, first)
                rows, first, taken = [], 0, lines.bytes_taken
        if rows:
            yield _table(file, rows, missing, first)
        if lines.sha256() != file.sha256:
            raise changed_error(file)


def _table(file: JsonLinesFile, rows: list[dict[str, Any]], missing: Collection[str], first: int) -> pa.Table:
    """Return rows as a table; `first` is the line of the first one."""
    schema = file.own_schema
    arrays = []
    try:
        for place, field in zip(file.places, schema, strict=True):
            values = [_fitted(row.get(file.members[place]), field.type) for row in rows]
            if pa.types.is_string(field.type):
                values = [None if value in missing else value for value in values]
            arrays.append(pa.array(values, field.type))
    except UnicodeEncodeError:
        raise TableError(
            "A cell contains half of a surrogate pair, which is not a character.",
            where=f"{file.path}, line {first} or below",
            next_step="fix the cell: it has an escape such as \\ud83d without its second half",
        ) from None
    except MemoryError:
        raise
    except (pa.ArrowException, TypeError, ValueError, OverflowError):  # another value than the survey saw
        raise changed_error(file) from None
    return pa.Table.from_arrays(arrays, schema=schema)


def _objects(path: Path, lines: Lines) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each line's number and object; blank lines are passed over."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_members, parse_constant=_constant)
        except _RepeatedMember:
            raise _refused(path, number, "An object has two members of one name.", "remove or rename one") from None
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise _not_an_object(path, number, line)
        yield number, row


def _not_an_object(path: Path, number: int, line: str) -> TableError:
    if number == 1 and line.lstrip().startswith("["):
        return _refused(
            path,
            number,
            "The file is one JSON array, not JSON Lines.",
            f"write one object to a line: {_jq(path, '.[]')}",
        )
    if number == 1 and line.strip() == "{":
        return _refused(
            path,
            number,
            "The file is JSON with line breaks inside objects, not JSON Lines.",
            f"write one object to a line: {_jq(path, '.')}; if one object holds all rows, replace '.' by '.KEY[]'",
        )
    return _refused(path, number, "The line is not one JSON object.", "each row is one object on one line")


def _jq(path: Path, rows: str) -> str:
    """Return the command that writes a JSON file as JSON Lines next to it."""
    if path.suffix.lower() in EXTENSIONS:
        return f"decompress the file, then jq -c '{rows}' IN > OUT"
    lines = path.with_suffix(".lines.jsonl" if path.suffix.lower() == ".jsonl" else ".jsonl")
    return f"jq -c '{rows}' {shlex.quote(str(path))} > {shlex.quote(str(lines))}"


def _refused(path: Path, number: int, what: str, step: str) -> TableError:
    return TableError(what, where=f"{path}, line {number}", next_step=step)


class _RepeatedMember(Exception):
    pass


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise _RepeatedMember
    return members


def _constant(name: str) -> float | None:
    """Return what NaN and Infinity mean, which Python and pandas write though JSON lacks them."""
    return None if name == "NaN" else float(name)


def _kind(value: Any, version: int) -> _Kind:
    if version > 1 and value in ("", {}, []):
        return _NO_ITEMS if value == [] else _BLANK
    if isinstance(value, list):
        item = _NULL
        for one in value:
            item = _merged(item, _kind(one, version))
        return _Kind("list", item)
    if isinstance(value, dict):
        return _Kind("struct", members={name: _kind(one, version) for name, one in value.items()}) if value else _TEXT
    if type(value) is int:
        return _INT if -_EXACT <= value <= _EXACT else _BIG if value in _INT64 else _TEXT
    return _SIMPLE[type(value)]


def _merged(one: _Kind, other: _Kind) -> _Kind:
    """Return the kind that holds the values of both."""
    if one == other:
        return one
    for empty in (_NULL, _BLANK, _NO_ITEMS):
        if empty in (one, other):
            return other if one == empty else one
    if one.name == other.name == "list":
        return _Kind("list", _merged(one.item or _NULL, other.item or _NULL))
    if one.name == other.name == "struct":
        members = {
            name: _merged(one.members.get(name, _NULL), other.members.get(name, _NULL))
            for name in dict.fromkeys([*one.members, *other.members])
        }
        return _Kind("struct", members=members) if len(members) <= _MOST_MEMBERS else _TEXT
    return _WIDER.get(frozenset((one.name, other.name)), _TEXT)


def _type(kind: _Kind) -> pa.DataType:
    plain = {"null": pa.null(), "bool": pa.bool_(), "int": pa.int64(), "big": pa.int64(), "float": pa.float64()}
    if kind.name == "list":
        item = _type(kind.item or _NULL)
        return pa.list_(pa.string() if pa.types.is_null(item) else item)
    if kind.name == "struct":
        return pa.struct([(name, _type(one)) for name, one in kind.members.items()])
    return plain.get(kind.name, pa.string())


def _fitted(value: Any, kind: pa.DataType) -> Any:
    """Return a value of the column's type; in a column of text everything else is text as JSON writes it.

    In a column of another type, "", {} and [] are null.
    """
    if pa.types.is_string(kind):
        return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, list) and pa.types.is_list(kind):
        return [_fitted(one, kind.value_type) for one in value]
    if value in ("", {}, []):
        return None
    if isinstance(value, dict) and pa.types.is_struct(kind):
        return {field.name: _fitted(value.get(field.name), field.type) for field in kind}
    return value
