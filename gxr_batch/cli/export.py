"""`gxr-batch export`: write a run's results as a workbook, CSV, JSONL or Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gxr_batch.cli.options import open_run

if TYPE_CHECKING:
    from gxr_batch.ledger import RunReader

_FORMATS = ("xlsx", "csv", "csv-plain", "jsonl", "parquet", "openai-batch", "chat-jsonl")


@click.command(name="export")
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(_FORMATS), default="xlsx", show_default=True, help="File format.")
@click.option("--only", type=click.Choice(["approved"]), help="Export only rows that a reviewer approved.")
@click.option(
    "--order",
    type=click.Choice(["input", "flags"]),
    default="input",
    show_default=True,
    help="Order of the rows: that of the input, or those with most flags first.",
)
@click.option("--partial", is_flag=True, help="Export the finished rows of an unfinished run.")
@click.option("--include-held", is_flag=True, help="Include the texts of rows held by identifier screening.")
@click.option("--to", "target", type=click.Path(path_type=Path), help="Output file. Default: results.<format> in RUN.")
@click.option("--audit", "rows", type=click.IntRange(1), metavar="N", help="Draw N rows at random for reading.")
@click.option("--readers", type=click.IntRange(1, 20), help="With --audit: a workbook for each reader.")
@click.option("--overlap", type=click.IntRange(0), help="With --audit: how many rows everybody reads.")
@click.option("--by", type=click.Choice(["flags", "template"]), help="With --audit: draw from each kind of row.")
@click.option("--seed", type=int, help="With --audit: another draw.")
@click.option("--blind", is_flag=True, default=None, help="With --audit: hide model and flags.")
def command(
    run_folder: Path,
    form: str,
    only: str | None,
    order: str,
    partial: bool,
    include_held: bool,
    target: Path | None,
    rows: int | None,
    **draw: Any,
) -> None:
    """Write a run's results for a spreadsheet or a pipeline.

    xlsx is for reviewers: a README sheet, then one row per case with columns to fill in. csv is for Excel: cells that a
    spreadsheet would run as a formula start with an apostrophe, and the columns with such cells are listed. All other
    formats keep every cell verbatim. chat-jsonl is for fine-tuning: the prompts and final texts of the approved rows,
    with the reviewers' edits. Each row has its newest review.

    --audit draws rows at random and writes a workbook for each reader. `gxr-batch review summary RUN` then tells how
    many of all rows are erroneous at most. A later --audit draws further rows of the same sample.

    \b
    Examples:
      gxr-batch export outputs/demo
      gxr-batch export outputs/demo --audit 30 --readers 2 --overlap 6 --blind
    """
    from gxr_batch.cells import quoted
    from gxr_batch.export import APPROVED_ONLY, Choice, export
    from gxr_batch.rows.columns import counted

    if include_held and (only or form in APPROVED_ONLY):
        raise click.UsageError("--include-held has no effect on approved rows: a held row is never approved.")
    given = [f"--{name}" for name, value in draw.items() if value is not None]
    if rows is None and given:
        raise click.UsageError(f"{given[0]} needs --audit.")
    if rows is not None and (form != "xlsx" or only or include_held or target or order != "input"):
        raise click.UsageError(
            "--audit draws rows and names its workbooks itself: leave out --format, --only, --order, "
            "--include-held, --to."
        )
    reader = open_run(run_folder)
    if rows is not None:
        _draw(reader, rows, partial, draw)
        return
    choice = Choice(
        partial=partial, approved=only == "approved", include_held=include_held, flagged_first=order == "flags"
    )
    done = export(reader, form, target, choice)
    click.echo(f"{quoted(done.path)}: {counted(done.rows, 'row')}{', of an unfinished run' if done.partial else ''}")
    for note in done.notes:
        click.echo(f"  {note}")
    held = reader.state.counts().held
    if held and only is None and form != "chat-jsonl":
        which = "with cells and texts" if include_held else "without cells and texts (--include-held shows them)"
        click.echo(f"  held rows: {held:,}, {which}")


def _draw(reader: RunReader, rows: int, partial: bool, options: dict[str, Any]) -> None:
    from gxr_batch.cells import quoted
    from gxr_batch.export.audit_workbooks import AuditChoice, export_audit
    from gxr_batch.rows.columns import counted

    given = {name: value for name, value in options.items() if value is not None}
    drew = export_audit(reader, AuditChoice(rows=rows, partial=partial, **given))
    for done in drew.workbooks:
        click.echo(f"{quoted(done.path)}: {counted(done.rows, 'row')}")
        for note in done.notes:
            click.echo(f"  {note}")
    click.echo(f"{quoted(drew.record)}: what was drawn, and from how many rows")
    for note in drew.notes:
        click.echo(f"  {note}")
    names = " ".join(quoted(done.path) for done in drew.workbooks)
    click.echo(f"next: gxr-batch review import {quoted(reader.folder)} {names}")
    click.echo(f"then: gxr-batch review summary {quoted(reader.folder)}")
