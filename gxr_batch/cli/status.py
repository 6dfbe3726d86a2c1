"""`gxr-batch status`: how far a run is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from gxr_batch.status import RunStatus


@click.command(name="status")
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a run, in a list.")
def command(path: Path, as_json: bool) -> None:
    """Say how far a run is: rows done, failed, held and left, rows a minute, time left, size on disk.

    PATH is a job file, a run folder, or a folder of runs. Works while a run goes on and never disturbs it.

    \b
    Example:
      gxr-batch status outputs/
    """
    from gxr_batch.status import statuses

    found = statuses(path)
    if as_json:
        click.echo(json.dumps([status.as_dict() for status in found], indent=2))
    else:
        click.echo("\n".join(_line(status) for status in found))


def _line(status: RunStatus) -> str:
    from gxr_batch.cli.progress import duration

    if status.ok is None or status.left is None:
        return f"{status.run}: {status.state}"
    text = f"{status.run}: {status.state}, {status.ok:,} generated, {status.failed:,} failed, {status.held:,} held"
    text += f", {status.left:,} left"
    if status.rows_a_minute is not None:
        text += f", {status.rows_a_minute:,.1f} rows/min"
    if status.seconds_left is not None:
        text += f", {duration(status.seconds_left)} to go"
    text += f", {(status.bytes or 0) / 2**20:,.1f} MiB, {status.invocations} start{'s' * (status.invocations != 1)}"
    if status.state == "held elsewhere":
        text += f"; by {status.holder}, alive or dead; its last rows were sealed {status.last_part_at or 'never'}"
    elif status.state == "unfinished" and status.last_outcome:
        text += f"; last start: {status.last_outcome}"
    if status.reviewed:
        text += f", {status.reviewed:,} reviewed"
    if status.outdated_exports:
        text += f"; older than the results or reviews: {', '.join(status.outdated_exports)}"
    return text + (f"; {status.damaged_parts} damaged parts" if status.damaged_parts else "")
