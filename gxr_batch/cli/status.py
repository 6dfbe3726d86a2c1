"""`gxr-batch status`: the progress of one run, or a table of all runs in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from gxr_batch.run.status import RunStatus

# Columns of the table that are left out if no run has anything in them.
_OPTIONAL = ("failed", "held", "reviewed")
_LEFT_ALIGNED = ("run", "date", "state")


@click.command(name="status")
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print a list with one JSON object for each run.")
def command(path: Path, as_json: bool) -> None:
    """Show the progress of a run: rows generated, failed, held and left, speed, time left, disk space.

    PATH is a job file, a run folder, or a folder of runs, which are listed in a table. Works during a run and does not
    affect it.

    \b
    Examples:
      gxr-batch status jobs/demo.toml
      gxr-batch status outputs/
    """
    from gxr_batch.run.status import statuses

    found = statuses(path)
    if as_json:
        click.echo(json.dumps([status.as_dict() for status in found], indent=2))
    else:
        click.echo("\n".join(_one(found[0]) if len(found) == 1 else _table(found)))


def _table(found: Sequence[RunStatus]) -> list[str]:
    """Return the lines of a table with one run each."""
    from gxr_batch.cli.layout import columns

    rows = [_cells(status) for status in found]
    names = [name for name in rows[0] if name not in _OPTIONAL or any(row[name] not in "0-" for row in rows)]
    left_aligned = [place for place, name in enumerate(names) if name in _LEFT_ALIGNED]
    return columns([names, *([row[name] for name in names] for row in rows)], left_aligned)


def _cells(status: RunStatus) -> dict[str, str]:
    from gxr_batch.cells import quoted
    from gxr_batch.cli.layout import mib
    from gxr_batch.rows.columns import counted

    def count(number: int | None) -> str:
        return "-" if number is None else f"{number:,}"

    damaged = f"; {status.damaged_parts} damaged parts" if status.damaged_parts else ""
    old = f"; {counted(len(status.outdated_exports), 'outdated export')}" if status.outdated_exports else ""
    return {
        "run": quoted(Path(status.run)),
        "date": quoted(status.started_at[:10]) or "-",
        "done": count(status.ok),
        "failed": count(status.failed),
        "held": count(status.held),
        "left": count(status.left),
        "reviewed": count(status.reviewed),
        "size": "-" if status.bytes is None else mib(status.bytes),
        "state": quoted(status.state) + damaged + old,
    }


def _one(status: RunStatus) -> Iterator[str]:
    from gxr_batch.cells import quoted
    from gxr_batch.cli.layout import labelled, mib
    from gxr_batch.cli.run import STOPPED
    from gxr_batch.rows.columns import counted

    if status.ok is None or status.left is None:
        yield f"{quoted(Path(status.run))}: {quoted(status.state)}"
        return
    yield (
        f"{quoted(Path(status.run))}: {quoted(status.state)}, {status.ok:,} generated, {status.failed:,} failed, "
        f"{status.held:,} held, {status.left:,} left"
    )
    entries = [("speed", speed) for speed in _speed(status)]
    if status.state == "running" and status.holder:
        entries.append(("written by", status.holder))
    entries += [("workers", workers) for workers in _workers(status)]
    if status.state == "held elsewhere":
        entries.append(("held by", f"{status.holder}, alive or dead; last checkpoint {status.last_part_at or 'never'}"))
    elif status.state == "unfinished" and status.last_outcome:
        entries.append(("last time", STOPPED.get(status.last_outcome, quoted(status.last_outcome.replace("_", " ")))))
    if status.reviewed:
        entries.append(("reviewed", counted(status.reviewed, "row")))
    if status.outdated_exports:
        entries.append(
            ("outdated", f"{', '.join(map(quoted, status.outdated_exports))}: older than the results or reviews")
        )
    if status.damaged_parts:
        entries.append(
            ("damaged", f"{counted(status.damaged_parts, 'part')}; `gxr-batch run` generates their rows again")
        )
    entries.append(("size", f"{mib(status.bytes or 0)}, {counted(status.invocations, 'invocation')}"))
    yield from labelled(entries)


def _speed(status: RunStatus) -> Iterator[str]:
    from gxr_batch.cli.layout import duration, rate

    if status.rows_a_minute is not None:
        left = "" if status.seconds_left is None else f", {duration(status.seconds_left)} left"
        yield f"{rate(status.rows_a_minute)} rows/min{left}"


def _workers(status: RunStatus) -> Iterator[str]:
    """Yield how many workers are alive, and how many the newest invocation lost."""
    workers = status.workers or {}
    alive, lost = workers.get("alive"), workers.get("lost")
    shown = [f"{alive} alive"] if status.state == "running" and alive is not None else []
    shown += [f"{lost} lost"] if lost else []
    if shown:
        yield ", ".join(shown)
