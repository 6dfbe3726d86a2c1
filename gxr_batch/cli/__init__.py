"""The command line: one file a verb. Only here is click imported and are exit codes picked.

Verbs are imported when they are called, and what they need inside their functions, so that `--help` answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from gxr_batch.cli.exit_codes import Exit, reported
from gxr_batch.cli.streams import careful_streams
from gxr_batch.errors import StorageError
from gxr_batch.models.library_output import progress_on_stderr

# verb -> the line that `gxr-batch --help` shows; the verb itself lives in the module of that name
VERBS = {
    "init": "Write a job file for a table.",
    "run": "Generate a teaching case for every row of a table.",
    "check": "Try everything of a job but the model's weights.",
    "status": "Say how far a run is.",
    "show": "Show one case on the terminal.",
    "export": "Write a run's results for a spreadsheet.",
    "review": "Take reviewed sheets back into a run.",
    "report": "Write a run as one HTML page.",
    "generate": "Answer one prompt, or a conversation.",
    "bench": "Measure this machine.",
    "finetune": "Train a LoRA adapter on reviewed rows.",
    "templates": "List, show or preview prompt templates.",
}


class Verbs(click.Group):
    """Finds verbs by name without importing the others, and turns errors into messages and exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of a working day."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the verb's module and return its command."""
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"gxr_batch.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs from the table above instead of importing each."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command line with streams that may be full or closed, `--help` included."""
        with careful_streams():
            try:
                return super().main(*args, **extra)
            except StorageError as error:  # one of `--help` or of an error's own message
                click.echo(f"Error: {error}", err=True)
                sys.exit(Exit.MACHINE)

    def invoke(self, ctx: click.Context) -> object:
        """Run a verb; user and machine errors end in one message and the contract's exit code."""
        # Threads that wait for each other give the processor away after an instant instead of spinning on it. Beside
        # other work that is several times faster, and alone it costs little. Read when torch loads its OpenMP runtime.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        with reported(ctx), progress_on_stderr():
            return super().invoke(ctx)


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gxr-batch", prog_name="gxr-batch")
def main() -> None:
    """Generate chest X-ray teaching cases in bulk from a table of findings.

    For research and education only, never for clinical use: every text is AI-generated and unreviewed until a person
    has reviewed it.

    \b
    Example:
      gxr-batch check jobs/demo.toml
      gxr-batch run jobs/demo.toml
    """
