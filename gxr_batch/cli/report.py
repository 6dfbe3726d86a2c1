"""`gxr-batch report`: a run as an HTML report."""

from __future__ import annotations

from pathlib import Path

import click

from gxr_batch.cli.options import open_run


@click.command(name="report")
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--against",
    metavar="RUN2",
    type=click.Path(path_type=Path),
    help="Show the texts of this run next to those of RUN.",
)
@click.option(
    "--include-held", is_flag=True, help="Include the cells and texts of held rows. Default: they are left out."
)
@click.option("--to", "target", type=click.Path(path_type=Path), help="Output file. Default: report.html in RUN.")
def command(run_folder: Path, against: Path | None, include_held: bool, target: Path | None) -> None:
    """Write an HTML report of a run: what ran, how fast, charts, and the cases to read.

    One file that opens in any browser without a network. It contains the cases: store it where the run may be stored.
    Works during a run. The table shows up to 10,000 cases, the figures count all rows. --against compares the same rows
    of two runs, matched by row id, e.g. to judge an adapter or a template.

    \b
    Example:
      gxr-batch report outputs/demo
      gxr-batch report outputs/new-adapter --against outputs/demo
    """
    from gxr_batch.cells import quoted
    from gxr_batch.report import report
    from gxr_batch.rows.columns import counted

    other = open_run(against) if against is not None else None
    done = report(open_run(run_folder), other, target, include_held=include_held)
    click.echo(f"{quoted(done.path)}: {counted(done.rows, 'row')}, {done.shown:,} to read, {done.size / 1e6:,.1f} MB")
    for notice in done.notices:
        click.echo(f"  {notice}")
