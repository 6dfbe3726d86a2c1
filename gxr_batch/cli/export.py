"""`gxr-batch export`: write a run's results as a workbook, CSV, JSONL or Parquet."""

from __future__ import annotations

from pathlib import Path

import click

from gxr_batch.cli.options import open_run

_FORMATS = ("xlsx", "csv", "csv-plain", "jsonl", "parquet", "openai-batch", "chat-jsonl")


@click.command(name="export")
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(_FORMATS), default="xlsx", show_default=True, help="File format.")
@click.option("--only", type=click.Choice(["approved"]), help="Export only rows that a reviewer approved.")
@click.option("--partial", is_flag=True, help="Export the finished rows of an unfinished run.")
@click.option("--include-held", is_flag=True, help="Include the texts of rows held by identifier screening.")
@click.option("--to", "target", type=click.Path(path_type=Path), help="Output file. Default: results.<format> in RUN.")
def command(
    run_folder: Path, form: str, only: str | None, partial: bool, include_held: bool, target: Path | None
) -> None:
    """Write a run's results for a spreadsheet or a pipeline.

    xlsx is for reviewers: a README sheet, then one row per case with columns to fill in. csv is for Excel: cells that a
    spreadsheet would run as a formula start with an apostrophe, and the columns with such cells are listed. All other
    formats keep every cell verbatim. chat-jsonl is for fine-tuning: the prompts and final texts of the approved rows,
    with the reviewers' edits. Each row has its newest review.

    \b
    Example:
      gxr-batch export outputs/demo
    """
    from gxr_batch.cells import quoted
    from gxr_batch.export import APPROVED_ONLY, Choice, export
    from gxr_batch.rows.columns import counted

    if include_held and (only or form in APPROVED_ONLY):
        raise click.UsageError("--include-held has no effect on approved rows: a held row is never approved.")
    reader = open_run(run_folder)
    choice = Choice(partial=partial, approved=only == "approved", include_held=include_held)
    done = export(reader, form, target, choice)
    click.echo(f"{quoted(done.path)}: {counted(done.rows, 'row')}{', of an unfinished run' if done.partial else ''}")
    for note in done.notes:
        click.echo(f"  {note}")
    held = reader.state.counts().held
    if held and only is None and form != "chat-jsonl":
        which = "with cells and texts" if include_held else "without cells and texts (--include-held shows them)"
        click.echo(f"  held rows: {held:,}, {which}")
