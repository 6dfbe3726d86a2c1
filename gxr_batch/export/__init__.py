"""Exports a run's results for reviewers and pipelines. Reads a run only through the ledger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gxr_batch.export.chat_jsonl import write_chat_jsonl
from gxr_batch.export.csv_files import write_csv, write_plain_csv
from gxr_batch.export.export_rows import Exported, Source, flagged_first, only_approved, open_source
from gxr_batch.export.jsonl_and_parquet import write_jsonl, write_openai_batch, write_parquet
from gxr_batch.export.workbook import write_xlsx
from gxr_batch.ledger import RunReader
from gxr_batch.ledger.exports import ExportFile

# format -> (writer, default file name in the run folder)
FORMATS: dict[str, tuple[Callable[[Source, ExportFile], Exported], str]] = {
    "xlsx": (write_xlsx, "results.xlsx"),
    "csv": (write_csv, "results.csv"),
    "csv-plain": (write_plain_csv, "results-plain.csv"),
    "jsonl": (write_jsonl, "results.jsonl"),
    "parquet": (write_parquet, "results-export.parquet"),
    "openai-batch": (write_openai_batch, "results-openai-batch.jsonl"),
    "chat-jsonl": (write_chat_jsonl, "approved-chat.jsonl"),
}
# Training data holds approved texts only.
APPROVED_ONLY = {"chat-jsonl"}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which rows to export: allow an unfinished run, only approved rows, include the texts of held rows.

    `flagged_first`: those with most flags first, instead of the order of the input.
    """

    partial: bool = False
    approved: bool = False
    include_held: bool = False
    flagged_first: bool = False


def export(reader: RunReader, form: str, target: Path | None, choice: Choice) -> Exported:
    """Write a run's results in one of FORMATS. Raises RunError, TemplateError, StorageError.

    Exports of approved rows, and exports with held texts, have separate default names (`approved.xlsx`) and never
    replace the full export. A file that was changed since its export is kept under another name, and one that is no
    export of this run is refused.
    """
    write, _ = FORMATS[form]
    file = ExportFile(reader, target or default_path(reader, form, choice))
    approved = choice.approved or form in APPROVED_ONLY

    def opened() -> Source:
        source = open_source(reader, partial=choice.partial, include_held=choice.include_held)
        return only_approved(source) if approved else source

    source = flagged_first(opened) if choice.flagged_first else opened()
    done = write(source, file)
    none = ("no row of this run is approved yet",) if approved and not done.rows and not done.notes else ()
    return done._replace(notes=(*done.notes, *none, *file.notes))


def default_path(reader: RunReader, form: str, choice: Choice) -> Path:
    """Return the default path of an export."""
    _, name = FORMATS[form]
    if choice.approved or form in APPROVED_ONLY:
        name = name.replace("results", "approved", 1)
    elif choice.include_held:
        name = name.replace("results", "results-with-held", 1)
    return reader.folder / name


__all__ = ["APPROVED_ONLY", "FORMATS", "Choice", "Exported", "default_path", "export"]
