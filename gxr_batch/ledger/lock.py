"""One writer a run folder: an operating-system lock on run.lock, and in it the name of who holds it.

On one machine the system's lock decides, and it is gone when its holder is, however it died. Shared file systems do not
always carry such locks from one machine to another, so what the file says counts too: a record that was not closed and
names another host keeps others out until somebody takes over who knows that host's run to be dead.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from gxr_batch.disk import storage_errors
from gxr_batch.errors import RunLocked

LOCK_NAME = "run.lock"
# The system rounds a process's start; two starts under one number are further apart than this.
_START_TOLERANCE = 1.5


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that took the lock last: host, number, when it started (seconds since 1970), since when it holds."""

    host: str
    pid: int
    started: float
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    @property
    def elsewhere(self) -> bool:
        """Whether it runs, or ran, on another machine."""
        return self.host != socket.gethostname()

    @property
    def alive(self) -> bool:
        """Whether that very process still runs here. Of other machines nothing is known."""
        try:
            return not self.elsewhere and abs(psutil.Process(self.pid).create_time() - self.started) < _START_TOLERANCE
        except psutil.Error:
            return False


@contextmanager
def locked(folder: Path, *, take_over: bool = False) -> Iterator[Holder | None]:
    """Hold the folder's lock for the block. Raises RunLocked, naming the holder, where another process has it.

    Yields the holder on another host that was taken over, None if there was none.

    `take_over` says that a holder on another host is known to be dead; a living one on this host still wins.
    """
    path = folder / LOCK_NAME
    lock = FileLock(path, fallback_to_soft=False)
    with storage_errors(path):
        try:
            lock.acquire(timeout=0)
        except NotImplementedError:  # a file system without locks: what the file says has to do
            pass
        except Timeout:  # an OSError too, but one about the other process, not about the disk
            raise _refusal(folder, holder(folder)) from None
    try:
        before = _refuse_others(folder, take_over)
        with storage_errors(path):
            path.write_text(json.dumps(asdict(_own())))
        yield before
    finally:
        with suppress(OSError):  # the folder may be gone
            if (mine := holder(folder)) and not mine.elsewhere and mine.pid == os.getpid():
                path.write_text("")
        lock.release()


def _own() -> Holder:
    return Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        since=datetime.now().astimezone().isoformat(timespec="seconds"),
    )


def _refuse_others(folder: Path, take_over: bool) -> Holder | None:
    last = holder(folder)
    if last is None or (last.pid == os.getpid() and not last.elsewhere):
        return None
    if last.alive or (last.elsewhere and not take_over):
        raise _refusal(folder, last)
    return last if last.elsewhere else None


def _refusal(folder: Path, last: Holder | None) -> RunLocked:
    step = "wait for it, stop it, or choose another --output"
    if last is not None and last.elsewhere:
        step += "; if that process is dead (its host crashed or was given away), add --take-over"
    return RunLocked(
        f"Another process writes to this run: {last or 'unknown'}.", where=str(folder.absolute()), next_step=step
    )


def holder(folder: Path) -> Holder | None:
    """Return who took the lock last and did not give it back in order, None if nobody or it cannot be read."""
    try:
        record = json.loads((folder / LOCK_NAME).read_text())
        # A host alone is enough to keep another one out.
        return Holder(
            host=str(record["host"]),
            pid=int(record.get("pid", 0)),
            started=float(record.get("started", 0)),
            since=str(record.get("since", "an unknown time")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def writing(folder: Path) -> Holder | None:
    """Return who writes to this run now, without touching the lock.

    A holder on another host counts as writing, dead or not: only `--take-over` ends that.
    """
    last = holder(folder)
    return last if last is not None and (last.elsewhere or last.alive) else None
