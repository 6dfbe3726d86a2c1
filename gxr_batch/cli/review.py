"""`gxr-batch review`: import reviewed sheets into a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gxr_batch.cli.exit_codes import Exit
from gxr_batch.cli.options import open_run

if TYPE_CHECKING:
    from gxr_batch.review.import_reviews import Imported

_MOST_LISTED = 50


@click.group(name="review")
def command() -> None:
    """Import reviewed sheets into a run.

    \b
    Example:
      gxr-batch review import outputs/demo reviewed.xlsx
    """


@command.command(name="import")
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("sheets", metavar="SHEET...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--reviewer", metavar="NAME", default="", help="Reviewer of rows whose gxr_reviewer is empty.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def import_command(run_folder: Path, sheets: tuple[Path, ...], reviewer: str, as_json: bool) -> None:
    """Import the reviews in SHEETs and store them next to the run's results.

    A SHEET is the workbook that `gxr-batch export` wrote, or its sheet Cases saved as CSV. Rows are matched by
    gxr_row_id and gxr_sample: they may be sorted, filtered or deleted, and columns moved or added. A row whose
    generated text was changed is refused and listed; all other rows are imported. Ids that a spreadsheet changed are
    matched by prompt hash and text, with a note. If two reviewers disagree, both reviews are kept and reported.

    \b
    Exit codes:
      0    every filled-in row was imported
      2    a file cannot be used
      3    some rows were refused
      4    disk full or run locked

    \b
    Example:
      gxr-batch review import outputs/demo reviewed.xlsx
    """
    from gxr_batch.review.import_reviews import import_reviews

    done = import_reviews(open_run(run_folder), sheets, reviewer)
    click.echo(json.dumps(_summary(done), indent=2) if as_json else _text(run_folder, done))
    if done.refused:
        click.get_current_context().exit(Exit.SOME_FAILED)


def _summary(done: Imported) -> dict[str, object]:
    return {
        "taken": done.taken,
        "unchanged": done.unchanged,
        "unreviewed": done.unreviewed,
        "without_verdict": done.remarks,
        "refused": [one._asdict() for one in done.refused],
        "disagreements": [
            {"row_id": one.row_id, "sample": one.sample, "verdicts": dict(one.verdicts)} for one in done.disagreements
        ],
        "notices": done.notices,
    }


def _text(run_folder: Path, done: Imported) -> str:
    from gxr_batch.cells import quoted

    lines = [
        f"{done.taken:,} reviews imported, {done.unchanged:,} unchanged, {done.unreviewed:,} rows unreviewed, "
        f"{len(done.refused):,} refused"
    ]
    lines += [
        f"  refused   {quoted(one.row_id) or '-'}{_sample(one.sample)} "
        f"({quoted(one.file)}, sheet {quoted(one.sheet)}, row {one.row}): {one.why}"
        for one in done.refused[:_MOST_LISTED]
    ]
    lines += _more(len(done.refused))
    lines += [
        f"  disagree  {quoted(one.row_id)}{_sample(one.sample)}: "
        + "; ".join(f"{quoted(name) or 'unnamed'}: {status}" for name, status in one.verdicts)
        for one in done.disagreements[:_MOST_LISTED]
    ]
    lines += _more(len(done.disagreements))
    lines += [f"  note      {notice}" for notice in done.notices]
    if done.remarks:
        lines.append(f"  note      {done.remarks:,} of these have entries but no status in gxr_review_status")
    if done.disagreements:
        lines.append("  note      cases on which reviewers disagree are left out of approved exports until they agree")
    if done.taken:
        lines.append(f"  next      gxr-batch export {quoted(run_folder)} --only approved")
    return "\n".join(lines)


def _sample(sample: int) -> str:
    return f" sample {sample}" if sample > 1 else ""


def _more(count: int) -> list[str]:
    return [f"  … and {count - _MOST_LISTED:,} more; --json lists all"] if count > _MOST_LISTED else []
