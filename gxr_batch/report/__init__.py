"""The morning page: one self-contained HTML file that shows a run to the people who read its results.

It opens from a disk, asks nothing of any network, and stays under 5 MB: figures are over all rows, the table shows up
to 10,000 cases. Reads a run only through the ledger.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from gxr_batch.ledger import RunReader
from gxr_batch.ledger.exports import remember, state_of
from gxr_batch.ledger.files import write_whole
from gxr_batch.ledger.targets import checked_target
from gxr_batch.legend import EVERY_FLAG
from gxr_batch.report.aggregate import MOST_CASES, Cases, Surveyed, survey
from gxr_batch.report.cases import columns_of, findings_of, held
from gxr_batch.report.compare import Comparison, case_columns, compare, other_rows
from gxr_batch.report.invocations import mapping
from gxr_batch.report.packing import Packed, pack
from gxr_batch.report.page import Content, page, reader_name

REPORT_NAME = "report.html"
# Of the 5 MB of a page; charts and their tables, style and script take the rest.
MOST_PACKED_BYTES = 4_780_000


class Reported(NamedTuple):
    """What was written: the file, its bytes, the rows that its figures count and the cases that its table shows."""

    path: Path
    size: int
    rows: int
    shown: int
    notices: tuple[str, ...]


class _Table(NamedTuple):
    """The packed cases, which column stands beside the texts, and what the reader should know of them."""

    packed: Packed
    findings: str
    shown: int
    sentence: str
    notices: tuple[str, ...]


def report(reader: RunReader, against: RunReader | None, target: Path | None, *, include_held: bool) -> Reported:
    """Write the page of a run, beside another run's where `against` is given. Raises RunError, StorageError."""
    state = state_of(reader.folder)  # before anything is read: what comes later makes the page out of date
    name = REPORT_NAME.replace(".", "-with-held.") if include_held else REPORT_NAME
    path = checked_target(reader, target or reader.folder / name)
    surveyed = survey(reader, compared=against is not None, include_held=include_held)
    comparison = None
    if against is not None:
        comparison = compare(surveyed, survey(against, most_cases=0, compared=True, include_held=include_held))
    table = _fitting_table(surveyed, comparison, include_held)
    counts = reader.state.counts()
    notices = (*_of_the_run(reader), *table.notices)
    text = page(Content(surveyed, counts, table.packed, table.findings, table.sentence, notices, comparison))
    data = text.encode("utf-8", "backslashreplace")  # a path that is no UTF-8
    write_whole(path, lambda temporary: _write(temporary, data), unique=True)
    if against is None:  # a page beside another run is never the page of the morning
        remember(reader.folder, path, state)
    return Reported(path, len(data), surveyed.tally.rows, table.shown, notices)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _fitting_table(surveyed: Surveyed, comparison: Comparison | None, include_held: bool) -> _Table:
    """Return the table with as many cases as the page has room for; no text is cut to make room for another."""
    most = MOST_CASES
    while True:
        cases = surveyed.chooser.cases(surveyed.reader.schema, most)
        table = _table(surveyed, cases, comparison, include_held)
        if table.packed.size <= MOST_PACKED_BYTES or table.shown <= 1:
            return table
        most = max(1, int(table.shown * MOST_PACKED_BYTES / table.packed.size * 0.97))


def _table(surveyed: Surveyed, cases: Cases, comparison: Comparison | None, include_held: bool) -> _Table:
    hidden = held(cases.table)
    beside = other_rows(comparison, cases) if comparison else None
    if beside is not None:  # what one of the runs holds back the other must not give away
        hidden = [here or there for here, there in zip(hidden, held(beside), strict=True)]
    hidden = [one and not include_held for one in hidden]
    columns, shortened = columns_of(cases.table, hidden)
    mapped = mapping(mapping(surveyed.reader.manifest.job.get("input")).get("columns")).get("findings", "findings")
    findings = findings_of(columns, mapped)
    if comparison and beside is not None:
        more, cut = case_columns(comparison, cases, beside, hidden)
        columns, shortened = columns + more, shortened + cut
    head = {
        "rows": cases.table.num_rows,
        "places": cases.places.tolist(),
        "findings": findings,
        "other": reader_name(comparison.other.reader) if comparison else "",
        "legend": EVERY_FLAG,
        "include_held": include_held,
        "columns": [column.head() for column in columns],
    }
    packed = pack(head, [column.values for column in columns if column.kind == "words"])
    notices = _notices(shortened, sum(hidden))
    return _Table(packed, findings, cases.table.num_rows, _sentence(surveyed, cases), notices)


def _sentence(surveyed: Surveyed, cases: Cases) -> str:
    """Say which cases the table shows."""
    shown, rows = cases.table.num_rows, surveyed.tally.rows
    if shown == rows:
        return f"All {rows:,} finished rows, each beside the text that was generated for it."
    which = "the first that failed, are held or have a flag"
    if not cases.marked_only:
        which = "all that failed, are held or have a flag, and the first of the others"
    return (
        f"{shown:,} of {rows:,} finished rows: {which}. The others stand in the run folder; "
        "gxr-batch export writes all of them as a workbook."
    )


def _of_the_run(reader: RunReader) -> tuple[str, ...]:
    """Say what makes these figures less than final."""
    found = []
    if reader.holder is not None:
        found.append("The run was going on when this page was made: make it again for the rows that came since.")
    if damaged := len(reader.state.damaged):
        parts = "1 damaged part is" if damaged == 1 else f"{damaged} damaged parts are"
        found.append(f"{parts} passed over here; run the job again: it generates their rows anew.")
    return tuple(found)


def _notices(shortened: int, withheld: int) -> tuple[str, ...]:
    found = []
    if withheld:
        rows = "1 held row" if withheld == 1 else f"{withheld:,} held rows"
        found.append(f"Cells and text of {rows} are withheld here; gxr-batch report --include-held shows them.")
    if shortened:
        cells = "1 very long cell is" if shortened == 1 else f"{shortened:,} very long cells are"
        found.append(f"{cells} shortened in this page; the run's Parquet has the whole.")
    return tuple(found)


__all__ = ["REPORT_NAME", "Reported", "report"]
