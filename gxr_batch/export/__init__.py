"""Writes a run's results for people and for pipelines; reads a run only through the ledger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gxr_batch.export.chat_jsonl import write_chat_jsonl
from gxr_batch.export.csv_files import write_csv, write_plain_csv
from gxr_batch.export.export_rows import Exported, Source, only_approved, open_source
from gxr_batch.export.jsonl_and_parquet import write_jsonl, write_openai_batch, write_parquet
from gxr_batch.export.workbook import write_xlsx
from gxr_batch.ledger import RunReader
from gxr_batch.ledger.exports import checked_target, keep_changed, remember, state_of

# format -> (its writer, the file that it makes in the run folder)
FORMATS: dict[str, tuple[Callable[[Source, Path], Exported], str]] = {
    "xlsx": (write_xlsx, "results.xlsx"),
    "csv": (write_csv, "results.csv"),
    "csv-plain": (write_plain_csv, "results-plain.csv"),
    "jsonl": (write_jsonl, "results.jsonl"),
    "parquet": (write_parquet, "results-export.parquet"),
    "openai-batch": (write_openai_batch, "results-openai-batch.jsonl"),
    "chat-jsonl": (write_chat_jsonl, "approved-chat.jsonl"),
}
# Nobody trains on what nobody approved.
APPROVED_ONLY = {"chat-jsonl"}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which rows: of an unfinished run too, only those that a reviewer approved, with the texts of held rows."""

    partial: bool = False
    approved: bool = False
    include_held: bool = False


def export(reader: RunReader, form: str, target: Path | None, choice: Choice) -> Exported:
    """Write a run's results in one of FORMATS. Raises RunError, TemplateError, StorageError.

    Approved rows alone go to a file of their own (`approved.xlsx`), so that they never replace the whole; so do texts
    that are held. A file in the run folder that was changed since it was exported is kept under another name.
    """
    write, _ = FORMATS[form]
    state = state_of(reader.folder)  # before anything is read: what comes later makes the file out of date
    path = checked_target(reader, target or default_path(reader, form, choice))
    source = open_source(reader, partial=choice.partial, include_held=choice.include_held)
    approved = choice.approved or form in APPROVED_ONLY
    aside = keep_changed(reader.folder, path)
    done = write(only_approved(source) if approved else source, path)
    remember(reader.folder, path, state)
    kept = (
        (f"the file that stood there was changed since it was exported, and is kept as {aside.name}",) if aside else ()
    )
    return done._replace(notes=(*done.notes, *kept))


def default_path(reader: RunReader, form: str, choice: Choice) -> Path:
    """Return where an export goes where nobody says otherwise."""
    _, name = FORMATS[form]
    if choice.approved or form in APPROVED_ONLY:
        name = name.replace("results", "approved", 1)
    elif choice.include_held:
        name = name.replace("results", "results-with-held", 1)
    return reader.folder / name


__all__ = ["APPROVED_ONLY", "FORMATS", "Choice", "Exported", "default_path", "export"]
