"""`gxr-batch export`: a run's results for a spreadsheet."""

from __future__ import annotations

from pathlib import Path

import click

_BUILT = ("csv",)
_FORMATS = ("xlsx", "csv", "csv-plain", "jsonl", "parquet", "openai-batch", "chat-jsonl")


@click.command(name="export")
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(_FORMATS), default="csv", show_default=True, help="Kind of file.")
@click.option("--only", type=click.Choice(["approved"]), help="Not available yet.")
@click.option("--partial", is_flag=True, help="Take the rows that are done, of a run that is unfinished.")
@click.option("--include-held", is_flag=True, help="Not available yet.")
@click.option("--to", "target", type=click.Path(path_type=Path), help="Write here. Default: results.csv in RUN.")
def command(
    run_folder: Path, form: str, only: str | None, partial: bool, include_held: bool, target: Path | None
) -> None:
    """Write a run's results for a spreadsheet.

    csv is for Excel: UTF-8 with BOM, every cell quoted, and cells that a spreadsheet would run as a formula start with
    an apostrophe. The columns in which that happened are named.

    \b
    Example:
      gxr-batch export outputs/demo --format csv
    """
    from gxr_batch.errors import NotAvailable
    from gxr_batch.export import export_csv
    from gxr_batch.ledger import RunReader

    if form not in _BUILT:
        raise NotAvailable(f"--format {form}")
    if only:
        raise NotAvailable(f"--only {only}")
    if include_held:
        raise NotAvailable("--include-held")
    done = export_csv(RunReader(run_folder), target, partial=partial)
    click.echo(f"{done.path}: {done.rows:,} rows{', unfinished' if done.partial else ''}")
    if done.guarded:
        click.echo(f"  an apostrophe guards cells that look like formulas in: {', '.join(done.guarded)}")
