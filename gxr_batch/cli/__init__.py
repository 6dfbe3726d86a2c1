"""The command line, one file for each verb. click is imported only here, and exit codes are chosen only here.

A verb is imported when it is called, and imports what it needs inside its functions, so that `--help` is fast.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from typing import Any

import click

from gxr_batch.cli.exit_codes import Exit, reported
from gxr_batch.cli.streams import careful_streams
from gxr_batch.errors import StorageError

# verb -> the line that `gxr-batch --help` shows; the verb is in the module of that name
VERBS = {
    "init": "Write a job file for a table.",
    "run": "Generate a teaching case for every row of a table.",
    "check": "Check a job without loading the model; show three prompts.",
    "status": "Show the progress of a run, or of all runs in a folder.",
    "show": "Show one case in the terminal.",
    "export": "Write a workbook for reviewers, or another format.",
    "review": "Import reviewed sheets into a run.",
    "report": "Write an HTML report of a run.",
    "compare": "Say which of two runs over the same rows is better.",
    "generate": "Generate from one prompt, or chat.",
    "bench": "Measure load time, speed and memory on this machine.",
    "finetune": "Train a LoRA adapter on reviewed cases.",
    "templates": "List, show or preview prompt templates.",
    "forms": "List or show forms, the headings that every text has.",
}


class Verbs(click.Group):
    """Finds verbs by name without importing the others, and turns errors into messages and exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order in which people use them."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the verb's module and return its command."""
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"gxr_batch.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs from VERBS, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command line, `--help` included, with streams that may be full or closed."""
        with careful_streams():
            try:
                return super().main(*args, **extra)
            except StorageError as error:  # raised by `--help`, or while an error was printed
                click.echo(f"Error: {error}", err=True)
                sys.exit(Exit.MACHINE)

    def invoke(self, ctx: click.Context) -> object:
        """Run a verb. Turn user and machine errors into one message and an exit code."""
        from gxr_batch.cli.signals import ended_cleanly
        from gxr_batch.models.library_output import progress_on_stderr
        from gxr_batch.models.offline import asked_only_by_fetch

        # Waiting threads yield the CPU after a moment instead of spinning: several times faster if other work shares
        # the machine, and little slower if not. Read when torch loads its OpenMP runtime.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        # Imports make hundreds of thousands of objects, nearly all of which stay: collections in between cost 5 % of a
        # short command.
        gc.set_threshold(50_000, *gc.get_threshold()[1:])
        with reported(ctx), ended_cleanly(), progress_on_stderr(), asked_only_by_fetch():
            return super().invoke(ctx)


_START = """\
gxr-batch generates chest X-ray teaching cases in bulk from a table of findings.
For research and education only, never for clinical use.

Start here:
  gxr-batch init TABLE.csv         write a job file for your table, and check it
  gxr-batch run JOB.toml           generate; the same command again resumes
  gxr-batch show outputs/NAME      read a case
  gxr-batch export outputs/NAME    write a workbook for reviewers

Without a table: gxr-batch run jobs/demo.toml (or: make demo)
All commands:    gxr-batch --help"""


@click.group(cls=Verbs, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gxr-batch", prog_name="gxr-batch")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Generate chest X-ray teaching cases in bulk from a table of findings.

    For research and education only, never for clinical use: every text is AI-generated and unreviewed until a person
    has reviewed it.

    \b
    Examples:
      gxr-batch init TABLE.csv
      gxr-batch run jobs/demo.toml
    """
    if ctx.invoked_subcommand is None:
        click.echo(_START)
