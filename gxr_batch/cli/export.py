"""`gxr-batch export`: a run's results for a spreadsheet."""

from __future__ import annotations

from pathlib import Path

import click

_FORMATS = ("xlsx", "csv", "csv-plain", "jsonl", "parquet", "openai-batch", "chat-jsonl")


@click.command(name="export")
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(_FORMATS), default="xlsx", show_default=True, help="Kind of file.")
@click.option("--only", type=click.Choice(["approved"]), help="Take the rows that a reviewer approved.")
@click.option("--partial", is_flag=True, help="Take the rows that are done, of a run that is unfinished.")
@click.option("--include-held", is_flag=True, help="Show the texts that identifier screening holds back.")
@click.option("--to", "target", type=click.Path(path_type=Path), help="Write here. Default: results.<format> in RUN.")
def command(
    run_folder: Path, form: str, only: str | None, partial: bool, include_held: bool, target: Path | None
) -> None:
    """Write a run's results for a spreadsheet or a pipeline.

    xlsx is for reviewers: a README sheet, then one row a case with columns to fill in. csv is for Excel: cells that a
    spreadsheet would run as a formula start with an apostrophe, and the columns in which that happened are named. All
    other formats hold every cell verbatim. chat-jsonl is for fine-tuning: the prompts and the approved texts, with the
    reviewer's edits, of the rows that a reviewer approved. The newest review of each row is laid over it.

    \b
    Example:
      gxr-batch export outputs/demo
    """
    from gxr_batch.export import APPROVED_ONLY, Choice, export
    from gxr_batch.ledger import RunReader

    if include_held and (only or form in APPROVED_ONLY):
        raise click.UsageError("--include-held is of no use here: a held row is never an approved one.")
    reader = RunReader(run_folder)
    choice = Choice(partial=partial, approved=only == "approved", include_held=include_held)
    done = export(reader, form, target, choice)
    click.echo(f"{done.path}: {done.rows:,} rows{', of an unfinished run' if done.partial else ''}")
    for note in done.notes:
        click.echo(f"  {note}")
    held = reader.state.counts().held
    if held and only is None and form != "chat-jsonl":
        which = "with cells and texts" if include_held else "without cells and texts (--include-held shows them)"
        click.echo(f"  held rows: {held:,}, {which}")
