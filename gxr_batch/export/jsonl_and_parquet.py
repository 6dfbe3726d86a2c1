"""Writes exports for pipelines, every cell verbatim: JSON lines, Parquet, and the output format of OpenAI's batch API.

cells.plain converts what JSON lacks (dates, bytes). Parquet keeps the column types.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import pyarrow.parquet as pq

from gxr_batch.cells import plain, rows_of
from gxr_batch.disk import lines_into
from gxr_batch.export.export_rows import Exported, Source, final_text
from gxr_batch.ledger.exports import ExportFile
from gxr_batch.records import TRUNCATED_REASONS


def write_jsonl(source: Source, file: ExportFile) -> Exported:
    """Write one JSON object per row, with every column. Raises StorageError."""
    return _lines(source, file, lambda row: row)


def write_openai_batch(source: Source, file: ExportFile) -> Exported:
    """Write rows as lines of a batch output file. Raises StorageError.

    `custom_id` is the row id, or `id/2` if rows have several samples.
    """
    several = int(source.reader.manifest.job["sampling"]["samples_per_row"]) > 1
    return _lines(source, file, lambda row: _batch_line(row, several))


def write_parquet(source: Source, file: ExportFile) -> Exported:
    """Write Parquet with the column types kept. Raises StorageError."""
    rows = 0

    def write(target: BinaryIO) -> None:
        nonlocal rows
        with pq.ParquetWriter(target, source.schema, compression="zstd") as writer:
            for table in source.tables:
                rows += table.num_rows
                writer.write_table(table.cast(source.schema))

    file.write(write)
    return Exported(file.path, rows, source.partial)


def _lines(source: Source, file: ExportFile, line: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Exported:
    rows = 0

    def write(target: BinaryIO) -> None:
        nonlocal rows
        with lines_into(target, newline="\n") as lines:
            for table in source.tables:
                rows += table.num_rows
                for row in rows_of(table):
                    lines.write(
                        json.dumps(_finite(line(row)), ensure_ascii=False, allow_nan=False, default=plain) + "\n"
                    )

    file.write(write)
    return Exported(file.path, rows, source.partial)


def _finite(value: Any) -> Any:
    """Return a value with null in place of NaN and infinities, which JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list) else value


def _batch_line(row: Mapping[str, Any], several: bool) -> dict[str, Any]:
    # Repeated ids get `#2` in the table, so samples need another separator.
    name = f"{row['gxr_row_id']}/{row['gxr_sample']}" if several else row["gxr_row_id"]
    failed = row["gxr_text"] is None  # a held row has its text only if it was requested
    body = {
        "object": "chat.completion",
        "model": row["gxr_model"],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": final_text(row)},
                "finish_reason": "length"
                if row["gxr_finish_reason"] in TRUNCATED_REASONS
                else row["gxr_finish_reason"],
            }
        ],
        "usage": {"prompt_tokens": row["gxr_prompt_tokens"], "completion_tokens": row["gxr_new_tokens"]},
        "metadata": {"ai_generated": row["gxr_ai_generated"], "disclaimer": row["gxr_disclaimer"]},
    }
    return {
        "custom_id": name,
        "response": None if failed else {"status_code": 200, "body": body},
        "error": {"message": row["gxr_error"]} if row["gxr_error"] else None,
    }
