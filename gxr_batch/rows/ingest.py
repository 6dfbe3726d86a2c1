"""Copies the table into input.parquet: the user's columns, a row id and a content hash for every row.

One pass over the files, and a second one over the copy only if ids repeat. Memory holds one batch, and 64 bits of each
id.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gxr_batch.disk import parquet_file, storage_errors
from gxr_batch.errors import TableError
from gxr_batch.files import new_file
from gxr_batch.rows.columns import FieldMap, counted, label, require_column
from gxr_batch.rows.doubtful_cells import DoubtfulCells
from gxr_batch.rows.ids import (
    DERIVED_DIGITS,
    Bases,
    ContentHasher,
    Distinct,
    Marks,
    Mask,
    PriorTable,
    cell_ids,
    distinct,
    in_mask,
    marked,
    marks,
    require_usable,
)
from gxr_batch.rows.parquet_tables import rows_a_batch
from gxr_batch.rows.source_files import Source, changed_error
from gxr_batch.rows.survey import Survey
from gxr_batch.rows.type_unions import converted

ID, CONTENT = "gxr_row_id", "gxr_content_hash"
_KEY_FIELDS = (pa.field(ID, pa.string()), pa.field(CONTENT, pa.string()))
_ROWS_A_GROUP = 65_536
_BYTES_A_GROUP = 2**25


class Ingested(NamedTuple):
    """How many rows the table has, and notices for the user."""

    rows: int
    notices: tuple[str, ...]


def ingest(
    survey: Survey, fields: FieldMap, target: Path, *, id_column: str, prior: Path | None, limit: int | None
) -> Ingested:
    """Write the table to `target`, for the caller to rename. Rows keep the order of the files.

    `prior` is the input.parquet of the run's previous invocation: rows whose ids repeat keep the ids that they have
    there. `limit` reads only the first rows. Raises TableError if a row cannot be read or a file changed since the
    survey, StorageError if the disk fails; `target` does not exist then.
    """
    require_column(id_column, survey.schema.names, key="input.id_column")
    require_column(fields.template_column, survey.schema.names, key="prompt.template_column")
    if id_column:
        require_usable(survey.schema.field(id_column).type, id_column)
    before = PriorTable(prior, id_column) if prior else None
    intake = _Intake(survey, fields, id_column, before)
    with _target_errors(target), _collecting_only_rows():
        if os.path.lexists(target):  # an earlier copy, or a link
            target.unlink()
        bases = Bases(target, ID, intake.copy(target, limit))
        made = distinct(bases, lambda mask: _contents(target, mask), before)
        if made.ids:
            _replace_ids(target, made)
        for file in survey.files:
            if file.changed():
                raise changed_error(file)
    return Ingested(len(bases), tuple(intake.notices + _repeats(made.repeats, id_column)))


@contextmanager
def _collecting_only_rows() -> Iterator[None]:
    """Keep the garbage collector from going through all imported modules again for every few thousand rows."""
    ours = not gc.get_freeze_count()  # what a program that uses us has frozen stays so
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


class _Intake:
    """One pass over the files."""

    def __init__(self, survey: Survey, fields: FieldMap, id_column: str, prior: PriorTable | None) -> None:
        self._survey, self._id_column = survey, id_column
        whole = prior.whole_numbers(survey.schema) if prior else {}
        self._schema = marked(pa.schema([*survey.schema, *_KEY_FIELDS]), whole)
        self._hasher = ContentHasher(fields, whole)
        self._doubtful = DoubtfulCells(fields, clears=survey.common_nulls)
        self._path: Path | None = None
        self._derived = 0
        self.notices: list[str] = []

    def copy(self, target: Path, limit: int | None) -> Marks:
        """Write the table with the ids from cells and hashes, and return their marks."""
        seen = [np.empty(0, np.int64)]
        with _Groups(target, self._schema) as groups:
            for read in _first_rows(self._tables(), limit):
                table = self._doubtful.look(read)
                with self._named_file():
                    contents = self._hasher.hashes(table)
                    bases = self._bases(table, contents)
                seen.append(marks(bases))
                keys = [pa.array(bases, pa.string()), pa.array(contents, pa.string())]
                groups.write(pa.Table.from_arrays([*table.columns, *keys], schema=self._schema))
        if self._derived:
            self.notices.append(f"{counted(self._derived, 'row')} without {self._id_column}: ids come from the content")
        self.notices += self._doubtful.notices()
        if not sum(map(len, seen)):
            self.notices.append("the table has a header but no rows")
        return np.concatenate(seen)

    @contextmanager
    def _named_file(self) -> Iterator[None]:
        """Add the file being read to an error about a column's cells."""
        try:
            yield
        except TableError as error:
            raise TableError(error.what, where=f"{self._path}, {error.where}", next_step=error.next_step) from None

    def _bases(self, table: pa.Table, contents: Sequence[str]) -> list[str]:
        derived = [content[:DERIVED_DIGITS] for content in contents]
        if not self._id_column:
            return derived
        cells = cell_ids(table, self._id_column)
        self._derived += cells.count("")
        return [cell or other for cell, other in zip(cells, derived, strict=True)]

    def _tables(self) -> Iterator[pa.Table]:
        """Yield the rows of all files with all columns of the table."""
        for file in self._survey.files:
            self._path = file.path
            try:
                for table in file.batches(self._survey.null_values, self.notices.append):
                    yield self._widened(table, file)
            except TableError:
                if file.changed():  # a truncated row is then not the user's mistake
                    raise changed_error(file) from None
                raise

    def _widened(self, table: pa.Table, file: Source) -> pa.Table:
        """Return a file's rows with the types of the whole table, and nulls for columns that only other files have."""
        schema = self._survey.schema
        if table.schema.equals(schema):
            return table
        own = set(table.column_names)
        columns = []
        for field in schema:
            if field.name not in own or pa.types.is_null(table.schema.field(field.name).type):
                columns.append(pa.nulls(table.num_rows, field.type))
                continue
            try:
                columns.append(converted(table[field.name], field.type))
            except MemoryError:
                raise
            except (pa.ArrowException, ValueError, OverflowError):
                raise self._without_union(field, file) from None
        return pa.Table.from_arrays(columns, schema=schema)

    def _without_union(self, field: pa.Field, file: Source) -> TableError:
        """Return the error for a value that the common type of a column cannot hold."""
        others = [other for other in self._survey.files if field.name in other.schema.names and other.path != file.path]
        own = file.schema.field(field.name).type
        other = next((one for one in others if one.schema.field(field.name).type != own), file)
        called = label(file.schema.get_field_index(field.name), file.schema.names)
        return TableError(
            f"The column {called} has two types, and a value that only one of them can hold: {own} in {file.path}, "
            f"{other.schema.field(field.name).type} in {other.path}.",
            next_step="save the files with one type, such as text, or run them as separate jobs",
        )


