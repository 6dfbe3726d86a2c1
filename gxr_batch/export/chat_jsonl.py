"""Writes approved cases as fine-tuning data: each row's prompt and its approved text.

Prompts are rendered again with the functions of `run` and compared with the recorded hashes, so that training uses only
prompts that the model saw.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from gxr_batch.disk import lines_into
from gxr_batch.errors import RowError, RunError
from gxr_batch.export.export_rows import Exported, Source, final_text
from gxr_batch.job import Job
from gxr_batch.ledger.exports import ExportFile
from gxr_batch.prompts import Templates
from gxr_batch.prompts.render import field_map, messages_sha256, render, row_template
from gxr_batch.records import Messages
from gxr_batch.rows.columns import counted, prompt_values

_ROLES = {"system": "system", "user": "user", "model": "assistant"}
_MARKS = ("gxr_row_id", "gxr_sample", "gxr_review_status", "gxr_reviewer", "gxr_ai_generated", "gxr_disclaimer")


def write_chat_jsonl(source: Source, file: ExportFile) -> Exported:
    """Write approved rows as chat messages, one JSON object per line. Raises RunError, TemplateError, StorageError."""
    prompts = _Prompts(source)
    rows = lost = 0

    def write(target: BinaryIO) -> None:
        nonlocal rows, lost
        with lines_into(target, newline="\n") as lines:
            for table in source.tables:
                for row, messages in zip(table.to_pylist(), prompts.of(table), strict=True):
                    if messages is None:
                        lost += 1
                    else:
                        rows += 1
                        lines.write(json.dumps(_line(row, messages), ensure_ascii=False) + "\n")

    file.write(write)
    note = (
        f"{counted(lost, 'row')} left out: the prompt cannot be reproduced (the template was edited since, or the "
        "prompt was cut)"
    )
    return Exported(file.path, rows, source.partial, (note,) if lost else ())


class _Prompts:
    """Renders the prompts of a run's rows again, with the run's template, system text and columns."""

    def __init__(self, source: Source) -> None:
        try:
            job = Job.model_validate(source.reader.manifest.job)
        except ValueError:  # pydantic's message may quote the file
            raise RunError(
                "The job in the run's manifest cannot be read.", where=str(source.reader.folder / "run.json")
            ) from None
        self._system, self._templates = job.prompt.system, Templates(job.prompt, source.reader.form)
        own = [name for name in source.schema.names if not name.startswith("gxr_")]
        self._fields = field_map(self._templates, job, own)

    def of(self, table: pa.Table) -> Iterator[Messages | None]:
        """Yield each row's prompt, or None if it differs from the prompt that the model saw."""
        cells = {name: prompt_values(table, column) for name, column in self._fields.columns.items()}
        names, recorded = table["gxr_template"].to_pylist(), table["gxr_prompt_sha256"].to_pylist()
        for at, (name, sha256) in enumerate(zip(names, recorded, strict=True)):
            values = {field: column[at] for field, column in cells.items()}
            if name is None:  # written by a version that did not record it
                yield None
                continue
            try:
                messages = render(row_template(self._templates, name), values, system=self._system)
            except RowError:
                yield None
            else:
                yield messages if messages_sha256(messages) == sha256 else None


def _line(row: dict[str, Any], messages: Messages) -> dict[str, Any]:
    turns = [{"role": _ROLES[turn.role], "content": turn.text} for turn in messages.turns]
    return {
        "messages": [*turns, {"role": "assistant", "content": final_text(row)}],
        "metadata": {name: row[name] for name in _MARKS},
    }
