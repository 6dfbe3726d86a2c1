"""Writes the HTML report of a run: one self-contained file with figures and cases.

It opens from disk, makes no network requests and stays under 8 MB: figures count all rows, the table shows up to 10,000
cases. Reads a run only through the ledger.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, NamedTuple

from gxr_batch.ledger import RunReader
from gxr_batch.ledger.exports import ExportFile
from gxr_batch.report.aggregate import survey
from gxr_batch.report.cases import case_table
from gxr_batch.report.compare import compare
from gxr_batch.report.page import Content, page

REPORT_NAME = "report.html"


class Reported(NamedTuple):
    """A written report: its file, size in bytes, rows counted in its figures, cases in its table, and notices."""

    path: Path
    size: int
    rows: int
    shown: int
    notices: tuple[str, ...]


def report(reader: RunReader, against: RunReader | None, target: Path | None, *, include_held: bool) -> Reported:
    """Write the report of a run, compared with the run `against` if given. Raises RunError, StorageError.

    A file that was changed since its export is kept under another name.
    """
    name = REPORT_NAME.replace(".", "-with-held.") if include_held else REPORT_NAME
    file = ExportFile(reader, target or reader.folder / name, comparison=against is not None)
    surveyed = survey(reader, other=against, include_held=include_held)
    comparison = None
    if against is not None:
        comparison = compare(surveyed, survey(against, most_cases=0, other=reader, include_held=include_held))
    cases = case_table(surveyed, comparison, include_held)
    notices = (*_of_the_run(reader), *cases.notices)
    if comparison is not None and not comparison.compared.matched:
        notices = ("The two runs have no row id in common, so nothing is compared.", *notices)
    text = page(Content(surveyed, reader.state.counts(), cases, notices, comparison))
    data = text.encode("utf-8", "backslashreplace")  # for paths that are not UTF-8

    def write(opened: BinaryIO) -> None:
        opened.write(data)

    file.write(write)
    return Reported(file.path, len(data), surveyed.tally.rows, cases.shown, (*notices, *file.notes))


def _of_the_run(reader: RunReader) -> tuple[str, ...]:
    """Return notices about what makes these figures provisional."""
    found = []
    if reader.holder is not None:
        found.append("The run was in progress when this report was written; write it again to include newer rows.")
    if damaged := len(reader.state.damaged):
        parts = "1 damaged part is" if damaged == 1 else f"{damaged} damaged parts are"
        found.append(f"{parts} left out; run the job again to generate their rows again.")
    return tuple(found)


__all__ = ["REPORT_NAME", "Reported", "report"]
