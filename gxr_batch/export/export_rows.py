"""Selects the rows of an export, applies reviews to them, and withholds held rows.

Yields small tables, so that every format is written in constant memory. The other modules write the formats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from gxr_batch.cells import values_of
from gxr_batch.disk import denied
from gxr_batch.errors import RunError
from gxr_batch.files import DEEPEST, json_object
from gxr_batch.forms import PREFIX, in_a_cell
from gxr_batch.ledger import Counts, RunReader
from gxr_batch.ledger.join import stored_schema, stored_tables
from gxr_batch.ledger.reviews import approved, with_review_columns
from gxr_batch.ledger.state import are_counts
from gxr_batch.rows.columns import counted

# As Python objects, rows of long texts take ten times the memory, so few are converted at a time.
_ROWS_A_BATCH = 2048


class Source(NamedTuple):
    """The rows of an export: schema, tables, counts, and whether the run is unfinished (`partial`).

    Cells and texts of held rows are null unless they were requested.

    `approved`: only rows that a reviewer approved, with or without edits, and on which no other reviewer disagrees.
    `part` says which rows they are, if not all; `blind`: readers are not to know the model.
    """

    reader: RunReader
    schema: pa.Schema
    tables: Iterator[pa.Table]
    counts: Counts
    partial: bool
    approved: bool = False
    part: str = ""
    blind: bool = False


class Exported(NamedTuple):
    """A written export: its file, row count, and notes for the user."""

    path: Path
    rows: int
    partial: bool
    notes: tuple[str, ...] = ()


def open_source(reader: RunReader, *, partial: bool, include_held: bool = False) -> Source:
    """Return the rows of a finished run, or with `partial` those finished so far, with reviews applied.

    They are those of results.parquet, unless that is older than the newest invocation, as after a retry that was
    killed: then the parts have the newer texts. `include_held` reads the texts of held rows from the parts too.

    Raises RunError if the run is unfinished and `partial` is not set.
    """
    counts = reader.state.counts()
    results = None if partial or include_held else reader.results_of_newest
    if results is not None:
        with damage(results):
            schema = stored_schema(results, reader.form)
        tables = map(_withheld, map(reader.reviews.apply_to, _stored(results, schema)))
        return Source(reader, with_review_columns(schema), tables, _counts_of(schema) or counts, partial=False)
    if counts.left and not partial:
        raise RunError(
            f"This run is unfinished: {counted(counts.left, 'row')} left.",
            where=str(reader.folder),
            next_step="add --partial to export the finished rows, or finish the run with `gxr-batch run`",
        )
    found = reader.finished(include_held=include_held)
    shown = found if include_held else map(_withheld, found)
    return Source(reader, reader.schema, _in_slices(shown), counts, counts.left > 0)


def _in_slices(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    for table in tables:
        for start in range(0, table.num_rows, _ROWS_A_BATCH):
            yield table.slice(start, _ROWS_A_BATCH)


def _counts_of(schema: pa.Schema) -> Counts | None:
    """Return the counts stored in results.parquet; the run may have more rows now."""
    try:
        counts = json_object((schema.metadata or {})[b"gxr_counts"], DEEPEST)
    except (KeyError, ValueError):
        return None
    return Counts(**counts) if are_counts(counts) else None


def _withheld(table: pa.Table) -> pa.Table:
    """Return the table with the user's cells of held rows set to null: they may hold the identifiers."""
    held = pc.equal(table["gxr_status"], "held")
    if not pc.any(held).as_py():
        return table
    kept = pc.if_else(held, pa.scalar(None, pa.int64()), pa.array(range(table.num_rows), pa.int64()))
    columns = [
        column if name.startswith("gxr_") else column.take(kept)
        for name, column in zip(table.column_names, table.columns, strict=True)
    ]
    return pa.Table.from_arrays(columns, schema=table.schema)


def final_text(row: Mapping[str, Any]) -> str | None:
    """Return a row's final text: the reviewer's if it was approved with edits, else the generated one."""
    edited: str | None = row["gxr_review_text"] if row["gxr_review_status"] == "approved_with_edits" else None
    generated: str | None = row["gxr_text"]
    return edited or generated


def cells_of(table: pa.Table, name: str) -> list[Any]:
    """Return a column as Python values for a sheet: a section of bullets is a text of lines, not a list."""
    values = values_of(table[name])
    return [value and in_a_cell(value) for value in values] if name.startswith(PREFIX) else values


def only_approved(source: Source) -> Source:
    """Return the source with its approved rows only."""
    return source._replace(tables=map(approved, source.tables), approved=True)


def flagged_first(again: Callable[[], Source]) -> Source:
    """Return a source with the rows of most flags first, those with as many in their usual order.

    `again` opens the source: its rows are read once for each number of flags, so that they never are in memory at once.
    Raises RunError, while rows are read, if the run has changed meanwhile.
    """
    of: Counter[int] = Counter()
    source = again()
    for table in source.tables:
        of.update(_flags_of(table).to_pylist())
    return source._replace(tables=_by_flags(again, of))


def _by_flags(again: Callable[[], Source], of: Counter[int]) -> Iterator[pa.Table]:
    for number in sorted(of, reverse=True):
        source, found = again(), 0
        for table in source.tables:
            rows = table.filter(pc.equal(_flags_of(table), number))
            found += rows.num_rows
            yield rows
        if found != of[number]:
            raise RunError(
                "The run has changed during the export.",
                where=str(source.reader.folder),
                next_step="run the same command again once the run has finished",
            )


def _flags_of(table: pa.Table) -> pa.ChunkedArray:
    return pc.fill_null(pc.list_value_length(table["gxr_flags"]), 0)


def _stored(results: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    with damage(results):
        yield from stored_tables(results, schema, _ROWS_A_BATCH)


@contextmanager
def damage(results: Path) -> Iterator[None]:
    """Convert errors of the Parquet reader into a RunError; their messages may quote the file."""
    try:
        yield
    except PermissionError:
        raise denied(results) from None
    except MemoryError:
        raise
    except (OSError, pa.ArrowException, ValueError):
        raise RunError(
            "The run's results are damaged.",
            where=str(results.absolute()),
            next_step=f"rename the file to {results.name}.damaged and run the job again to merge the results again",
        ) from None
