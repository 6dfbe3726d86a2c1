"""Writes a run's results for people and for pipelines; reads a run only through the ledger."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gxr_batch.export.delimited import write_csv, write_plain_csv
from gxr_batch.export.pipelines import write_jsonl, write_openai_batch, write_parquet
from gxr_batch.export.source import Exported, Source, open_source
from gxr_batch.export.xlsx import write_xlsx
from gxr_batch.ledger import RunReader
from gxr_batch.ledger.targets import checked_target

# format -> (its writer, the file that it makes in the run folder)
FORMATS: dict[str, tuple[Callable[[Source, Path], Exported], str]] = {
    "xlsx": (write_xlsx, "results.xlsx"),
    "csv": (write_csv, "results.csv"),
    "csv-plain": (write_plain_csv, "results-plain.csv"),
    "jsonl": (write_jsonl, "results.jsonl"),
    "parquet": (write_parquet, "results-export.parquet"),
    "openai-batch": (write_openai_batch, "results-openai-batch.jsonl"),
}


def export(reader: RunReader, form: str, target: Path | None, *, partial: bool) -> Exported:
    """Write a run's results in one of FORMATS. Raises RunError, StorageError."""
    write, name = FORMATS[form]
    path = checked_target(reader, target or reader.folder / name)
    return write(open_source(reader, partial=partial), path)


__all__ = ["FORMATS", "Exported", "export"]
