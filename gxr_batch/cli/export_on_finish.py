"""The exports that a job asks for, written when its run is finished. One that fails is reported and fails nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gxr_batch.cli.exit_codes import bug_report
from gxr_batch.errors import GxrError

if TYPE_CHECKING:
    from gxr_batch.ledger import RunReader


def write_exports(folder: Path, formats: Sequence[str], say: Callable[[str], None]) -> dict[str, str]:
    """Write a finished run in these formats, but for files that are there and made of its present state.

    Returns what became of each format: written, current or failed. A failure is said on stderr, asked for quiet or not.
    """
    outcome: dict[str, str] = {}
    if not formats:
        return outcome
    from gxr_batch.ledger import RunReader

    for form in formats:
        try:
            written = _write(RunReader(folder), form)
        except GxrError as error:
            click.echo(f"The export as {form} failed; the results are safe. {error}", err=True)
            outcome[form] = "failed"
        except Exception as error:  # nobody may lose a night's results to a bug in an export
            click.echo(f"The export as {form} failed; the results are safe.\n{bug_report(error)}", err=True)
            outcome[form] = "failed"
        else:
            outcome[form] = "written" if written else "current"
            if written:
                say(written)
    return outcome


def _write(reader: RunReader, form: str) -> str:
    """Write one export; return what to tell the user, "" where it is there already."""
    from gxr_batch.export import Choice, default_path, export
    from gxr_batch.ledger.exports import is_current
    from gxr_batch.report import REPORT_NAME, report

    path = reader.folder / REPORT_NAME if form == "report" else default_path(reader, form, Choice())
    if is_current(reader.folder, path):
        return ""
    if form == "report":
        page = report(reader, None, None, include_held=False)
        return "\n".join([f"Exported {page.path}: {page.shown:,} cases of {page.rows:,} rows", *page.notices])
    done = export(reader, form, None, Choice())
    return "\n".join([f"Exported {done.path}: {done.rows:,} rows", *done.notes])
