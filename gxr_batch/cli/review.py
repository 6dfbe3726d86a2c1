"""`gxr-batch review`: import reviewed sheets into a run, and say what they show."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gxr_batch.cli.exit_codes import Exit
from gxr_batch.cli.options import open_run

if TYPE_CHECKING:
    from gxr_batch.audit.summary import Rate, Summary
    from gxr_batch.review.import_reviews import Imported

_MOST_LISTED = 50


@click.group(name="review")
def command() -> None:
    """Import reviewed sheets into a run, and say what they show.

    \b
    Examples:
      gxr-batch review import outputs/demo reviewed.xlsx
      gxr-batch review summary outputs/demo
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


@command.command(name="summary")
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def summary_command(run_folder: Path, as_json: bool) -> None:
    """Say how many rows of a run are erroneous at most, from the rows drawn by `export --audit` and read since.

    A row is erroneous if a reader rejected it or counted a significant error in it. Shows agreement between readers,
    how often each kind of error occurs, how good the flags are, and what to do next. The bound holds at every look:
    read, look, read more and look again.

    \b
    Example:
      gxr-batch review summary outputs/demo
    """
    from gxr_batch.audit import summary

    found = summary.summarise(open_run(run_folder))
    click.echo(json.dumps(summary.as_json(found), indent=2) if as_json else "\n".join(_figures(found)))


def _figures(found: Summary) -> Iterator[str]:
    from gxr_batch.cli.layout import labelled
    from gxr_batch.rows.columns import counted

    whole = found.whole
    yield (
        f"{whole.read:,} of {counted(found.drawn, 'drawn row')} read, from {found.frame_rows:,} generated rows; "
        f"{whole.erroneous:,} erroneous" + (f", {whole.unknown:,} unknown" if whole.unknown else "")
    )
    entries = [*_of_the_run(found), *_of_the_readers(found), *_of_the_flags(found), *_notes(found)]
    yield from labelled([*entries, ("next", found.advice)])


def _of_the_run(found: Summary) -> Iterator[tuple[str, str]]:
    from gxr_batch.audit.error_bounds import LEVEL
    from gxr_batch.rows.columns import counted

    whole = found.whole
    if whole.rate is not None:
        yield "rate", f"{whole.rate:.1%} of all rows, at most {whole.bound:.1%} ({LEVEL:.0%}, at every look)"
    if found.single_look is not None:
        yield "one look", f"at most {found.single_look:.1%}, if the number to read was fixed beforehand"
    if whole.unknown:
        yield "unknown", "approved with edits, without counts: bounds count them as erroneous"
    for label, rates in (("stratum", found.strata), ("template", found.templates)):
        # Strata that are templates are not listed twice.
        if len(rates) > 1 and (label == "stratum" or rates.keys() - found.strata.keys()):
            yield from ((label, _rate_line(name, rate)) for name, rate in rates.items())
    for kind, count in sorted(found.kinds.items(), key=lambda item: -item[1]):
        yield "error", f"{kind.replace('_', ' ')}: {counted(count, 'row')}"


def _of_the_readers(found: Summary) -> Iterator[tuple[str, str]]:
    from gxr_batch.cells import quoted
    from gxr_batch.rows.columns import counted

    for name, (read, wrong) in found.readers.items():
        yield "reader", f"{quoted(name)}: {read:,} read, {wrong:,} erroneous"
    if found.shared:
        alpha = "undefined, all said the same" if found.alpha is None else f"{found.alpha:.2f}"
        share = f"{found.agreed:,} of {counted(found.shared, 'row')} ({found.agreed / found.shared:.0%})"
        yield "agreement", f"{share}, Krippendorff's alpha {alpha}"
    for key, said in found.differing[:_MOST_LISTED]:
        who = "; ".join(f"{quoted(name)}: {finding}" for name, finding in said.items())
        yield "differ", f"{quoted(key.row_id)}{_sample(key.sample)}: {who}"


def _of_the_flags(found: Summary) -> Iterator[tuple[str, str]]:
    from gxr_batch.cells import quoted

    for name, quality in found.flags.items() if found.whole.read else ():
        precision = "-" if quality.precision is None else f"{quality.precision:.0%}"
        recall = "-" if quality.recall is None else f"{quality.recall:.0%}"
        count = f"{quality.erroneous:,} of {quality.flagged:,} erroneous"
        yield "flag", f"{quoted(name)}: {count}, precision {precision}, recall {recall}"


def _notes(found: Summary) -> Iterator[tuple[str, str]]:
    from gxr_batch.rows.columns import counted

    if 0 < found.whole.read < found.drawn:
        yield "note", "the figures hold if the rows left unread were not left for what they say"
    if found.generated != found.frame_rows:
        rows = counted(found.generated, "generated row")
        yield "note", f"the run has {rows} now; the figures are of the {found.frame_rows:,} that were drawn from"
    if found.changed:
        yield "note", f"{counted(found.changed, 'drawn row')} with another text now, not counted"
    if found.elsewhere:
        yield "note", f"{counted(found.elsewhere, 'reviewed row')} outside the draw, not counted"


def _rate_line(name: str, rate: Rate) -> str:
    from gxr_batch.cells import quoted

    share = "-" if rate.rate is None else f"{rate.rate:.1%}"
    most = f" (at most {rate.bound:.1%})" if rate.rows else ""
    return f"{quoted(name) or '-'}: {rate.erroneous:,} of {rate.read - rate.unknown:,} erroneous, {share}{most}"


def _summary(done: Imported) -> dict[str, object]:
    return {
        "taken": done.taken,
        "unchanged": done.unchanged,
        "unreviewed": done.unreviewed,
        "without_verdict": done.remarks,
        "withdrawn": done.withdrawn,
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
    if done.withdrawn:
        lines.append(f"  note      {done.withdrawn:,} of these withdraw an earlier review")
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
