"""Compacts small parts during a run, so that a long run does not end with a hundred thousand files.

Sixteen parts of one level become one part of the next level, until one holds as many rows as a full part, so a row is
rewritten a few times at most. The sources of a compacted part are the only files in a run folder that are ever deleted:
by then their rows are durable in the compacted part.

Only the newest parts are compacted, under the next number, and their rows keep their order. Reading the sources and
then the compacted part gives the same as reading either, so it is harmless that both exist for a moment, or after a
kill. The footer of a compacted part lists its sources and their first lines: rows looked up in a source are found
there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate, chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from gxr_batch.disk import storage_errors, write_whole
from gxr_batch.errors import StorageError
from gxr_batch.files import DEEPEST, json_object
from gxr_batch.ledger.parts import (
    KEY_COLUMNS,
    DamagedPart,
    footer_of,
    groups_of,
    part_numbers,
    part_path,
    read_part,
)
from gxr_batch.ledger.run_format import FORMAT, FORMAT_MARK
from gxr_batch.records import part_schema

PARTS_PER_COMPACTION = 16
# A part of this many rows, or bytes before compression, is full: it is sealed, and no longer compacted.
FULL_ROWS = 16_384
FULL_BYTES = 2**25
_MARK = b"gxr_union"


class PartInfo(NamedTuple):
    """A part in the folder. `level` is 0 for a sealed part, and counts its compactions otherwise.

    `lines` maps each part that went into it, sealed or compacted, to its first line in this part.
    """

    number: int
    rows: int
    full: bool
    level: int
    lines: dict[int, int]


def part_info(folder: Path, number: int) -> PartInfo:
    """Return a part's description from its footer. Raises DamagedPart, StorageError.

    A compacted part whose mark cannot be read still has sound rows: it counts as a sealed part, in its place.
    """
    footer = footer_of(folder, number)
    size = sum(footer.row_group(group).total_byte_size for group in range(footer.num_row_groups))
    try:
        mark = json_object((footer.metadata or {}).get(_MARK, b'{"level": 0, "lines": []}'), DEEPEST)
        level, lines = int(mark["level"]), {int(source): int(line) for source, line in mark["lines"]}
        if any(not 0 < source < number or not 0 <= line < footer.num_rows for source, line in lines.items()):
            raise ValueError
    except (ValueError, LookupError, TypeError, OverflowError):
        level, lines = 0, {}
    return PartInfo(number, footer.num_rows, footer.num_rows >= FULL_ROWS or size >= FULL_BYTES, level, lines)


def part_infos(folder: Path) -> list[PartInfo]:
    """Return the parts of a run that are readable, in order. Raises StorageError if the disk is at fault."""
    found = []
    for number in part_numbers(folder):
        try:
            found.append(part_info(folder, number))
        except DamagedPart:
            continue
        except StorageError:
            if part_path(folder, number).exists():  # else a writer has just compacted it
                raise
    return found


def locations(parts: Sequence[PartInfo]) -> dict[int, tuple[int, int]]:
    """Return the file number and first line of each part's rows, whether it was compacted or not.

    A part that still exists is its own location: the compacted part may be damaged, or be copied from another run.
    """
    found: dict[int, tuple[int, int]] = {}
    for part in parts:
        found |= {source: (part.number, line) for source, line in part.lines.items()}
    return found | {part.number: (part.number, 0) for part in parts}


def due(parts: Sequence[PartInfo]) -> Sequence[PartInfo]:
    """Return the newest parts if they are due to be compacted, else none."""
    newest = parts[-PARTS_PER_COMPACTION:]
    alike = {(part.level, part.full) for part in newest} == {(newest[0].level, False)} if newest else False
    return newest if alike and len(newest) == PARTS_PER_COMPACTION else ()


def compact(folder: Path, sources: Sequence[PartInfo], number: int) -> PartInfo:
    """Write the rows of `sources` as part `number`, durably, and delete the sources.

    Memory holds one row group. Raises DamagedPart if a source is damaged, leaving everything unchanged, and
    StorageError.
    """
    starts = list(zip(sources, accumulate((source.rows for source in sources), initial=0), strict=False))
    lines = {inner: start + line for source, start in starts for inner, line in source.lines.items()}
    lines |= {source.number: start for source, start in starts}
    mark = json.dumps({"level": sources[-1].level + 1, "lines": list(lines.items())})
    marks = {
        **(footer_of(folder, sources[-1].number).metadata or {}),
        _MARK: mark.encode(),
        FORMAT_MARK.encode(): str(FORMAT).encode(),
    }
    marks.pop(b"ARROW:schema", None)
    schema = part_schema().with_metadata(marks)

    def write(file: BinaryIO) -> None:
        with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
            for table in _grouped(chain.from_iterable(groups_of(folder, source.number) for source in sources)):
                writer.write_table(table, row_group_size=table.num_rows)

    write_whole(part_path(folder, number), write)
    _drop(folder, [source.number for source in sources])
    return part_info(folder, number)


def drop_sources(folder: Path, parts: Sequence[PartInfo]) -> list[PartInfo]:
    """Delete sources of sound compacted parts that a kill left behind; return the other parts. Raises StorageError.

    A number alone does not make a part a source: the parts of two runs may have been copied into one folder.
    """
    obsolete = {
        source
        for compacted in parts
        if (left := [part for part in parts if part.number in compacted.lines])
        for source in _held(folder, compacted, left)
    }
    _drop(folder, obsolete)
    return [part for part in parts if part.number not in obsolete]


def _held(folder: Path, compacted: PartInfo, parts: Sequence[PartInfo]) -> Iterator[int]:
    """Yield the numbers of the parts whose exact keys and attempts a compacted part holds at the listed lines."""
    keys = read_part(folder, compacted.number, KEY_COLUMNS)
    for part in parts:
        if keys.slice(compacted.lines[part.number], part.rows).equals(read_part(folder, part.number, KEY_COLUMNS)):
            yield part.number


def _drop(folder: Path, numbers: Iterable[int]) -> None:
    for number in numbers:
        with storage_errors(part_path(folder, number)), suppress(FileNotFoundError):
            part_path(folder, number).unlink()


def _grouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Concatenate tables up to the size of a full part."""
    waiting: list[pa.Table] = []
    for table in tables:
        more = [*waiting, table]
        if waiting and (sum(map(len, more)) > FULL_ROWS or sum(one.nbytes for one in more) > FULL_BYTES):
            yield pa.concat_tables(waiting)
            waiting = []
        waiting.append(table)
    if waiting:
        yield pa.concat_tables(waiting)
