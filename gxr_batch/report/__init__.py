"""The HTML report: one self-contained file that shows a run to the people who read its results.

It opens from a disk, asks nothing of any network, and stays under 8 MB: figures are over all rows, the table shows up
to 10,000 cases. Reads a run only through the ledger.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from gxr_batch.disk import write_whole
from gxr_batch.ledger import RunReader
from gxr_batch.ledger.exports import checked_target, remember, state_of
from gxr_batch.report.aggregate import survey
from gxr_batch.report.cases import case_table
from gxr_batch.report.compare import compare
from gxr_batch.report.page import Content, page

REPORT_NAME = "report.html"


class Reported(NamedTuple):
    """What was written: the file, its bytes, the rows that its figures count and the cases that its table shows."""

    path: Path
    size: int
    rows: int
    shown: int
    notices: tuple[str, ...]


def report(reader: RunReader, against: RunReader | None, target: Path | None, *, include_held: bool) -> Reported:
    """Write the page of a run, compared with another run where `against` is given. Raises RunError, StorageError."""
    state = state_of(reader.folder)  # before anything is read: what comes later makes the page out of date
    name = REPORT_NAME.replace(".", "-with-held.") if include_held else REPORT_NAME
    path = checked_target(reader, target or reader.folder / name)
    surveyed = survey(reader, compared=against is not None, include_held=include_held)
    comparison = None
    if against is not None:
        comparison = compare(surveyed, survey(against, most_cases=0, compared=True, include_held=include_held))
    cases = case_table(surveyed, comparison, include_held)
    notices = (*_of_the_run(reader), *cases.notices)
    text = page(Content(surveyed, reader.state.counts(), cases, notices, comparison))
    data = text.encode("utf-8", "backslashreplace")  # a path that is no UTF-8

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_whole(path, write, unique=True)
    if against is None:  # a page that compares is never the one that a job's exports keep up to date
        remember(reader.folder, path, state)
    return Reported(path, len(data), surveyed.tally.rows, cases.shown, notices)


def _of_the_run(reader: RunReader) -> tuple[str, ...]:
    """Say what makes these figures less than final."""
    found = []
    if reader.holder is not None:
        found.append("The run was going on when this page was made: make it again for the rows that came since.")
    if damaged := len(reader.state.damaged):
        parts = "1 damaged part is" if damaged == 1 else f"{damaged} damaged parts are"
        found.append(f"{parts} passed over here; run the job again: it generates their rows anew.")
    return tuple(found)


__all__ = ["REPORT_NAME", "Reported", "report"]
