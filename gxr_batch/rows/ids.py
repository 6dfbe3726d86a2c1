"""Row ids and content hashes. An id is the cell's text or the content's hash, made unique if it repeats, and kept.

The content hash is the sha256 of canonical JSON: sorted keys, no spaces, no escapes beyond what JSON needs. It covers
what a prompt shows: values that JSON lacks are written as text, times in ISO form, anything else as in a prompt. What a
prompt shows as it did in earlier versions has the hash that it had, and anything else has another one. Whole numbers
keep their hash if their column turns from integers to floats.
Rows with the same id form a family: A, A#2, A#3. Content decides which row gets which id: first the previous table,
then the order of the content hashes, never the position. A generated id never equals an id in a cell.
Only the ids of such families are held as text. Of every other id, memory holds 64 bits, enough to find ids that may
repeat; the texts stay in the file.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import json
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import chain, count, groupby
from json.encoder import encode_basestring
from math import isnan
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gxr_batch.cells import Items, printed, quoted
from gxr_batch.disk import parquet_file, table_copy
from gxr_batch.errors import TableError
from gxr_batch.files import DEEPEST, json_object
from gxr_batch.rows.columns import FieldMap, prompt_values, python_values

DERIVED_DIGITS = 16
_WHOLE = 10**15
# Numbers have at most this many digits; longer ones are ids.
_SUFFIX = r"#([2-9]|[1-9][0-9]{1,8})$"
_ROWS_A_BATCH = 65_536

Whole = Literal["int", "float"]
# In the metadata of input.parquet: columns whose whole numbers are hashed as those of another type.
_WHOLE_NUMBERS = b"gxr_whole_numbers"

Mask = npt.NDArray[np.bool_]
Marks = npt.NDArray[np.int64]


class ContentHasher:
    """Computes the content hashes of rows, column by column.

    `whole` names columns whose whole numbers are hashed as "int" or "float", whatever the type of the column is now.
    """

    def __init__(self, fields: FieldMap, whole: Mapping[str, Whole] | None = None) -> None:
        self._fields, self._whole = fields, whole or {}
        self._used = fields.used()
        self._plans: dict[str, tuple[str, tuple[str, ...]]] = {}

    def hashes(self, table: pa.Table) -> list[str]:
        """Return each row's content hash, 64 hex digits."""
        names = self._fields.template_names(table)
        used = self._fields.used_by(dict.fromkeys(names))
        columns = {field: _json_texts(self._values(table, self._fields.columns[field])) for field in used}
        rows = {name: self._rows(name, columns, table.num_rows) for name in dict.fromkeys(names)}
        sha256 = hashlib.sha256
        return [sha256(rows[name][number].encode()).hexdigest() for number, name in enumerate(names)]

    def _values(self, table: pa.Table, column: str) -> list[Any]:
        values, whole = prompt_values(table, column), self._whole.get(column)
        if whole == "int":
            return [int(one) if type(one) is float and one.is_integer() else one for one in values]
        return [float(one) if type(one) is int else one for one in values] if whole == "float" else values

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
    """Return the canonical JSON of a value."""
    marked = _marked(value) if isinstance(value, list | dict) else value
    return json.dumps(marked, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_as_text)


