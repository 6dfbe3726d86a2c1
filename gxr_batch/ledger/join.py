"""Merges the table with the newest results, in input order and in constant memory.

results.parquet, failed.parquet, partial exports and `read_results` all use this merge, over all or some keys.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gxr_batch.disk import parquet_file, write_whole
from gxr_batch.errors import RunError, StorageError
from gxr_batch.forms import Form, parts_of
from gxr_batch.ledger.compaction import locations, part_infos
from gxr_batch.ledger.input_copy import KEY_COLUMNS_OF_INPUT, batches_of, own_fields
from gxr_batch.ledger.parts import footer_of, read_group
from gxr_batch.ledger.run_format import FORMAT, FORMAT_MARK, refuse_later_file, require_readable, with_missing_columns
from gxr_batch.ledger.state import FAILED, HELD, TODO, State
from gxr_batch.records import CONTENT_HASH, GENERATED_COLUMNS, part_schema, result_schema

INPUT_NAME = "input.parquet"
RESULTS_NAME = "results.parquet"
FAILED_NAME = "failed.parquet"
# Row groups kept in memory: work is in input order except within the window, so a batch's rows are in few adjacent
# groups.
_OPEN_GROUPS = 4
_SECTION_TYPES = {"bullets": pa.list_(pa.string()), "number": pa.float64()}
_Lines = npt.NDArray[np.int64]


class _Parts:
    """Reads lines of parts, wherever compaction moved them, and caches the last few row groups."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._locations = locations(part_infos(folder))
        self._starts: dict[int, _Lines] = {}
        self._open: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()

    def gather(self, part: npt.NDArray[np.int32], line: npt.NDArray[np.int32]) -> pa.Table:
        """Return the given lines of the given parts, in that order."""
        while True:
            try:
                return self._gather(part, line)
            except StorageError:
                before, self._locations = self._locations, locations(part_infos(self._folder))
                if self._locations == before:  # else a writer has just compacted parts
                    raise

    def _gather(self, part: npt.NDArray[np.int32], line: npt.NDArray[np.int32]) -> pa.Table:
        numbers, which = np.unique(part, return_inverse=True)
        places = [self._locations.get(int(number), (int(number), 0)) for number in numbers]
        place = np.array(places, np.int64).reshape(-1, 2)[which]
        number, there = place[:, 0], place[:, 1] + line
        pieces, order = [part_schema().empty_table()], [np.empty(0, np.int64)]
        for file in np.unique(number):
            at = np.flatnonzero(number == file)
            starts = self._starts_of(int(file))
            group = np.searchsorted(starts, there[at], "right") - 1
            for wanted in np.unique(group):
                here = at[group == wanted]
                pieces.append(self._group(int(file), int(wanted)).take(pa.array(there[here] - starts[wanted])))
                order.append(here)
        return pa.concat_tables(pieces).take(pa.array(np.argsort(np.concatenate(order))))

    def _starts_of(self, number: int) -> _Lines:
        """Return the first line of each row group of a part."""
        if number not in self._starts:
            footer = footer_of(self._folder, number)
            rows = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
            self._starts[number] = np.cumsum([0, *rows])[:-1]
        return self._starts[number]

    def _group(self, number: int, group: int) -> pa.Table:
        at = (number, group)
        if at not in self._open:
            self._open[at] = read_group(self._folder, number, group)
            if len(self._open) > _OPEN_GROUPS:
                self._open.popitem(last=False)
        self._open.move_to_end(at)
        return self._open[at]


def merged(
    folder: Path,
    state: State,
    provenance: Mapping[str, Any],
    form: Form | None = None,
    *,
    include_held: bool = False,
    with_content_hash: bool = False,
) -> Iterator[pa.Table]:
    """Yield the finished keys as tables with the user's and the result columns, in input order, then by sample.

    The text of a held row is null unless `include_held` is set. With a `form`, each of its sections is a column, null
    in a row whose text lacks the form. `with_content_hash` adds the private column.
    """
    parts = _Parts(folder)
    start = 0
    for batch in batches_of(folder / INPUT_NAME):
        rows = slice(start, start + batch.num_rows)
        start += batch.num_rows
        row, sample = np.nonzero(state.status[rows] != TODO)
        results = parts.gather(state.part[rows][row, sample], state.line[rows][row, sample])
        if start > state.rows or not _belong(results, batch, row):
            raise RunError("The run's table changed while it was being read.", where=str(folder), next_step="try again")
        if not include_held:
            results = _without_held_texts(results)
        own = pa.Table.from_batches([batch.drop_columns(list(KEY_COLUMNS_OF_INPUT))]).take(pa.array(row))
        table = _with_sections(_with_provenance(own, results, provenance), form)
        if with_content_hash:
            table = table.append_column(CONTENT_HASH, results[CONTENT_HASH])
        yield table


