"""Writes a run's results for people and for pipelines; reads a run only through the ledger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gxr_batch.export.delimited import write_csv, write_plain_csv
from gxr_batch.export.pipelines import write_jsonl, write_openai_batch, write_parquet
from gxr_batch.export.source import Exported, Source, only_approved, open_source
from gxr_batch.export.training import write_chat_jsonl
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
    "chat-jsonl": (write_chat_jsonl, "approved-chat.jsonl"),
}
# Nobody trains on what nobody approved.
_APPROVED_ONLY = {"chat-jsonl"}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which rows: of an unfinished run too, only those that a reviewer approved, with the texts of held rows."""

    partial: bool = False
    approved: bool = False
    include_held: bool = False


def export(reader: RunReader, form: str, target: Path | None, choice: Choice) -> Exported:
    """Write a run's results in one of FORMATS. Raises RunError, TemplateError, StorageError.

    Approved rows alone go to a file of their own (`approved.xlsx`), so that they never replace the whole.
    """
    write, _ = FORMATS[form]
    approved = choice.approved or form in _APPROVED_ONLY
    path = checked_target(reader, target or default_path(reader, form, approved=approved))
    source = open_source(reader, partial=choice.partial, include_held=choice.include_held)
    return write(only_approved(source) if approved else source, path)


def default_path(reader: RunReader, form: str, *, approved: bool = False) -> Path:
    """Return where an export of this format goes where nobody says otherwise."""
    _, name = FORMATS[form]
    return reader.folder / (name.replace("results", "approved", 1) if approved else name)


__all__ = ["FORMATS", "Choice", "Exported", "default_path", "export"]
