"""Puts small parts together while a run goes on, so that a long run does not end in a hundred thousand files.

Sixteen parts of one level become a union of the next, until one holds as many rows as a full part, so a row is written
anew a few times at most. The sources of a union are the one thing in a run folder that is ever deleted: their rows
stand in the union, which is durable by then.

Only the newest parts are put together, under the next number, and their rows keep their order: to read sources and then
their union says the same as to read either, so it is harmless that both exist for a moment, or after a kill. A union's
footer tells which parts it holds from which line on: whoever looked a row up in a source finds it there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate, chain
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from gxr_batch.disk import storage_errors, write_whole
from gxr_batch.errors import StorageError
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

PARTS_A_UNION = 16
# A part of so many rows, or bytes before compression, is full: it is sealed as one, and no longer put together.
FULL_ROWS = 16_384
FULL_BYTES = 2**25
_MARK = b"gxr_union"


class Standing(NamedTuple):
    """A part as it stands in the folder. `level` is 0 for one that was sealed, and counts how often it was united.

    `lines` are the parts that went into it, sealed ones and unions of these, and the line from which on each stands.
    """

    number: int
    rows: int
    full: bool
    level: int
    lines: dict[int, int]


def standing(folder: Path, number: int) -> Standing:
    """Return what a part's footer says of it. Raises DamagedPart, StorageError.

    A union whose mark cannot be read has sound rows all the same: it stands, in its turn, as a part that was sealed.
    """
    footer = footer_of(folder, number)
    size = sum(footer.row_group(group).total_byte_size for group in range(footer.num_row_groups))
    try:
        mark = json.loads((footer.metadata or {}).get(_MARK, b'{"level": 0, "lines": []}'))
        level, lines = int(mark["level"]), {int(source): int(line) for source, line in mark["lines"]}
    except (ValueError, LookupError, TypeError):
        level, lines = 0, {}
    return Standing(number, footer.num_rows, footer.num_rows >= FULL_ROWS or size >= FULL_BYTES, level, lines)


def all_standing(folder: Path) -> list[Standing]:
    """Return the parts of a run that can be read, in order. Raises StorageError if the disk is at fault."""
    found = []
    for number in part_numbers(folder):
        try:
            found.append(standing(folder, number))
        except DamagedPart:
            continue
        except StorageError:
            if part_path(folder, number).exists():  # else a writer has just put it into a union
                raise
    return found


def homes(parts: Sequence[Standing]) -> dict[int, tuple[int, int]]:
    """Return in which file, by number, the rows of each part stand now, and from which line on.

    A part that is still there is its own home: the union beside it may be damaged, or speak of another run's part.
    """
    found: dict[int, tuple[int, int]] = {}
    for part in parts:
        found |= {source: (part.number, line) for source, line in part.lines.items()}
    return found | {part.number: (part.number, 0) for part in parts}


def due(parts: Sequence[Standing]) -> Sequence[Standing]:
    """Return the newest parts where it is time to put them together, else none."""
    newest = parts[-PARTS_A_UNION:]
    alike = {(part.level, part.full) for part in newest} == {(newest[0].level, False)} if newest else False
    return newest if alike and len(newest) == PARTS_A_UNION else ()


def unite(folder: Path, sources: Sequence[Standing], number: int) -> Standing:
    """Write the rows of `sources` as part `number`, durable, and drop the sources.

    In memory stands one row group. Raises DamagedPart if a source is: then all is as before. Raises StorageError.
    """
    stands = list(zip(sources, accumulate((source.rows for source in sources), initial=0), strict=False))
    lines = {inner: start + line for source, start in stands for inner, line in source.lines.items()}
    lines |= {source.number: start for source, start in stands}
    mark = json.dumps({"level": sources[-1].level + 1, "lines": list(lines.items())})
    marks = {
        **(footer_of(folder, sources[-1].number).metadata or {}),
        _MARK: mark.encode(),
        FORMAT_MARK.encode(): str(FORMAT).encode(),
    }
    marks.pop(b"ARROW:schema", None)
    schema = part_schema().with_metadata(marks)

    def write(path: Path) -> None:
        with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
            for table in _grouped(chain.from_iterable(groups_of(folder, source.number) for source in sources)):
                writer.write_table(table, row_group_size=table.num_rows)

    write_whole(part_path(folder, number), write)
    _drop(folder, [source.number for source in sources])
    return standing(folder, number)


def drop_sources(folder: Path, parts: Sequence[Standing]) -> list[Standing]:
    """Delete what a kill left of the sources of sound unions among `parts`; return the others. Raises StorageError.

    Its number alone makes no part a source: somebody may have copied parts of two runs into one folder.
    """
    united = {
        source
        for union in parts
        if (left := [part for part in parts if part.number in union.lines])
        for source in _held(folder, union, left)
    }
    _drop(folder, united)
    return [part for part in parts if part.number not in united]


def _held(folder: Path, union: Standing, parts: Sequence[Standing]) -> Iterator[int]:
    """Yield the numbers of the parts whose very keys a union holds, attempts included, where it says."""
    keys = read_part(folder, union.number, KEY_COLUMNS)
    for part in parts:
        if keys.slice(union.lines[part.number], part.rows).equals(read_part(folder, part.number, KEY_COLUMNS)):
            yield part.number


def _drop(folder: Path, numbers: Iterable[int]) -> None:
    for number in numbers:
        with storage_errors(part_path(folder, number)), suppress(FileNotFoundError):
            part_path(folder, number).unlink()


def _grouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Put tables together up to the size of a full part."""
    waiting: list[pa.Table] = []
    for table in tables:
        more = [*waiting, table]
        if waiting and (sum(map(len, more)) > FULL_ROWS or sum(one.nbytes for one in more) > FULL_BYTES):
            yield pa.concat_tables(waiting)
            waiting = []
        waiting.append(table)
    if waiting:
        yield pa.concat_tables(waiting)