def _belong(results: pa.Table, batch: pa.RecordBatch, row: npt.NDArray[np.intp]) -> bool:
    """Return whether the results belong to these rows of the table, and their texts to these cells."""
    keys = batch.select(list(KEY_COLUMNS_OF_INPUT)).take(pa.array(row))
    return all(results[name].combine_chunks().equals(keys.column(name)) for name in KEY_COLUMNS_OF_INPUT)


def merged_schema(folder: Path, form: Form | None = None) -> pa.Schema:
    """Return the schema of `merged`: the user's columns, then the result columns, then those of a form's sections."""
    return pa.schema([*own_fields(folder / INPUT_NAME), *result_schema(), *_section_fields(form)])


def _section_fields(form: Form | None) -> list[pa.Field]:
    """Return the columns of a form's sections: text, a list of text, or a number; none without a form."""
    return [pa.field(part.column, _SECTION_TYPES.get(part.kind, pa.string())) for part in form.parts] if form else []


def _with_sections(table: pa.Table, form: Form | None) -> pa.Table:
    """Return the table with the sections of its texts as columns."""
    if form is None:
        return table
    found = [parts_of(form, one) if one else None for one in table["gxr_text"].to_pylist()]
    for at, field in enumerate(_section_fields(form)):
        cells = [parts[at] if parts else None for parts in found]
        table = table.append_column(field, pa.array(cells, field.type))
    return table


def _without_held_texts(results: pa.Table) -> pa.Table:
    held = pc.equal(results["gxr_status"], "held")
    for name in GENERATED_COLUMNS:
        texts = pc.if_else(held, pa.scalar(None, pa.string()), results[name])
        results = results.set_column(results.schema.get_field_index(name), results.schema.field(name), texts)
    return results


def _with_provenance(own: pa.Table, results: pa.Table, provenance: Mapping[str, Any]) -> pa.Table:
    columns = [own[name] for name in own.column_names]
    for field in result_schema():
        if field.name in results.column_names:
            columns.append(results[field.name])
        else:  # the same for every row; null if the run's manifest lacks it
            columns.append(pa.repeat(pa.scalar(provenance.get(field.name), field.type), own.num_rows))
    return pa.Table.from_arrays(columns, schema=pa.schema(list(own.schema) + list(result_schema())))


def write_results(
    folder: Path, state: State, provenance: Mapping[str, Any], metadata: Mapping[str, str], form: Form | None = None
) -> None:
    """Replace results.parquet with the current merge. Raises StorageError."""
    schema = merged_schema(folder, form).with_metadata({**metadata, FORMAT_MARK: str(FORMAT)})

    def write(file: BinaryIO) -> None:
        with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
            for table in merged(folder, state, provenance, form):
                writer.write_table(table)

    write_whole(folder / RESULTS_NAME, write)


def stored_schema(results: Path, form: Form | None = None) -> pa.Schema:
    """Return the columns of results.parquet as this version reads it: the user's as stored, then the result columns.

    The table's columns may have changed since; the run's `form` may not. Raises LaterVersion, and pyarrow's errors for
    damage.
    """
    with parquet_file(results) as file:
        stored = file.schema_arrow
    if len(set(stored.names)) < len(stored):
        raise ValueError
    own = [field for field in stored if not field.name.startswith("gxr_")]
    of_results = [*result_schema(), *_section_fields(form)]
    refuse_later_file(results, stored, [field.name for field in own + of_results])
    return pa.schema(own + of_results, metadata=stored.metadata)


def stored_tables(results: Path, schema: pa.Schema, rows: int) -> Iterator[pa.Table]:
    """Yield the rows of results.parquet in the columns of `stored_schema`, `rows` at a time."""
    with parquet_file(results) as file:
        for batch in file.iter_batches(rows):
            table = pa.Table.from_batches([batch])
            table.validate(full=True)
            table = with_missing_columns(table, schema.names, schema)
            if table.schema.types != schema.types:
                raise ValueError
            require_readable(table)
            yield table


def write_failed(folder: Path, state: State) -> bool:
    """Write the rows that have a failed or held sample as a ready-to-run input. Raises StorageError.

    An earlier list is replaced, even by an empty one; without any failure so far there is no file.
    """
    bad = (state.status == FAILED) | (state.status == HELD)
    target = folder / FAILED_NAME
    if not bad.any() and not target.exists():
        return False
    own = own_fields(folder / INPUT_NAME)
    schema = pa.schema([*own, pa.field("gxr_error", pa.string())])

    def write(file: BinaryIO) -> None:
        parts, start = _Parts(folder), 0
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for batch in batches_of(folder / INPUT_NAME):
                rows = slice(start, start + batch.num_rows)
                start += batch.num_rows
                row = np.flatnonzero(bad[rows].any(axis=1))
                sample = bad[rows][row].argmax(axis=1)
                errors = parts.gather(state.part[rows][row, sample], state.line[rows][row, sample])["gxr_error"]
                table = pa.Table.from_batches([batch]).take(pa.array(row)).select([field.name for field in own])
                writer.write_table(pa.Table.from_arrays([*table.columns, errors], schema=schema))

    write_whole(target, write)
    return True
