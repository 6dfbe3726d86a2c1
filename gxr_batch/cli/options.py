"""Options that several verbs share, and how they override a job file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gxr_batch.cli.streams import safe

if TYPE_CHECKING:
    from gxr_batch.job import Job
    from gxr_batch.ledger import RunReader

F = TypeVar("F", bound=Callable[..., Any])


def job_options(function: F) -> F:
    """Add the job file argument and the options that `run` and `check` share."""
    decorators = (
        click.argument("job_file", metavar="JOB.toml", type=click.Path(path_type=Path)),
        click.option(
            "--set",
            "overrides",
            metavar="SECTION.KEY=VALUE",
            multiple=True,
            help="Override a key of the job file; repeatable; recorded in run.json.",
        ),
        click.option(
            "--limit",
            type=click.IntRange(min=1),
            metavar="N",
            help="Use only the first N rows of the table.",
        ),
        click.option("--output", metavar="DIR", help="Run folder. Default: run.output of the job file."),
        click.option("--quiet", is_flag=True, help="Show no progress and no notices."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    )
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def read_job(job_file: Path, overrides: tuple[str, ...], **run_keys: str | None) -> Job:
    """Load the job file, overridden by `--set` and by the run options that were given."""
    from gxr_batch.job import load_job

    given = {f"run.{key}": value for key, value in run_keys.items() if value is not None}
    return load_job(job_file, overrides, given)


def say_to_stderr(quiet: bool) -> Callable[[str], None]:
    """Return a function that prints a notice to stderr, or nothing with --quiet."""

    def say(sentence: str) -> None:
        if not quiet:
            click.echo(safe(sentence), err=True)

    return say


def open_run(path: Path) -> RunReader:
    """Return the run in a folder, or the run of a job file. Raises RunError if there is none, JobFileError."""
    from gxr_batch.ledger import RunReader
    from gxr_batch.run.output_folder import run_folder_of

    return RunReader(run_folder_of(path))
