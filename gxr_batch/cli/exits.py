"""Exit codes of the contract, and how errors become one message and a code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import click

from gxr_batch.errors import GxrError, MachineError


class Exit(IntEnum):
    """What an exit code says; the README explains each."""

    DONE = 0
    BUG = 1
    INPUT = 2
    SOME_FAILED = 3
    MACHINE = 4
    MAX_FAILED = 5
    STOPPED = 75
    INTERRUPTED = 130


class Terminated(BaseException):
    """SIGTERM or SIGUSR1 before anything was generated: there is nothing to finish."""


@contextmanager
def reported(ctx: click.Context) -> Iterator[None]:
    """Turn an error that somebody can mend into its message on stderr and its exit code; bugs keep their traceback."""
    try:
        yield
    except GxrError as error:
        click.echo(f"Error: {error}", err=True)
        ctx.exit(Exit.MACHINE if isinstance(error, MachineError) else Exit.INPUT)
    except KeyboardInterrupt:
        click.echo("Stopped by Ctrl-C. Run the same command again to go on.", err=True)
        ctx.exit(Exit.INTERRUPTED)
    except Terminated:
        click.echo("Stopped before this start generated a row. Run the same command again to go on.", err=True)
        ctx.exit(Exit.STOPPED)
