"""Exit codes, and how an error becomes one message and an exit code."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import click

from gxr_batch.cli.streams import safe
from gxr_batch.errors import ApiOutage, GxrError, MachineError

# With less, libraries end the process without a word to us.
_LEAST_MEMORY = 512 * 2**20
# In messages of the dynamic loader, Python's threads and torch.
_NO_MEMORY = re.compile(r"failed to map segment|annot allocate memory|can't start new thread|can't allocate memory")


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
    import resource  # here, as traceback below: `--help` needs neither

    try:
        if 0 <= resource.getrlimit(resource.RLIMIT_AS)[0] < _LEAST_MEMORY:
            raise MemoryError
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
    except Exception as error:
        if lack := _lack(error):
            click.echo(f"Error: {lack}", err=True)
            ctx.exit(Exit.MACHINE)
        _report_other(ctx, error)


def _report_other(ctx: click.Context, error: Exception) -> None:
    """Report a missing permission as such, everything else as a bug."""
    if isinstance(error, PermissionError) and isinstance(error.filename, str):
        from gxr_batch.disk import denied  # imports pyarrow, which takes time

        click.echo(safe(f"Error: {denied(error.filename)}"), err=True)
        ctx.exit(Exit.MACHINE)
    click.echo(safe(bug_report(error)), err=True)
    ctx.exit(Exit.BUG)


def _lack(error: BaseException | None) -> MachineError | None:
    """Return the error to report if memory or descriptors ran out; libraries show that in many ways."""
    import resource

    while error is not None:
        number, text = getattr(error, "errno", None), str(error)
        if number in (errno.EMFILE, errno.ENFILE):
            return MachineError(
                "This process may not open more files.",
                where=f"ulimit -n: {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}",
                next_step="raise it, then run the same command again; generated rows are safe",
            )
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        limited = limit != resource.RLIM_INFINITY
        if (
            isinstance(error, MemoryError)
            or number == errno.ENOMEM
            or (isinstance(error, ImportError | RuntimeError) and _NO_MEMORY.search(text))
            # How an extension module fails whose initialisation got no memory.
            or (limited and isinstance(error, SystemError))
        ):
            return MachineError(
                "There is not enough memory.",
                where=f"ulimit -v: {limit / 2**20:,.0f} MiB" if limited else "this machine, or its container",
                next_step="raise the limit or free memory, then run the same command again; generated rows are safe",
            )
        error = error.__cause__ or error.__context__
    return None


def bug_report(error: BaseException | None) -> str:
    """Return the traceback of a bug without error messages, which may quote a cell."""
    import traceback

    lines: list[str] = []
    while error is not None:
        own = [*traceback.format_tb(error.__traceback__), f"{type(error).__name__} (its message may quote the table)\n"]
        lines = ["Traceback (most recent call last):\n", *own, *lines]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "".join([*lines, "This is a bug in gxr-batch: please report the lines above. Generated rows are safe."])
