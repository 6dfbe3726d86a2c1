"""Parts: finished rows as immutable Parquet files, numbered from 1. They alone are the progress of a run.

A part of an earlier version may lack columns: they read as null. A part can be damaged: a disk that confirms a write
too early can keep a file's name and lose its bytes. Pages carry checksums, so reading a whole part detects that; the
writer of the run then sets the part aside.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gxr_batch.disk import parquet_file, reading, write_whole
from gxr_batch.errors import StorageError
from gxr_batch.ledger.run_format import (
    FORMAT,
    FORMAT_MARK,
    columns_in,
    next_number,
    refuse_later_file,
    refuse_later_mark,
    require_readable,
    with_missing_columns,
)
from gxr_batch.records import Result, part_schema

PARTS_NAME = "parts"
STATUS_NAMES = pa.array(["ok", "failed", "held"])
_NAME = re.compile(r"part-(\d{8})\.parquet")
_DAMAGED_NAME = re.compile(_NAME.pattern + r"\.damaged(-\d+)?")
KEY_COLUMNS = (
    "gxr_row_id",
    "gxr_sample",
    "gxr_content_hash",
    "gxr_status",
    "gxr_finish_reason",
    "gxr_attempt",
)


class DamagedPart(StorageError):
    """A part's bytes are not what was written; its rows must be generated again."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            "A part of this run is damaged.",
            where=str(path.absolute()),
            next_step="run the job again: it sets the part aside and generates its rows again",
        )


def part_path(folder: Path, number: int) -> Path:
    """Return the path of the part with this number."""
    return folder / PARTS_NAME / f"part-{number:08d}.parquet"


def part_numbers(folder: Path) -> list[int]:
    """Return the numbers of the parts in a run folder, in order; files with other names are not parts."""
    return _numbers(folder, _NAME)


def next_part_number(folder: Path) -> int:
    """Return the first number never used by a part, including parts that were set aside. Raises StorageError."""
    return next_number(folder / PARTS_NAME, _numbers(folder, _NAME) + _numbers(folder, _DAMAGED_NAME))


def _numbers(folder: Path, name: re.Pattern[str]) -> list[int]:
    parts = folder / PARTS_NAME
    if not parts.is_dir():
        return []
    return sorted(int(match[1]) for path in parts.iterdir() if (match := name.fullmatch(path.name)))


def write_part(folder: Path, number: int, results: Sequence[Result], metadata: Mapping[str, str]) -> None:
    """Write one part, atomically and durably. Raises StorageError."""
    schema = part_schema().with_metadata({**metadata, FORMAT_MARK: str(FORMAT)})
    columns = zip(*results, strict=True)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    table = pa.Table.from_arrays(arrays, schema=schema)

    def write(file: BinaryIO) -> None:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)

    write_whole(part_path(folder, number), write)


def read_part(folder: Path, number: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Read all or some columns of a part. Raises DamagedPart, StorageError if the disk fails."""
    wanted = list(columns or part_schema().names)
    with _opened(folder, number) as file:
        return _checked(file.read(columns=columns_in(file.schema_arrow, wanted)), wanted)


def groups_of(folder: Path, number: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Yield a part's rows, one row group at a time. Raises as `read_part` does."""
    wanted = list(columns or part_schema().names)
    with _opened(folder, number) as file:
        present = columns_in(file.schema_arrow, wanted)
        for group in range(file.num_row_groups):
            yield _checked(file.read_row_group(group, columns=present), wanted)


def read_group(folder: Path, number: int, group: int) -> pa.Table:
    """Read one row group of a part, counted from 0. Raises as `read_part` does."""
    with _opened(folder, number) as file:
        return _checked(file.read_row_group(group), part_schema().names)


def refuse_later_parts(folder: Path) -> None:
    """Raise LaterVersion if a later version wrote a part. Does not check whether parts are sound."""
    for number in part_numbers(folder):
        with suppress(StorageError):  # damaged or missing: `State.scan` handles both
            footer_of(folder, number)


def footer_of(folder: Path, number: int) -> pq.FileMetaData:
    """Return a part's footer. Raises as `read_part` does."""
    with _opened(folder, number) as file:
        return file.metadata


@contextmanager
def _opened(folder: Path, number: int) -> Iterator[pq.ParquetFile]:
    path = part_path(folder, number)
    damaged = DamagedPart(path)
    with reading(path, damaged):
        try:
            with parquet_file(path, page_checksum_verification=True) as file:
                refuse_later_mark(path, file.schema_arrow)
                if not set(KEY_COLUMNS) <= set(file.schema_arrow.names):  # not a part of any version
                    raise ValueError
                refuse_later_file(path, file.schema_arrow, part_schema().names)
                yield file
        except (ValueError, LookupError):
            raise damaged from None


def _checked(table: pa.Table, wanted: Sequence[str]) -> pa.Table:
    table = with_missing_columns(table, wanted, part_schema())
    _validate(table, part_schema())
    return table


def _validate(table: pa.Table, schema: pa.Schema) -> None:
    """Raise ValueError for invalid columns: wrong types, text that is not UTF-8, missing keys or unknown statuses."""
    table.validate(full=True)
    if any(field.type != schema.field(field.name).type for field in table.schema):
        raise ValueError
    if any(table[name].null_count for name in KEY_COLUMNS):
        raise ValueError
    if not pc.all(pc.is_in(table["gxr_status"], value_set=STATUS_NAMES)).as_py() and table.num_rows:
        raise ValueError
    if table.num_rows and pc.min(table["gxr_sample"]).as_py() < 1:
        raise ValueError
    require_readable(table)


def file_metadata(path: Path) -> dict[str, str]:
    """Return a Parquet file's key-value metadata as text, {} if it cannot be read."""
    try:
        with parquet_file(path) as file:
            pairs = file.schema_arrow.metadata or {}
        return {key.decode(): value.decode() for key, value in pairs.items() if key.startswith(b"gxr_")}
    except MemoryError:
        raise
    except (OSError, pa.ArrowException, ValueError):
        return {}
