"""Options that several verbs share, and how they are laid over a job file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from gxr_batch.job import Job

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
            help="Override a key of the job file; repeatable; recorded in the run's manifest.",
        ),
        click.option(
            "--limit",
            type=click.IntRange(min=1),
            metavar="N",
            help="Take the table's first N rows. Default: all.",
        ),
        click.option("--output", metavar="DIR", help="Use this run folder. Default: run.output of the job file."),
        click.option("--quiet", is_flag=True, help="Show neither progress nor notices."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    )
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def read_job(job_file: Path, overrides: tuple[str, ...], **run_keys: str | None) -> Job:
    """Load the job file with `--set` and the run options that were given laid over it."""
    from gxr_batch.job import load_job

    given = {f"run.{key}": value for key, value in run_keys.items() if value is not None}
    return load_job(job_file, overrides, given)


def say_to_stderr(quiet: bool) -> Callable[[str], None]:
    """Return a function that prints a sentence for the user, or nothing where they asked for quiet."""

    def say(sentence: str) -> None:
        if not quiet:
            click.echo(sentence, err=True)

    return say