def _marked(value: Any) -> Any:
    """Return a nested value with its lists marked: earlier versions showed them in another form."""
    if isinstance(value, dict):
        return {name: _marked(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        items = [_marked(one) for one in value]
        return {"; ": items} if isinstance(value, Items) else items
    return value


def _as_text(value: Any) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    if isinstance(value, Decimal):
        # Earlier versions showed a decimal as Python does, except whole ones of up to 15 digits.
        whole = value == value.to_integral_value() and abs(value) < _WHOLE
        return str(value) if whole else str(printed(value))
    return str(printed(value))


class Known(NamedTuple):
    """An id of a family in the previous table, and its content there."""

    family: str
    row_id: str
    content_hash: str

    @property
    def number(self) -> int:
        """Return the id's number in its family: 1 for A, 2 for A#2."""
        return 1 if self.row_id == self.family else int(self.row_id[len(self.family) + 1 :])


def require_usable(kind: pa.DataType, column: str) -> None:
    """Raise TableError if a column's type cannot be used for ids."""
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_nested(plain):
        raise TableError(
            f"The column {quoted(column)} holds {kind} values, which cannot be row ids.",
            where="input.id_column",
            next_step="name a column of text or numbers, or remove id_column",
        )


def cell_ids(table: pa.Table, column: str) -> list[str]:
    """Return each row's id from its cell, "" if the cell is empty."""
    return [_id_text(cell) for cell in python_values(table, column)]


def _id_text(cell: Any) -> str:
    if isinstance(cell, str):
        return "" if cell.isspace() else cell
    if cell is None or (isinstance(cell, float) and isnan(cell)):
        return ""
    if (isinstance(cell, float) and cell.is_integer()) or (isinstance(cell, Decimal) and cell == cell.to_integral()):
        return str(int(cell))  # integers with a missing value arrive as floats
    return str(cell)


def marks(ids: Sequence[str]) -> Marks:
    """Return 64 bits of each id, stable within this process."""
    return np.fromiter(map(hash, ids), np.int64, len(ids))


class Bases:
    """The ids that cells or hashes give the rows of a table, stored in one column of a Parquet file."""

    def __init__(self, path: Path, column: str, marks: Marks) -> None:
        self._path, self._column, self._marks = path, column, marks
        self._sorted = np.sort(marks)

    def __len__(self) -> int:
        return len(self._marks)

    def where(self, asked: Callable[[pa.Array], Any]) -> Mask:
        """Return the mask of the rows whose ids satisfy an Arrow function."""
        found = [asked(ids).to_numpy(zero_copy_only=False) for ids in self._texts()]
        return np.concatenate([np.empty(0, np.bool_), *found])

    def texts(self, mask: Mask) -> list[str]:
        """Return the ids of the rows in a mask."""
        return in_mask(self._texts(), mask)

    def repeating(self) -> Mask:
        """Return the mask of all rows whose id repeats, with very few false positives."""
        repeated = np.unique(self._sorted[1:][self._sorted[1:] == self._sorted[:-1]])
        return np.isin(self._marks, repeated) if len(repeated) else np.zeros(len(self), np.bool_)

    def may_hold(self, ids: pa.Array) -> Mask:
        """Return which of `ids` are among these; a false positive has a chance of 2^-64."""
        asked = marks(ids.to_pylist())
        at = np.minimum(np.searchsorted(self._sorted, asked), len(self) - 1)
        return self._sorted[at] == asked if len(self) else np.zeros(len(asked), np.bool_)

    def _texts(self) -> Iterator[pa.Array]:
        with parquet_file(self._path) as file:
            for batch in file.iter_batches(_ROWS_A_BATCH, columns=[self._column]):
                yield batch.column(0)


def in_mask(columns: Iterable[pa.Array], mask: Mask) -> list[Any]:
    """Return the values at the rows in a mask of a column given in chunks."""
    values: list[Any] = []
    start = 0
    for column in columns:
        values += column.filter(pa.array(mask[start : start + len(column)])).to_pylist()
        start += len(column)
    return values


class Distinct(NamedTuple):
    """New ids for the rows in `mask`, in order, and how many rows repeated the id of an earlier row."""

    mask: Mask
    ids: list[str]
    repeats: int


def distinct(bases: Bases, content_of: Callable[[Mask], Sequence[str]], prior: PriorTable | None) -> Distinct:
    """Return which rows need other ids than their bases to make all ids unique; `ids` is empty if none does.

    `content_of` returns the content hashes of the rows in a mask.
    """
    repeating = bases.repeating()
    counts = Counter(bases.texts(repeating) if repeating.any() else ())
    repeated = [base for base, count in counts.items() if count > 1]
    repeats = sum(counts[base] - 1 for base in repeated)
    # A row whose duplicates were removed keeps the id that was made for it.
    chunks = [pa.array(repeated, pa.string()), *(prior.families(bases) if prior else ())]
    families = pc.unique(pa.chunked_array(chunks, pa.string()))
    if not len(families):
        return Distinct(repeating, [], repeats)
    chosen = bases.where(lambda ids: pc.is_in(ids, value_set=families))
    members = bases.texts(chosen)
    literal = set(bases.texts(bases.where(lambda ids: _suffixed(ids, families))))
    known: dict[str, list[Known]] = defaultdict(list)
    for item in prior.known(families) if prior else ():
        if item.row_id == item.family or item.row_id not in literal:
            known[item.family].append(item)
    ids = _assign(members, content_of(chosen), known, literal)
    return Distinct(chosen, [] if ids == members else ids, repeats)


def _assign(
    bases: Sequence[str], contents: Sequence[str], known: dict[str, list[Known]], literal: set[str]
) -> list[str]:
    """Return an id for each row of the families."""
    ids = [""] * len(bases)
    order = sorted(range(len(bases)), key=lambda row: (bases[row], contents[row]))
    for base, group in groupby(order, key=lambda row: bases[row]):
        rows = list(group)
        made = _family_ids(base, [contents[row] for row in rows], known.get(base, []), literal)
        for row, row_id in zip(rows, made, strict=True):
            ids[row] = row_id
    return ids


def _family_ids(base: str, contents: Sequence[str], known: list[Known], literal: set[str]) -> list[str]:
    """Return the ids of one family's rows, given in order of their content."""
    known = sorted(known, key=lambda item: item.number)
    waiting: dict[str, deque[str]] = defaultdict(deque)
    for item in known:
        waiting[item.content_hash].append(item.row_id)
    kept = [waiting[content].popleft() if waiting.get(content) else None for content in contents]
    before, used = {item.row_id for item in known}, set(kept)
    numbered = chain([base], (f"{base}#{number}" for number in count(2)))
    fresh = (row_id for row_id in numbered if row_id not in before and (row_id == base or row_id not in literal))
    # The family's remaining ids go to edited rows before any new id is made.
    others = chain((item.row_id for item in known if item.row_id not in used), fresh)
    return [row_id if row_id is not None else next(others) for row_id in kept]


def _suffixed(ids: pa.Array | pa.ChunkedArray, families: pa.Array) -> Any:
    """Return the mask of ids that look as if made for one of the families."""
    return pc.and_(pc.match_substring_regex(ids, _SUFFIX), pc.is_in(_stems(ids), value_set=families))


def _stems(ids: pa.Array | pa.ChunkedArray) -> Any:
    return pc.replace_substring_regex(ids, pattern=_SUFFIX, replacement="")


def marked(schema: pa.Schema, whole: Mapping[str, Whole]) -> pa.Schema:
    """Return the schema of input.parquet with a note of how whole numbers are hashed."""
    return schema.with_metadata({_WHOLE_NUMBERS: json.dumps(whole)}) if whole else schema


def _whole(kind: pa.DataType) -> Whole | None:
    return "int" if pa.types.is_integer(kind) else "float" if pa.types.is_floating(kind) else None


class PriorTable:
    """The ids and contents of a run's previous input.parquet. Raises RunError if it is damaged."""

    def __init__(self, path: Path, id_column: str) -> None:
        self._path, self._id_column = path, id_column

    def whole_numbers(self, schema: pa.Schema) -> dict[str, Whole]:
        """Return how the run hashes whole numbers in columns that had another type before.

        A column of whole numbers is one of floats as soon as a cell is empty, and prompts show the same numbers.
        """
        with table_copy(self._path), parquet_file(self._path) as file:
            prior = file.schema_arrow
            known = json_object((prior.metadata or {}).get(_WHOLE_NUMBERS, b"{}"), DEEPEST)
            if any(value not in ("int", "float") for value in known.values()):
                raise ValueError
        before = {field.name: _whole(field.type) for field in prior} | known
        pairs = ((field.name, _whole(field.type), before.get(field.name)) for field in schema)
        return {name: earlier for name, now, earlier in pairs if now and earlier and now != earlier}

    def families(self, bases: Bases) -> list[pa.Array]:
        """Return the ids of `bases` from which ids of the previous table may have been made."""
        stems = [
            pc.unique(_stems(ids.filter(pc.match_substring_regex(ids, _SUFFIX))))
            for ids in (table["gxr_row_id"].combine_chunks() for table in self._tables(["gxr_row_id"]))
        ]
        return [some.filter(pa.array(bases.may_hold(some))) for some in stems if len(some)]

    def known(self, families: pa.Array) -> Iterator[Known]:
        """Yield the ids of these families, except ids that a cell of the previous table held."""
        columns = ["gxr_row_id", "gxr_content_hash"]
        with table_copy(self._path), parquet_file(self._path) as file:
            names = file.schema_arrow.names
        literal = self._id_column in names
        for table in self._tables([*columns, self._id_column] if literal else columns):
            own = pc.is_in(table["gxr_row_id"], value_set=families)
            some = table.filter(pc.or_(own, _suffixed(table["gxr_row_id"], families)))
            cells: Iterable[str] = cell_ids(some, self._id_column) if literal else [""] * some.num_rows
            heads = pc.is_in(some["gxr_row_id"], value_set=families).to_pylist()
            stems = _stems(some["gxr_row_id"]).to_pylist()
            pairs = zip(*(some[name].to_pylist() for name in columns), strict=True)
            for (row_id, content), stem, cell, head in zip(pairs, stems, cells, heads, strict=True):
                if head or cell != row_id:
                    yield Known(row_id if head else stem, row_id, content)

    def _tables(self, columns: list[str]) -> Iterator[pa.Table]:
        with table_copy(self._path), parquet_file(self._path) as file:
            for batch in file.iter_batches(_ROWS_A_BATCH, columns=columns):
                yield pa.Table.from_batches([batch])
