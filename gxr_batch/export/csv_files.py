"""CSV: for Excel, so that it opens as it is and runs nothing, and plain, so that a pipeline gets every cell verbatim.

For Excel: UTF-8 with BOM, CRLF, every cell quoted. A cell that a spreadsheet may take for a formula gets an apostrophe
in front, as OWASP advises; the columns in which that happened are named, so that nobody takes the apostrophe for the
model's. The verbatim text stays in the Parquet. How dates and lists are spelled is decided in cells.py.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow as pa

from gxr_batch.cells import as_text, guard, is_number
from gxr_batch.disk import write_whole
from gxr_batch.export.export_rows import Exported, Source


def write_csv(source: Source, path: Path) -> Exported:
    """Write CSV for Excel. Raises StorageError."""
    guarded: dict[str, None] = {}
    rows = _write(source, path, guarded, encoding="utf-8-sig", line_end="\r\n", quoting=csv.QUOTE_ALL)
    note = f"an apostrophe guards cells that look like formulas in: {', '.join(guarded)}"
    return Exported(path, rows, source.partial, (note,) if guarded else ())


def write_plain_csv(source: Source, path: Path) -> Exported:
    """Write CSV for pipelines: UTF-8, LF, verbatim cells. Raises StorageError."""
    rows = _write(source, path, None, encoding="utf-8", line_end="\n", quoting=csv.QUOTE_MINIMAL)
    return Exported(path, rows, source.partial)


def _write(
    source: Source, path: Path, guarded: dict[str, None] | None, *, encoding: str, line_end: str, quoting: int
) -> int:
    rows = 0

    def write(temporary: Path) -> None:
        nonlocal rows
        names = source.schema.names
        with temporary.open("w", encoding=encoding, newline="") as file:
            writer = csv.writer(file, quoting=quoting, lineterminator=line_end)  # type: ignore[arg-type]
            writer.writerow(names if guarded is None else [guard(name) for name in names])
            for table in source.tables:
                rows += table.num_rows
                columns = [_column(table, name, guarded) for name in names]
                writer.writerows(zip(*columns, strict=True))

    write_whole(path, write, unique=True)
    return rows


def _column(table: pa.Table, name: str, guarded: dict[str, None] | None) -> list[str]:
    cells = [as_text(value) for value in table[name].to_pylist()]
    if guarded is None or is_number(table.schema.field(name).type):
        return cells
    safe = [guard(cell) for cell in cells]
    if safe != cells:
        guarded[name] = None
    return safe
