"""Exit codes, and how an error becomes one message and an exit code."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import click

from gxr_batch.cli.streams import safe
from gxr_batch.errors import ApiOutage, GxrError, MachineError


class Exit(IntEnum):
    """The exit codes; docs/run-folder.md explains each."""

    DONE = 0
    BUG = 1
    INPUT = 2
    SOME_FAILED = 3
    MACHINE = 4
    MAX_FAILED = 5
    STOPPED = 75
    INTERRUPTED = 130


class Terminated(BaseException):
    """Raised by SIGTERM, SIGUSR1 or SIGHUP, in `run` before any row is generated: there is nothing to finish."""


@contextmanager
def reported(ctx: click.Context) -> Iterator[None]:
    """Turn an error that a user can fix into a message on stderr and an exit code. A bug keeps its traceback."""
    try:
        yield
    except ApiOutage as error:
        click.echo(safe(f"Error: {error}"), err=True)
        ctx.exit(Exit.STOPPED)
    except GxrError as error:
        click.echo(safe(f"Error: {error}"), err=True)
        ctx.exit(Exit.MACHINE if isinstance(error, MachineError) else Exit.INPUT)
    except KeyboardInterrupt:
        click.echo("Stopped by Ctrl-C. Run the same command again to continue.", err=True)
        ctx.exit(Exit.INTERRUPTED)
    except Terminated:
        before = "before any row was generated" if ctx.invoked_subcommand == "run" else "by a signal"
        click.echo(f"Stopped {before}. Run the same command again to resume.", err=True)
        ctx.exit(Exit.STOPPED)
    except (click.exceptions.Exit, click.ClickException, click.Abort):
        raise
    except PermissionError as error:
        if not isinstance(error.filename, str):
            click.echo(bug_report(error), err=True)
            ctx.exit(Exit.BUG)
        from gxr_batch.disk import denied  # imports pyarrow, which takes time

        click.echo(safe(f"Error: {denied(error.filename)}"), err=True)
        ctx.exit(Exit.MACHINE)
    except Exception as error:
        click.echo(safe(bug_report(error)), err=True)
        ctx.exit(Exit.BUG)


def bug_report(error: BaseException | None) -> str:
    """Return the traceback of a bug without error messages, which may quote a cell."""
    lines: list[str] = []
    while error is not None:
        own = [*traceback.format_tb(error.__traceback__), f"{type(error).__name__} (its message may quote the table)\n"]
        lines = ["Traceback (most recent call last):\n", *own, *lines]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "".join([*lines, "This is a bug in gxr-batch: please report the lines above. Generated rows are safe."])
