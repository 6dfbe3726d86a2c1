"""`gxr-batch status`: how far a run is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from gxr_batch.run.status import RunStatus

# Places of the columns that hold words.
_TEXTS = (0, 1, 8)


@click.command(name="status")
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a run, in a list.")
def command(path: Path, as_json: bool) -> None:
    """Say how far a run is: rows done, failed, held and left, rows a minute, time left, size on disk.

    PATH is a job file, a run folder, or a folder of runs, of which each gets a line of a table. Works while a run goes
    on and never disturbs it.

    \b
    Example:
      gxr-batch status outputs/
    """
    from gxr_batch.run.status import statuses

    found = statuses(path)
    if as_json:
        click.echo(json.dumps([status.as_dict() for status in found], indent=2))
    else:
        click.echo(_line(found[0]) if len(found) == 1 else _table(found))


def _table(found: Sequence[RunStatus]) -> str:
    """Return many runs as a table, one line each; names to the left, numbers to the right."""
    header = ("run", "date", "done", "failed", "held", "left", "reviewed", "size", "state")
    lines = [header, *(_cells(status) for status in found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = []
    for cells in lines:
        padded = [
            cell.ljust(width) if place in _TEXTS else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        rows.append("  ".join(padded).rstrip())
    return "\n".join(rows)


def _cells(status: RunStatus) -> tuple[str, ...]:
    numbers = (status.ok, status.failed, status.held, status.left, status.reviewed)
    counted = ("-" if number is None else f"{number:,}" for number in numbers)
    size = "-" if status.bytes is None else f"{status.bytes / 2**20:,.1f} MiB"
    damaged = f"; {status.damaged_parts} damaged parts" if status.damaged_parts else ""
    old = f"; outdated: {', '.join(status.outdated_exports)}" if status.outdated_exports else ""
    return (status.run, status.started_at[:10] or "-", *counted, size, status.state + damaged + old)


def _workers(status: RunStatus) -> str:
    """Say how many workers live, and how many the newest start lost."""
    workers = status.workers or {}
    alive, lost = workers.get("alive"), workers.get("lost")
    text = f", {alive} worker{'s' * (alive != 1)}" if status.state == "running" and alive is not None else ""
    return text + (f", {lost} worker{'s' * (lost != 1)} lost" if lost else "")


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
    text += _workers(status)
    if status.state == "held elsewhere":
        text += f"; by {status.holder}, alive or dead; its last rows were sealed {status.last_part_at or 'never'}"
    elif status.state == "unfinished" and status.last_outcome:
        text += f"; last start: {status.last_outcome}"
    if status.reviewed:
        text += f", {status.reviewed:,} reviewed"
    if status.outdated_exports:
        text += f"; older than the results or reviews: {', '.join(status.outdated_exports)}"
    return text + (f"; {status.damaged_parts} damaged parts" if status.damaged_parts else "")
