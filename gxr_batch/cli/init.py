"""`gxr-batch init`: a commented job file for a table, checked at once."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from gxr_batch.cli.options import say_to_stderr


@click.command(name="init")
@click.argument("table", metavar="TABLE")
@click.option(
    "--to", "target", metavar="JOB.toml", type=click.Path(path_type=Path), help="Job file to write. Default: NAME.toml."
)
@click.option(
    "--column",
    "columns",
    metavar="FIELD=COLUMN",
    multiple=True,
    help="Use this column for a field of the template; repeatable. Default: guessed from names and content.",
)
@click.option("--quiet", is_flag=True, help="Show no notices.")
def command(table: str, target: Path | None, columns: tuple[str, ...], quiet: bool) -> None:
    """Write a job file for TABLE, a CSV, TSV or Parquet file or a glob, and check it.

    Comments in the file give the reason for each column, the template, the id column, the delimiter and the encoding.
    An existing file is never overwritten.

    \b
    Examples:
      gxr-batch init inputs/findings.csv
      gxr-batch init "exports/*.csv" --to nightly.toml --column findings=report_text
    """
    from gxr_batch.cli.check import print_findings
    from gxr_batch.cli.layout import plural
    from gxr_batch.job import load_job
    from gxr_batch.run.check import check
    from gxr_batch.run.new_job import guess_job

    chosen = {}
    for column in columns:
        name, equals, value = column.partition("=")
        if not equals or not name.strip() or not value:
            raise click.UsageError("--column takes FIELD=COLUMN, e.g. --column findings=report_text.")
        chosen[name.strip()] = value
    if target is not None:
        _refuse_existing(target)
    made = guess_job(table, chosen)
    path = target or Path(f"{made.name}.toml")
    _write(path, made.text())
    click.echo(f"Wrote {path} for {plural(made.rows, 'row')} of {table}. A comment gives the reason for each guess.\n")
    print_findings(made.name, check(load_job(path), limit=None, say=say_to_stderr(quiet)))
    click.echo(f"\nnext: read the prompts above and {path}, then try a few rows:")
    click.echo(f"  gxr-batch run {shlex.quote(str(path))} --limit 5")


def _refuse_existing(path: Path) -> None:
    from gxr_batch.errors import JobFileError

    if path.exists():
        raise JobFileError(
            "This file exists already, and init never overwrites a file.",
            where=str(path.absolute()),
            next_step="choose another path with --to, or delete the file",
        )


def _write(path: Path, text: str) -> None:
    """Write a new file. Raises JobFileError if it exists, StorageError if the folder cannot be written."""
    from gxr_batch.errors import StorageError

    _refuse_existing(path)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:  # made since, by another process
        _refuse_existing(path)
    except OSError as error:
        raise StorageError(
            f"The job file cannot be written: {error.strerror or type(error).__name__}.",
            where=str(path.absolute()),
            next_step="choose another path with --to",
        ) from None
