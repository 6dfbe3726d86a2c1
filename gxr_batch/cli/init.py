"""`gxr-batch init`: a commented job file for a table, checked at once."""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gxr_batch.cli.options import say_to_stderr
from gxr_batch.errors import JobFileError, MachineError, StorageError

if TYPE_CHECKING:
    from gxr_batch.run.check import CheckResult


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
@click.option(
    "--names",
    metavar="NAME,NAME,...",
    help="Name the columns of a table without a header line, from the first to the last one.",
)
@click.option("--quiet", is_flag=True, help="Show no notices.")
def command(table: str, target: Path | None, columns: tuple[str, ...], names: str | None, quiet: bool) -> None:
    """Write a job file for TABLE, a file, a folder or a glob, and check it.

    A table is CSV, TSV, JSON Lines (each perhaps compressed), Parquet or an Excel workbook. Comments in the job file
    give the reason for each column, the template, the id column, the delimiter and the encoding. An existing file is
    never overwritten.

    \b
    Examples:
      gxr-batch init inputs/findings.csv
      gxr-batch init "exports/*.csv" --to nightly.toml --column findings=report_text
      gxr-batch init captions.txt --names id,findings
    """
    from gxr_batch.cells import quoted
    from gxr_batch.cli.check import print_findings
    from gxr_batch.rows.columns import counted
    from gxr_batch.run.new_job import guess_job

    chosen = {}
    for column in columns:
        name, equals, value = column.partition("=")
        if not equals or not name.strip() or not value:
            raise click.UsageError("--column takes FIELD=COLUMN, e.g. --column findings=report_text.")
        chosen[name.strip()] = value
    if target is not None:
        _refuse_existing(target)
    column_names = [name.strip() for name in names.split(",")] if names is not None else []
    if not all(column_names) or len(set(column_names)) < len(column_names):
        raise click.UsageError("--names takes a different name for each column, e.g. --names id,findings.")
    made = guess_job(table, chosen, target.stem if target is not None else "", column_names)
    path = target or Path(f"{made.name}.toml")
    _refuse_existing(path)
    made = replace(made, name=_unused(made.name))
    found, trouble = _checked(made.text(), say_to_stderr(quiet))
    _write(path, made.text())
    wrote, source = quoted(path), quoted(Path(table))
    click.echo(
        f"Wrote {wrote} for {counted(made.rows, 'row')} of {source}. A comment gives the reason for each guess.\n"
    )
    if trouble is not None:
        raise trouble
    print_findings(made.name, found)
    if found.usable:
        click.echo(f"\nnext: read the prompts above and {wrote}, then try a few rows:")
        click.echo(f"  gxr-batch run {quoted(Path(shlex.quote(str(path))))} --limit 5")
    else:
        click.echo(f"\nnext: no row of {source} can be used; change the table or {wrote}, then")
        click.echo(f"  gxr-batch check {quoted(Path(shlex.quote(str(path))))}")


def _unused(name: str) -> str:
    """Return the name, numbered if its run folder holds something already: two tables never share one by accident."""
    numbered = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(free for free in numbered if not (Path("outputs") / free).exists())


def _checked(text: str, say: Callable[[str], None]) -> tuple[CheckResult, MachineError | None]:
    """Check a job before it is written. Raises UserError, so that no file is left that cannot be used.

    Returns what was found, and an error of the machine, such as a model that is not installed: the job is sound then.
    """
    from gxr_batch.disk import temporary_folder, write_text
    from gxr_batch.job import load_job
    from gxr_batch.run.check import CheckResult, check

    with temporary_folder("gxr-batch-init") as scratch:
        draft = scratch / "job.toml"
        write_text(draft, text)
        job = load_job(draft)
        try:
            return check(job, limit=None, say=say), None
        except MachineError as error:
            return CheckResult(folder=Path()), error


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):  # a link counts, wherever it leads
        raise JobFileError(
            "This file exists already, and init never overwrites a file.",
            where=str(path.absolute()),
            next_step="choose another name with --to, or delete the file",
        )


def _write(path: Path, text: str) -> None:
    """Write a new file. Raises JobFileError if it exists, StorageError if the folder cannot be written."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:  # made since, by another process
        _refuse_existing(path)
        raise
    except OSError as error:
        raise StorageError(
            f"The job file cannot be written: {error.strerror or type(error).__name__}.",
            where=str(path.absolute()),
            next_step="choose another place with --to",
        ) from None
