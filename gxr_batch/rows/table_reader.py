"""Yields the rows of an input.parquet, in input order, with the cells that their templates use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gxr_batch.disk import parquet_file, reading
from gxr_batch.errors import RunError
from gxr_batch.records import Row
from gxr_batch.rows.columns import FieldMap, prompt_values
from gxr_batch.rows.ingest import CONTENT, ID
from gxr_batch.rows.parquet_tables import rows_a_batch

Positions = npt.NDArray[np.intp]


def read_rows(input_parquet: Path, fields: FieldMap, wanted: npt.NDArray[np.bool_] | None) -> Iterator[Row]:
    """Yield the rows at the positions of the mask `wanted` (None = all).

    `values` has every field of the row's template, None if its cell is empty or no column fills it; it is empty if the
    template named in the row's cell does not exist. Raises RunError if the file is damaged, StorageError if the disk
    fails.
    """
    damaged = RunError(
        "The run's copy of the table is damaged.",
        where=str(input_parquet.absolute()),
        next_step="run the job again: it makes a new copy",
    )
    with reading(input_parquet, damaged):
        for table, positions in _wanted(input_parquet, fields, wanted):
            yield from _rows(table, positions, fields)


def _wanted(path: Path, fields: FieldMap, wanted: npt.NDArray[np.bool_] | None) -> Iterator[tuple[pa.Table, Positions]]:
    """Yield the wanted rows batch by batch, with their positions; row groups without wanted rows are skipped."""
    columns = list(dict.fromkeys([ID, CONTENT, *fields.needed_columns()]))
    start = 0
    with parquet_file(path) as file:
        size = rows_a_batch(file.metadata)
        for number in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(number).num_rows
            if wanted is not None and not wanted[start : start + rows].any():
                start += rows
                continue
            for batch in file.iter_batches(size, row_groups=[number], columns=columns):
                positions: Positions = np.arange(start, start + batch.num_rows)
                start += batch.num_rows
                table = pa.Table.from_batches([batch])
                if wanted is not None:
                    chosen = wanted[positions]
                    positions, table = positions[chosen], table.filter(pa.array(chosen))
                if len(positions):
                    yield table, positions


def _rows(table: pa.Table, positions: Positions, fields: FieldMap) -> Iterator[Row]:
    size = table.num_rows
    nothing = [None] * size
    names = fields.template_names(table)
    used = fields.used_by(dict.fromkeys(names))
    columns = {field: prompt_values(table, fields.columns[field]) for field in used}
    keys = zip(table[ID].to_pylist(), table[CONTENT].to_pylist(), positions.tolist(), names, strict=True)
    cells = {}
    for name in dict.fromkeys(names):
        own = fields.templates.get(name, ())
        cells[name] = (own, list(zip(*(columns.get(field, nothing) for field in own), strict=True)) or [()] * size)
    for number, (row_id, content, position, name) in enumerate(keys):
        own, values = cells[name]
        yield Row(row_id, content, position, name, dict(zip(own, values[number], strict=True)))
