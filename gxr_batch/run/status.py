"""The state of a run, also while it is running: counts from the parts, speed from the newest invocation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from gxr_batch.disk import storage_errors
from gxr_batch.errors import MachineError, RunError, StorageError
from gxr_batch.ledger import Counts, RunReader, is_run
from gxr_batch.ledger.exports import outdated
from gxr_batch.run.output_folder import run_folder_of


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """The state of a run at one moment. Unknown values are None.

    `state` is running, finished or unfinished; "held elsewhere" if a process on another host holds the run, alive or
    dead (`holder` names it, `last_part_at` is when it last sealed rows); or why the run cannot be read. `workers` are
    those of the newest invocation, for engines that have several: how many were alive when that last changed, how often
    one was lost, and the rows that each had returned by then.
    """

    run: str
    name: str
    state: str
    ok: int | None = None
    failed: int | None = None
    held: int | None = None
    left: int | None = None
    rows_a_minute: float | None = None
    seconds_left: float | None = None
    started_at: str = ""
    invocations: int = 0
    workers: dict[str, Any] | None = None
    last_outcome: str | None = None
    last_part_at: str | None = None
    holder: str | None = None
    damaged_parts: int = 0
    reviewed: int | None = None
    outdated_exports: tuple[str, ...] = ()
    bytes: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)


def statuses(path: Path) -> list[RunStatus]:
    """Return the status of the run that `path` names: a job file, a run folder, or a folder of runs (newest last).

    Raises RunError if there is no run, JobFileError if the job file cannot be read.
    """
    if path.suffix == ".toml":
        return [_status(run_folder_of(path))]
    with storage_errors(path):
        return _statuses_of_folder(path)


def _statuses_of_folder(path: Path) -> list[RunStatus]:
    if path.is_dir() and not is_run(path):
        runs = sorted((folder for folder in path.iterdir() if is_run(folder)), key=lambda folder: folder.name)
        if runs:
            return [_status_or_trouble(folder) for folder in runs]
    if not path.exists():
        raise RunError(
            "There is no such job file, run folder or folder of runs.",
            where=str(path.absolute()),
            next_step="e.g. gxr-batch status outputs/",
        )
    return [_status(path)]


def _status_or_trouble(folder: Path) -> RunStatus:
    """Return a run's status; an unreadable run must not hide the others."""
    try:
        return _status(folder)
    except (RunError, MachineError) as error:
        return RunStatus(
            run=str(folder),
            name=folder.name,
            state=f"unreadable: {error.what}",
        )


def _status(folder: Path) -> RunStatus:
    reader = RunReader(folder)
    counts = reader.state.counts()
    invocations = reader.manifest.invocations
    last = invocations[-1] if invocations else {}
    holder = reader.holder
    running = holder is not None and not holder.elsewhere
    speed = _rows_a_minute(folder, last, counts.total - counts.left, running)
    written = max(_written_at(folder / "parts"), default=None)
    return RunStatus(
        run=str(folder),
        name=reader.manifest.name,
        state=_state(reader, counts, last),
        rows_a_minute=speed,
        seconds_left=counts.left / speed * 60 if running and speed else None,
        started_at=invocations[0].get("started_at", "") if invocations else "",
        invocations=len(invocations),
        workers=last.get("workers"),
        last_outcome=None if running else last.get("outcome", "no end recorded"),
        last_part_at=datetime.fromtimestamp(written).astimezone().isoformat(timespec="seconds") if written else None,
        holder=str(holder) if holder else None,
        damaged_parts=len(reader.state.damaged),
        reviewed=_reviewed(reader),
        outdated_exports=_outdated(folder),
        bytes=_size(folder),
        **counts._asdict(),
    )


def _reviewed(reader: RunReader) -> int | None:
    """Count the reviewed keys; None if a review file is damaged or unreadable, which does not affect the run."""
    try:
        return len(reader.reviews)
    except (RunError, StorageError):
        return None


def _outdated(folder: Path) -> tuple[str, ...]:
    """Return the outdated exports; none if the reviews, which are part of the state, cannot be read."""
    try:
        return tuple(outdated(folder))
    except StorageError:
        return ()


def _state(reader: RunReader, counts: Counts, last: dict[str, Any]) -> str:
    if reader.holder is not None:
        return "held elsewhere" if reader.holder.elsewhere else "running"
    done = counts.left == 0 and reader.results is not None and last.get("outcome") == "finished"
    return "finished" if done else "unfinished"


def _size(folder: Path) -> int:
    """Return the bytes of a run's files that this user may see; a file being renamed is counted once or not at all."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError, PermissionError):
                size += os.stat(os.path.join(parent, name)).st_size
    return size


def _rows_a_minute(folder: Path, invocation: dict[str, Any], done: int, running: bool) -> float | None:
    """Return the newest invocation's speed: its own measurement once it has ended, from its parts while it runs."""
    if not running:
        rows, seconds = invocation.get("done"), invocation.get("streaming_seconds")
        return rows / seconds * 60 if rows and seconds else None
    parts = list(_written_at(folder / "parts"))
    began = invocation.get("generating_since")
    if not parts or began is None:
        return None
    seconds = max(parts) - datetime.fromisoformat(began).timestamp()
    fresh = done - int(invocation.get("done_before", 0))
    return fresh / seconds * 60 if seconds > 0 and fresh > 0 else None


def _written_at(parts: Path) -> Iterator[float]:
    """Yield when each part was written, except parts that are being set aside."""
    for path in parts.glob("part-*.parquet"):
        with suppress(FileNotFoundError):
            yield path.stat().st_mtime
