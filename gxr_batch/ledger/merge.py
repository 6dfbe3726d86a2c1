"""Joins the table with the newest results, in input order and in constant memory.

results.parquet, failed.parquet, partial exports and `read_results` are all this one join, over all or some keys.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gxr_batch.errors import RunError
from gxr_batch.ledger.files import write_whole
from gxr_batch.ledger.parts import read_part
from gxr_batch.ledger.state import FAILED, HELD, TODO, State
from gxr_batch.records import result_schema
from gxr_batch.storage import reading

INPUT_NAME = "input.parquet"
RESULTS_NAME = "results.parquet"
FAILED_NAME = "failed.parquet"
KEY_COLUMNS_OF_INPUT = ("gxr_row_id", "gxr_content_hash")
_ROWS_A_BATCH = 16_384
# Parts kept open: work goes in input order but for the window, so a batch finds its rows in few neighbouring parts.
_OPEN_PARTS = 4


class _Parts:
    """Reads parts, keeping the last few."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: OrderedDict[int, pa.Table] = OrderedDict()

    def take(self, number: int, lines: npt.NDArray[np.int32]) -> pa.Table:
        if number not in self._open:
            self._open[number] = read_part(self._folder, number)
            if len(self._open) > _OPEN_PARTS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number].take(pa.array(lines))


def joined(folder: Path, state: State, provenance: Mapping[str, Any]) -> Iterator[pa.Table]:
    """Yield the finished keys as tables of the contract's columns, in input order, sample after sample."""
    parts = _Parts(folder)
    start = 0
    for batch in _batches(folder):
        rows = slice(start, start + batch.num_rows)
        start += batch.num_rows
        row, sample = np.nonzero(state.status[rows] != TODO)
        results = _gather(parts, state.part[rows][row, sample], state.line[rows][row, sample])
        own = pa.Table.from_batches([batch.drop_columns(list(KEY_COLUMNS_OF_INPUT))]).take(pa.array(row))
        yield _with_provenance(own, results, provenance)


def damaged_table(folder: Path) -> RunError:
    """Return the error for a run's input.parquet that cannot be decoded."""
    return RunError(
        "The run's table is damaged.",
        where=str((folder / INPUT_NAME).absolute()),
        next_step="run the job again: it takes the table in anew and generates no row twice",
    )


def has_footer(path: Path) -> bool:
    """Return whether a Parquet file was written to its end. Raises StorageError where the disk is at fault."""
    try:
        with reading(path, RunError("")):
            pq.read_metadata(path)
    except RunError:
        return False
    return True


def _batches(folder: Path) -> Iterator[pa.RecordBatch]:
    path = folder / INPUT_NAME
    with reading(path, damaged_table(folder)):
        yield from pq.ParquetFile(path).iter_batches(_ROWS_A_BATCH)


def _own_fields(folder: Path) -> list[pa.Field]:
    """Return the user's columns."""
    path = folder / INPUT_NAME
    with reading(path, damaged_table(folder)):
        return [field for field in pq.read_schema(path) if field.name not in KEY_COLUMNS_OF_INPUT]


def joined_schema(folder: Path) -> pa.Schema:
    """Return the schema of `joined`: the user's columns, then the contract's."""
    return pa.schema(_own_fields(folder) + list(result_schema()))


def _gather(parts: _Parts, part: npt.NDArray[np.int32], line: npt.NDArray[np.int32]) -> pa.Table:
    """Return the named lines of the named parts, in that order."""
    pieces, order = [], []
    for number in np.unique(part):
        at = np.flatnonzero(part == number)
        pieces.append(parts.take(int(number), line[at]))
        order.append(at)
    if not pieces:
        return result_schema().empty_table()
    return pa.concat_tables(pieces).take(pa.array(np.argsort(np.concatenate(order))))


def _with_provenance(own: pa.Table, results: pa.Table, provenance: Mapping[str, Any]) -> pa.Table:
    columns = {name: own[name] for name in own.column_names}
    for field in result_schema():
        if field.name in provenance:
            columns[field.name] = pa.repeat(pa.scalar(provenance[field.name], field.type), own.num_rows)
        else:
            columns[field.name] = results[field.name]
    fields = list(own.schema) + list(result_schema())
    return pa.Table.from_arrays(list(columns.values()), schema=pa.schema(fields))


def write_results(folder: Path, state: State, provenance: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Replace results.parquet by the join as it is now. Raises StorageError."""
    schema = joined_schema(folder).with_metadata(dict(metadata))

    def write(path: Path) -> None:
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for table in joined(folder, state, provenance):
                writer.write_table(table)

    write_whole(folder / RESULTS_NAME, write)


def write_failed(folder: Path, state: State) -> bool:
    """Write the rows that have a failed or held sample as a ready-to-run input. Raises StorageError.

    An earlier list is replaced, by an empty one too; where there never was a failure there is no file.
    """
    bad = (state.status == FAILED) | (state.status == HELD)
    target = folder / FAILED_NAME
    if not bad.any() and not target.exists():
        return False
    own = _own_fields(folder)
    schema = pa.schema([*own, pa.field("gxr_error", pa.string())])

    def write(path: Path) -> None:
        parts, start = _Parts(folder), 0
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for batch in _batches(folder):
                rows = slice(start, start + batch.num_rows)
                start += batch.num_rows
                row = np.flatnonzero(bad[rows].any(axis=1))
                sample = bad[rows][row].argmax(axis=1)
                errors = _gather(parts, state.part[rows][row, sample], state.line[rows][row, sample])["gxr_error"]
                table = pa.Table.from_batches([batch]).take(pa.array(row)).select([field.name for field in own])
                writer.write_table(pa.Table.from_arrays([*table.columns, errors], schema=schema))

    write_whole(target, write)
    return True
