"""CSV that Excel opens as it is: UTF-8 with BOM, CRLF, every cell quoted, nothing that a spreadsheet would run.

A cell that a spreadsheet may take for a formula gets an apostrophe in front, as OWASP advises; the columns in which
that happened are named, so that nobody takes the apostrophe for the model's. The verbatim text stays in the Parquet.
"""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from gxr_batch.errors import RunError
from gxr_batch.ledger import RunReader
from gxr_batch.ledger.files import write_whole
from gxr_batch.storage import storage_errors

# What may start a formula, a command or a field in a spreadsheet (OWASP's list), full-width forms included.
FORMULA_STARTS = frozenset("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")


class Exported(NamedTuple):
    """What was written: the file, its rows, the columns with guarded cells, and whether rows are still to come."""

    path: Path
    rows: int
    guarded: tuple[str, ...]
    partial: bool


def export_csv(reader: RunReader, target: Path | None, *, partial: bool) -> Exported:
    """Write the run's results as CSV for Excel. Raises RunError where the run is unfinished and `partial` is not set.

    `target` defaults to results.csv in the run folder. Without `partial` it holds the last state with every row done.
    """
    path = target or reader.folder / "results.csv"
    with storage_errors(path):
        _refuse_target(reader, path)
    left = reader.state.counts().left
    if partial:
        names, tables = reader.schema.names, reader.finished()
    elif reader.results is not None:
        # The columns of the file itself: the table may have got others since.
        with _damage(reader.results):
            names = pq.read_schema(reader.results).names
        tables = _stored(reader.results)
    else:
        raise RunError(
            f"This run is unfinished: {left:,} rows are still to do.",
            where=str(reader.folder),
            next_step="add --partial to export the rows that are done, or let `gxr-batch run` finish it",
        )
    guarded: dict[str, None] = {}
    rows = 0

    def write(temporary: Path) -> None:
        nonlocal rows
        with temporary.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
            writer.writerow([guard(name) for name in names])
            for table in tables:
                rows += table.num_rows
                columns = [_column(table, name, guarded) for name in table.column_names]
                writer.writerows(zip(*columns, strict=True))

    write_whole(path, write)
    return Exported(path, rows, tuple(guarded), partial and left > 0)


def _refuse_target(reader: RunReader, path: Path) -> None:
    """Refuse to write over the run's own files, over its input, or over anything that is no regular file."""
    own = {"run.json", "input.parquet", "results.parquet", "failed.parquet", "run.lock", "log.jsonl", "parts"}
    inputs = {Path(file).resolve() for entry in reader.manifest.invocations for file in entry.get("input_files", ())}
    real = path.resolve()
    wrong = {
        "It is one of the run's own files.": real.parent == reader.folder.resolve() and real.name in own,
        "It is the run's input.": real in inputs,
        "It exists and is no regular file.": not path.name or (path.exists() and not path.is_file()),
        "Its folder does not exist.": not real.parent.is_dir(),
    }
    for reason, holds in wrong.items():
        if holds:
            raise RunError(
                f"The export cannot be written there. {reason}", where=str(real), next_step="choose another --to"
            )


def guard(text: str) -> str:
    """Return the text so that no spreadsheet runs it."""
    return f"'{text}" if text.lstrip(" \u00a0\u3000")[:1] in FORMULA_STARTS and text else text


def _stored(results: Path) -> Iterator[pa.Table]:
    with _damage(results), pq.ParquetFile(results) as file:
        for batch in file.iter_batches(16_384):
            table = pa.Table.from_batches([batch])
            table.validate(full=True)
            yield table


@contextmanager
def _damage(results: Path) -> Iterator[None]:
    """Turn what the Parquet reader raises inside the block into a RunError; its text may quote the file."""
    try:
        yield
    except (OSError, pa.ArrowException, ValueError):
        raise RunError(
            "The run's results are damaged.",
            where=str(results.absolute()),
            next_step=f"rename them to {results.name}.damaged and run the job again: they are put together anew",
        ) from None


def _column(table: pa.Table, name: str, guarded: dict[str, None]) -> list[str]:
    cells = []
    kind = table.schema.field(name).type
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    for value in table[name].to_pylist():
        text = as_text(value)
        if not numeric and (safe := guard(text)) is not text:
            guarded[name] = None
            text = safe
        cells.append(text)
    return cells


def as_text(value: Any) -> str:
    """Return a cell's text: empty for null, ISO for times, JSON for nested and binary values."""
    if value is None or value == []:
        return ""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="milliseconds")
    if isinstance(value, bytes):
        return json.dumps(_plain(value))
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=_plain)
    return str(value)


def _plain(value: Any) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if isinstance(value, date | time | datetime) else str(value)
