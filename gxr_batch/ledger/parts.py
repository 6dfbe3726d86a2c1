"""Parts: finished rows as immutable Parquet files, numbered from 1. Progress is what they hold, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gxr_batch.errors import RunError
from gxr_batch.ledger.files import write_whole
from gxr_batch.records import Result, part_schema

PARTS_NAME = "parts"
STATUS_NAMES = pa.array(["ok", "failed", "held"])
_NAME = re.compile(r"part-(\d{8})\.parquet")
KEY_COLUMNS = (
    "gxr_row_id",
    "gxr_sample",
    "gxr_content_hash",
    "gxr_status",
    "gxr_finish_reason",
    "gxr_attempt",
)


def part_path(folder: Path, number: int) -> Path:
    """Return where the part with this number stands."""
    return folder / PARTS_NAME / f"part-{number:08d}.parquet"


def part_numbers(folder: Path) -> list[int]:
    """Return the numbers of the parts in a run folder, in order; files of any other name are not parts."""
    parts = folder / PARTS_NAME
    if not parts.is_dir():
        return []
    return sorted(int(match[1]) for path in parts.iterdir() if (match := _NAME.fullmatch(path.name)))


def write_part(folder: Path, number: int, results: Sequence[Result], metadata: Mapping[str, str]) -> None:
    """Write one part, all at once and durable. Raises StorageError."""
    schema = part_schema().with_metadata(dict(metadata))
    columns = zip(*results, strict=True)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    table = pa.Table.from_arrays(arrays, schema=schema)
    write_whole(part_path(folder, number), lambda path: pq.write_table(table, path, compression="zstd"))


def read_part(folder: Path, number: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one part, whole or some columns. Raises RunError where the file is damaged."""
    path = part_path(folder, number)
    schema = part_schema()
    wanted = list(columns or schema.names)
    try:
        with pq.ParquetFile(path) as file:
            table = file.read(columns=wanted).select(wanted)
        _validate(table, schema)
    except (OSError, pa.ArrowException, ValueError, LookupError):
        raise RunError(
            "A part of this run is damaged.",
            where=str(path.absolute()),
            next_step=f"rename it to {path.name}.damaged and run the job again: its rows are generated anew",
        ) from None
    return table


def _validate(table: pa.Table, schema: pa.Schema) -> None:
    """Raise ValueError for columns that no part has: of other types, not UTF-8, without a key or a known status."""
    table.validate(full=True)
    if any(field.type != schema.field(field.name).type for field in table.schema):
        raise ValueError
    if any(table[name].null_count for name in KEY_COLUMNS):
        raise ValueError
    if not pc.all(pc.is_in(table["gxr_status"], value_set=STATUS_NAMES)).as_py() and table.num_rows:
        raise ValueError
    if table.num_rows and pc.min(table["gxr_sample"]).as_py() < 1:
        raise ValueError
