"""Which rows an export takes: of a finished or unfinished run, with reviews laid over and held rows withheld.

Tables come a few rows at a time, so that every format is written in constant memory. The formats are their modules'.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from gxr_batch.errors import RunError
from gxr_batch.ledger import Counts, RunReader
from gxr_batch.ledger.join import stored_schema, stored_tables
from gxr_batch.ledger.reviews import with_review_columns
from gxr_batch.records import APPROVED, REVIEWERS_DISAGREE

# Rows of long texts weigh ten times as much as Python objects, so few of them are objects at a time.
_ROWS_A_BATCH = 2048


class Source(NamedTuple):
    """The rows of an export: their schema, the tables that hold them, its counts, and whether some are missing.

    Cells and text of held rows are null, unless they were asked for.

    `approved` says that only rows are taken whose text a reviewer approved, with or without edits, and none rejected.
    """

    reader: RunReader
    schema: pa.Schema
    tables: Iterator[pa.Table]
    counts: Counts
    partial: bool
    approved: bool = False


class Exported(NamedTuple):
    """What was written: the file, its rows, and sentences that the user should read."""

    path: Path
    rows: int
    partial: bool
    notes: tuple[str, ...] = ()


def open_source(reader: RunReader, *, partial: bool, include_held: bool = False) -> Source:
    """Return the rows of the last complete state, or with `partial` those that are done now; reviews are laid over.

    `include_held` takes the texts of held rows from the parts: results.parquet has none of them.

    Raises RunError where the run is unfinished and `partial` is not set.
    """
    counts = reader.state.counts()
    if partial or (include_held and not counts.left):
        tables = reader.finished(include_held=include_held)
        shown = tables if include_held else map(_withheld, tables)
        return Source(reader, reader.schema, _in_slices(shown), counts, counts.left > 0)
    if reader.results is None or include_held:
        raise RunError(
            f"This run is unfinished: {counts.left:,} rows are still to do.",
            where=str(reader.folder),
            next_step="add --partial to export the rows that are done, or let `gxr-batch run` finish it",
        )
    with damage(reader.results):
        schema = stored_schema(reader.results)
    tables = map(reader.reviews.apply_to, _stored(reader.results, schema))
    return Source(
        reader, with_review_columns(schema), map(_withheld, tables), _counts_of(schema) or counts, partial=False
    )


def _in_slices(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    for table in tables:
        for start in range(0, table.num_rows, _ROWS_A_BATCH):
            yield table.slice(start, _ROWS_A_BATCH)


def _counts_of(schema: pa.Schema) -> Counts | None:
    """Return the counts of the state that results.parquet holds: the run may have got new rows since."""
    try:
        return Counts(**json.loads((schema.metadata or {})[b"gxr_counts"]))
    except (KeyError, ValueError, TypeError):
        return None


def _withheld(table: pa.Table) -> pa.Table:
    """Return the rows without the user's cells of those that are held: what they were held for may stand there."""
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
    """Return the text that a row stands for: a reviewer's where it was approved with edits, else the generated one."""
    edited: str | None = row["gxr_review_text"] if row["gxr_review_status"] == "approved_with_edits" else None
    generated: str | None = row["gxr_text"]
    return edited or generated


def only_approved(source: Source) -> Source:
    """Return the rows of a source that may be published."""
    return source._replace(tables=map(_approved, source.tables), approved=True)


def _approved(table: pa.Table) -> pa.Table:
    """Return the rows that may be published: generated, approved, and no reviewer says otherwise."""
    status = pc.is_in(table["gxr_review_status"], value_set=pa.array(APPROVED))
    agreed = pa.array([REVIEWERS_DISAGREE not in (flags or ()) for flags in table["gxr_flags"].to_pylist()], pa.bool_())
    return table.filter(pc.and_(pc.and_(status, agreed), pc.equal(table["gxr_status"], "ok")))


def _stored(results: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    with damage(results):
        yield from stored_tables(results, schema, _ROWS_A_BATCH)


@contextmanager
def damage(results: Path) -> Iterator[None]:
    """Turn what the Parquet reader raises inside the block into a RunError; its text may quote the file."""
    try:
        yield
    except (OSError, pa.ArrowException, ValueError):
        raise RunError(
            "The run's results are damaged.",
            where=str(results.absolute()),
            next_step=f"rename them to {results.name}.damaged and run the job again: they are put together anew",
        ) from None