def _first_rows(tables: Iterator[pa.Table], limit: int | None) -> Iterator[pa.Table]:
    left = limit
    for table in tables:
        if left is None:
            yield table
            continue
        yield table.slice(0, left)
        left -= min(left, table.num_rows)
        if not left:
            return


class _Groups:
    """Writes tables of any size as row groups of a useful size."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        # A category's index may have 8 bits: enough for the words of one batch, not for those of many. Every batch is
        # then a separate group with its own dictionary.
        self._at_once = any("dictionary<" in str(kind) for kind in schema.types)
        # Otherwise no dictionaries: the group size in the file's footer is then its size in memory.
        self._file = new_file(path)
        self._writer = pq.ParquetWriter(self._file, schema, compression="zstd", use_dictionary=self._at_once)
        self._tables: list[pa.Table] = []
        self._rows = self._bytes = 0

    def write(self, table: pa.Table) -> None:
        self._tables.append(table)
        self._rows += table.num_rows
        self._bytes += table.nbytes
        if self._at_once or self._rows >= _ROWS_A_GROUP or self._bytes >= _BYTES_A_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.concat_tables(self._tables), row_group_size=self._rows)
        self._tables, self._rows, self._bytes = [], 0, 0

    def __enter__(self) -> _Groups:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None:
                self._flush()
            self._writer.close()


def _contents(path: Path, mask: Mask) -> list[str]:
    """Return the content hashes of the rows in a mask."""
    with parquet_file(path) as file:
        return in_mask((batch.column(0) for batch in file.iter_batches(_ROWS_A_GROUP, columns=[CONTENT])), mask)


def _replace_ids(path: Path, made: Distinct) -> None:
    """Rewrite the file with new row ids."""
    other = path.with_name(path.name + ".ids")
    start = done = 0
    with parquet_file(path) as file, _Groups(other, file.schema_arrow) as groups:
        place = file.schema_arrow.get_field_index(ID)
        for batch in file.iter_batches(rows_a_batch(file.metadata)):
            mask = made.mask[start : start + batch.num_rows]
            ids = pa.array(made.ids[done : done + int(mask.sum())], pa.string())
            start, done = start + batch.num_rows, done + len(ids)
            own = pc.replace_with_mask(batch.column(place), pa.array(mask), ids)
            groups.write(pa.Table.from_batches([batch]).set_column(place, batch.schema.field(place), own))
    other.replace(path)


def _repeats(more: int, id_column: str) -> list[str]:
    """Return a notice about rows that share an id, if there are any."""
    if not more:
        return []
    what = f"the {id_column}" if id_column else "the content"
    return [f"{counted(more, 'row')} with {what} of another row: numbered #2, #3, ..."]


@contextmanager
def _target_errors(target: Path) -> Iterator[None]:
    """Turn disk errors into StorageError, and remove a copy that failed."""
    try:
        with storage_errors(target):
            yield
    except BaseException:
        for path in (target, target.with_name(target.name + ".ids")):
            with suppress(OSError):
                path.unlink()
        raise
