"""The format of a run folder, and how a version handles the folders of earlier and later ones.

FORMAT grows by one with every change to a column, a key or a file of a run; run.json and every part carry it. An
earlier folder is read as it is: a missing column reads as null. A later one is refused as a whole, in one message and
before anything in it is touched: a version that does not know a column cannot know what its rows mean.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from gxr_batch.cells import quoted
from gxr_batch.errors import LaterVersion, StorageError
from gxr_batch.records import LIST_COLUMNS

# 1: up to commit 2d832e8, only run.json carries it. 2: parts carry it too.
# 3: gxr_reasoning; cells of more types, input.null_values = "common", run.lock with boot and file.
# 4: input.only, and a run folder as input.path.
# 5: gxr_findings_kept, gxr_findings_lost.
# 6: forms: job key form, fingerprint key form, columns gxr_section_... of results, gxr_finish_reason "closed".
# 7: the version of the form, which says how sections share the token limit.
# 8: the version of the rules of templates, the hash of the model's tokenizer and configuration, and in input.parquet
# how whole numbers are hashed.
FORMAT = 8
FORMAT_MARK = "gxr_format"
# Columns that earlier versions wrote and this one no longer reads. None so far.
RETIRED_COLUMNS: frozenset[str] = frozenset()
# Leaves more numbers than one invocation can use.
_MOST_FILES = 90_000_000
# The year 9999, in milliseconds since 1970.
_END_OF_TIME = 253_370_764_800_000


def later_version(path: Path, unknown: str) -> LaterVersion:
    """Return the error for a file of a run that a later version wrote; `unknown` names what this one does not know."""
    return LaterVersion(
        f"This run was made by a later version of gxr-batch: {quoted(unknown)} is unknown to this one.",
        where=str(path.absolute()),
        next_step="update gxr-batch; the run was not changed",
    )


def refuse_later_format(path: Path, number: object) -> None:
    """Raise LaterVersion if a file has a format that this version does not know, or one that is not a number."""
    if type(number) is not int or not 1 <= number <= FORMAT:
        raise later_version(path, f"format {ascii(number)[:20]}")


def refuse_later_mark(path: Path, stored: pa.Schema) -> None:
    """Raise LaterVersion if a Parquet file's mark has a later format; no mark means the first format."""
    mark = (stored.metadata or {}).get(FORMAT_MARK.encode(), b"1")
    refuse_later_format(path, int(mark) if mark.isdigit() and len(mark) < 10 else mark)


def refuse_later_file(path: Path, stored: pa.Schema, known: Collection[str]) -> None:
    """Raise LaterVersion if a Parquet file has a later format, or columns beyond `known`."""
    refuse_later_mark(path, stored)
    unknown = sorted(set(stored.names) - set(known) - RETIRED_COLUMNS)
    if unknown:
        raise later_version(path, f"column {unknown[0]}")


def next_number(home: Path, used: Iterable[int]) -> int:
    """Return the number of the next part or review file in a folder, above all that are used.

    Raises StorageError if a name has one of the last numbers, which only a person can have given it: names have eight
    digits, and a file with more would not be found again.
    """
    number = max(used, default=0) + 1
    if number > _MOST_FILES:
        raise StorageError(
            f"A file has a number that no run reaches: {number - 1}.",
            where=str(home.absolute()),
            next_step="find out who put it there, move it away, then run the same command again",
        )
    return number


def columns_in(stored: pa.Schema, wanted: Sequence[str]) -> list[str]:
    """Return the wanted columns that a file has."""
    return [name for name in wanted if name in stored.names]


def require_readable(table: pa.Table) -> None:
    """Raise ValueError if a result column has a time that Python lacks, or a list with a missing item."""
    for name in {"gxr_started_at", "gxr_finished_at"} & {*table.column_names}:
        found = pc.min_max(table[name].cast(pa.int64()))
        if found["min"].is_valid and not 0 <= found["min"].as_py() <= found["max"].as_py() < _END_OF_TIME:
            raise ValueError
    for name in {*LIST_COLUMNS} & {*table.column_names}:
        if pc.list_flatten(table[name]).null_count:
            raise ValueError


def with_missing_columns(table: pa.Table, wanted: Sequence[str], schema: pa.Schema) -> pa.Table:
    """Return the wanted columns in order, null if the table lacks one. Raises LookupError for a repeated column."""
    present = set(table.column_names)
    columns = [table[name] if name in present else pa.nulls(len(table), schema.field(name).type) for name in wanted]
    fields = [table.schema.field(name) if name in present else schema.field(name) for name in wanted]
    return pa.Table.from_arrays(columns, schema=pa.schema(fields, metadata=table.schema.metadata))
