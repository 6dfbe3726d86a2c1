"""Parquet files as Arrow tables, with the column types of the file."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gxr_batch.cells import is_text
from gxr_batch.errors import TableError
from gxr_batch.job import InputSection
from gxr_batch.rows.columns import counted, label
from gxr_batch.rows.null_words import without
from gxr_batch.rows.source_files import Look, Say, SourceFile, changed_error, reading, sha256_of

_ROWS_A_BATCH = 16_384
_BYTES_A_BATCH = 2**23
_MOST_HEADER_BYTES = 2**26  # of 10,000 columns in 60 row groups
# Columns are read through a buffer of this size, so that a file with one huge row group is streamed too.
_BUFFER_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class ParquetTable(SourceFile):
    """A Parquet file. `header` has the names as written."""

    header: tuple[str, ...]

    def own_batches(self, nulls: Collection[str], say: Say) -> Iterator[pa.Table]:
        """Yield the rows as tables of `own_schema`."""
        for table in batches(self, nulls):
            yield _without_headers(self, table, say)


def look(path: Path, _: InputSection) -> Look:
    """Return the names and types of a file. Raises TableError."""
    sha256 = sha256_of(path)
    found = read_schema(path)
    return Look(found.names, found.types, sha256, ParquetTable, {"header": tuple(found.names)})


def read_schema(path: Path) -> pa.Schema:
    """Return the names and types of a Parquet file as written. Raises TableError."""
    with reading(path):
        _refuse_large_header(path)  # and an unreadable file is not reported as damaged
    with _damage(path), pq.ParquetFile(path) as parquet:
        schema = parquet.schema_arrow
        "".join(schema.names).encode()
        schema = pa.schema([field.with_type(kept_type(field.type)) for field in schema])
    if not len(schema):
        raise TableError("The file has no columns.", where=str(path))
    return schema


def _refuse_large_header(path: Path) -> None:
    """Raise TableError if the list of columns and row groups, which is read as a whole, is too long for a table."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        length, mark = file.read(4), file.read(4)
    header = int.from_bytes(length, "little")
    if mark == b"PAR1" and _MOST_HEADER_BYTES < header <= size:
        raise TableError(
            f"The file's header has {header / 2**20:,.0f} MiB, and at most {_MOST_HEADER_BYTES // 2**20} are read.",
            where=str(path.absolute()),
            next_step="write the file again with fewer columns, and with row groups of 100,000 rows",
        )


def batches(file: ParquetTable, nulls: Collection[str]) -> Iterator[pa.Table]:
    """Yield the rows as tables of `file.own_schema`; text cells that are one of `nulls` are null.

    Raises TableError if a page is damaged, a text is not UTF-8, or the file is no longer the one surveyed.
    """
    words = pa.array(list(nulls), pa.string())
    start = 0
    schema = file.own_schema
    with _damage(file.path), pq.ParquetFile(file.path, buffer_size=_BUFFER_BYTES) as parquet:
        if parquet.schema_arrow.names and len(parquet.schema_arrow) != file.width:
            raise changed_error(file)
        for batch in _read(parquet):
            columns = [_checked(file, batch, place, start) for place in file.places]
            if nulls:
                columns = [without(column, words) for column in columns]
            yield pa.Table.from_arrays(columns, schema=schema)
            start += batch.num_rows
    if sha256_of(file.path) != file.sha256:
        raise changed_error(file)


def _read(parquet: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """Yield the batches of a file, each from one row group if Arrow cannot read others (see `kept_type`)."""
    size = rows_a_batch(parquet.metadata)
    if not any(pa.types.is_nested(kind) and "dictionary<" in str(kind) for kind in parquet.schema_arrow.types):
        yield from parquet.iter_batches(size)
        return
    for group in range(parquet.num_row_groups):
        yield from parquet.iter_batches(size, row_groups=[group])


def _without_headers(file: ParquetTable, table: pa.Table, say: Say) -> pa.Table:
    """Return the table without rows whose cells are the column names, as in concatenated CSV files converted later."""
    if not all(is_text(kind) for kind in table.schema.types):
        return table
    same = pc.equal(table.column(0), file.header[file.places[0]].strip())
    if not pc.any(same).as_py():
        return table
    for place, column in zip(file.places[1:], table.columns[1:], strict=True):
        same = pc.and_(same, pc.equal(column, file.header[place].strip()))
    same = pc.fill_null(same, False)
    if again := pc.sum(same).as_py():
        say(f"{file.path}: {counted(again, 'row')} with the column names as cells: left out")
        return table.filter(pc.invert(same))
    return table


def rows_a_batch(metadata: pq.FileMetaData) -> int:
    """Return how many rows to read at a time, so that long cells do not fill memory."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    heaviest = max((group.total_byte_size / group.num_rows for group in groups if group.num_rows), default=1.0)
    return int(min(_ROWS_A_BATCH, max(1.0, _BYTES_A_BATCH / max(heaviest, 1.0))))


def _checked(file: SourceFile, batch: pa.RecordBatch, place: int, start: int) -> pa.Array:
    """Return a column after checking its content: the reader itself accepts text that is not UTF-8."""
    column = batch.column(place)
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        row = next((number for number in range(len(column)) if not _valid(column.slice(number, 1))), 0)
        raise TableError(
            "A cell is not valid: text that is not UTF-8, or a damaged value.",
            where=f"{file.path}, row {start + row + 1}, column {label(file.places.index(place), file.schema.names)}",
            next_step="write the file again from its source",
        ) from None
    kind = file.schema.types[file.places.index(place)]
    return column if column.type == kind else column.cast(kind)


def _valid(column: pa.Array) -> bool:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def kept_type(kind: pa.DataType, *, nested: bool = False) -> pa.DataType:
    """Return the type that a column has in the copy of the table.

    Views are replaced: Parquet lacks them, and Arrow cannot yet select their rows. So are dictionaries inside other
    types, which Arrow cannot read in batches that span row groups.
    """
    if nested and pa.types.is_dictionary(kind):
        kind = kind.value_type
    for is_view, plain in ((pa.types.is_string_view, pa.string()), (pa.types.is_binary_view, pa.binary())):
        if is_view(kind):
            return plain
    if pa.types.is_struct(kind):
        return pa.struct([_kept_field(field) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(kept_type(kind.key_type, nested=True), _kept_field(kind.item_field))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_kept_field(kind.value_field), kind.list_size)
    for is_list, made in (
        (pa.types.is_list, pa.list_),
        (pa.types.is_large_list, pa.large_list),
        (pa.types.is_list_view, pa.list_),
        (pa.types.is_large_list_view, pa.large_list),
    ):
        if is_list(kind):
            return made(_kept_field(kind.value_field))
    return kind


def _kept_field(field: pa.Field) -> pa.Field:
    return field.with_type(kept_type(field.type, nested=True))


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn errors of the Parquet reader into a TableError; their own text may quote the file."""
    try:
        yield
    except MemoryError:
        raise
    except (OSError, pa.ArrowException, ValueError):
        raise TableError(
            "The file is damaged, truncated, or not Parquet.",
            where=str(path.absolute()),
            next_step="write or copy it again",
        ) from None
