"""Parts: finished rows as immutable Parquet files, numbered from 1. Progress is what they hold, and nothing else.

A part of an earlier version may lack columns: they read as null. A part can be damaged: a disk that said "written" too
early loses the bytes of a file whose name it kept. Pages carry checksums, so that reading a part whole finds that; the
writer of the run then sets such a part aside.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gxr_batch.disk import reading, write_whole
from gxr_batch.errors import StorageError
from gxr_batch.ledger.run_format import (
    FORMAT,
    FORMAT_MARK,
    columns_in,
    refuse_later_file,
    refuse_later_mark,
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
    """A part's bytes are not what was written; its rows are to be generated again."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            "A part of this run is damaged.",
            where=str(path.absolute()),
            next_step="run the job again: it sets the part aside and generates its rows anew",
        )


def part_path(folder: Path, number: int) -> Path:
    """Return where the part with this number stands."""
    return folder / PARTS_NAME / f"part-{number:08d}.parquet"


def part_numbers(folder: Path) -> list[int]:
    """Return the numbers of the parts in a run folder, in order; files of any other name are not parts."""
    return _numbers(folder, _NAME)


def next_part_number(folder: Path) -> int:
    """Return the first number that no part ever had, those that were set aside included."""
    return max(_numbers(folder, _NAME) + _numbers(folder, _DAMAGED_NAME), default=0) + 1


def _numbers(folder: Path, name: re.Pattern[str]) -> list[int]:
    parts = folder / PARTS_NAME
    if not parts.is_dir():
        return []
    return sorted(int(match[1]) for path in parts.iterdir() if (match := name.fullmatch(path.name)))


def write_part(folder: Path, number: int, results: Sequence[Result], metadata: Mapping[str, str]) -> None:
    """Write one part, all at once and durable. Raises StorageError."""
    schema = part_schema().with_metadata({**metadata, FORMAT_MARK: str(FORMAT)})
    columns = zip(*results, strict=True)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    table = pa.Table.from_arrays(arrays, schema=schema)

    def write(path: Path) -> None:
        pq.write_table(table, path, compression="zstd", write_page_checksum=True)

    write_whole(part_path(folder, number), write)


def read_part(folder: Path, number: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one part, whole or some columns. Raises DamagedPart, StorageError if the disk does not let it be read."""
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
    """Raise LaterVersion if a later version wrote a part. Whether parts are sound is not asked here."""
    for number in part_numbers(folder):
        with suppress(StorageError):  # damaged, or gone: `State.scan` deals with both
            footer_of(folder, number)


def footer_of(folder: Path, number: int) -> pq.FileMetaData:
    """Return what a part's footer says. Raises as `read_part` does."""
    with _opened(folder, number) as file:
        return file.metadata


@contextmanager
def _opened(folder: Path, number: int) -> Iterator[pq.ParquetFile]:
    path = part_path(folder, number)
    damaged = DamagedPart(path)
    with reading(path, damaged):
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                refuse_later_mark(path, file.schema_arrow)
                if not set(KEY_COLUMNS) <= set(file.schema_arrow.names):  # no part of any version
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


def file_metadata(path: Path) -> dict[str, str]:
    """Return a Parquet file's key-value metadata as text, {} where it cannot be read."""
    try:
        pairs = pq.read_schema(path).metadata or {}
        return {key.decode(): value.decode() for key, value in pairs.items() if key.startswith(b"gxr_")}
    except (OSError, pa.ArrowException, ValueError):
        return {}
