"""Writes CSV for Excel, with formulas disarmed, and plain CSV for pipelines, with every cell verbatim.

For Excel: UTF-8 with BOM, CRLF, every cell quoted. A cell that a spreadsheet may read as a formula gets a leading
apostrophe, as OWASP advises, and a note lists the columns with such cells. The verbatim text stays in results.parquet.
cells.py formats dates and lists.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import BinaryIO

import pyarrow as pa

from gxr_batch.cells import as_text, guard, is_number, quoted
from gxr_batch.disk import lines_into
from gxr_batch.export.export_rows import Exported, Source, cells_of
from gxr_batch.ledger.exports import ExportFile


def write_csv(source: Source, file: ExportFile) -> Exported:
    """Write CSV for Excel. Raises StorageError."""
    guarded: dict[str, None] = {}
    rows = _write(source, file, guarded, encoding="utf-8-sig", line_end="\r\n", quoting=csv.QUOTE_ALL)
    note = f"cells that look like formulas start with an apostrophe, in: {', '.join(map(quoted, guarded))}"
    return Exported(file.path, rows, source.partial, (note,) if guarded else ())


def write_plain_csv(source: Source, file: ExportFile) -> Exported:
    """Write CSV for pipelines: UTF-8, LF, verbatim cells. Raises StorageError."""
    rows = _write(source, file, None, encoding="utf-8", line_end="\n", quoting=csv.QUOTE_MINIMAL)
    return Exported(file.path, rows, source.partial)


def _write(
    source: Source, file: ExportFile, guarded: dict[str, None] | None, *, encoding: str, line_end: str, quoting: int
) -> int:
    rows = 0

    def write(target: BinaryIO) -> None:
        nonlocal rows
        names = source.schema.names
        with lines_into(target, encoding=encoding, newline="") as lines:
            usual = csv.writer(lines, quoting=quoting, lineterminator=line_end)  # type: ignore[arg-type]
            quoted_all = csv.writer(lines, quoting=csv.QUOTE_ALL, lineterminator=line_end)

            def write_row(cells: Sequence[str]) -> None:
                # Before Python 3.13 the library leaves a lone carriage return unquoted, and readers end the row there.
                (quoted_all if any("\r" in cell for cell in cells) else usual).writerow(cells)

            write_row(names if guarded is None else [guard(name) for name in names])
            for table in source.tables:
                rows += table.num_rows
                for cells in zip(*(_column(table, name, guarded) for name in names), strict=True):
                    write_row(cells)

    file.write(write)
    return rows


def _column(table: pa.Table, name: str, guarded: dict[str, None] | None) -> list[str]:
    cells = [as_text(value) for value in cells_of(table, name)]
    if guarded is None or is_number(table.schema.field(name).type):
        return cells
    safe = [guard(cell) for cell in cells]
    if safe != cells:
        guarded[name] = None
    return safe
