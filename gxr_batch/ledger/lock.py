"""One writer per run folder: an operating-system lock on run.lock, and in the file the name of its holder.

On one machine the system's lock decides; it is released when its holder dies, however that happens. Shared file systems
do not always pass such locks between machines, so the file's content counts too: a record that was not closed and names
another host keeps others out until a user who knows that the run on that host is dead takes over.

Another host name does not always mean another machine: each container has its own. The record therefore has the boot of
the machine and the file's device and inode number. If all three are the same, one kernel decides about one file, and
the lock that it grants proves that the holder is dead.
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

from gxr_batch.cells import quoted
from gxr_batch.disk import storage_errors
from gxr_batch.errors import RunLocked, StorageError
from gxr_batch.files import NoLocks, is_same_file, open_to_change, read_json, try_lock
from gxr_batch.ledger.boot import boot_id

LOCK_NAME = "run.lock"
# The system rounds process start times; two processes with one number start further apart than this.
_START_TOLERANCE = 1.5


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The last process to take the lock: host, pid, its start time (seconds since 1970), when it took the lock.

    `boot` and `file` identify the boot of its machine and the lock file as that machine sees it, "" if unknown.
    """

    host: str
    pid: int
    started: float
    since: str
    boot: str = ""
    file: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {quoted(self.host)} since {quoted(self.since)}"

    @property
    def elsewhere(self) -> bool:
        """Whether it runs, or ran, on another machine."""
        return self.host != socket.gethostname()

    @property
    def alive(self) -> bool:
        """Whether this process still runs here; unknown for other machines."""
        try:
            return not self.elsewhere and abs(psutil.Process(self.pid).create_time() - self.started) < _START_TOLERANCE
        except psutil.Error:
            return False


class Lock:
    """A folder's lock while this process holds it: `record` is what it wrote into the file.

    `before` is the holder under another host name, if it took over.
    """

    def __init__(self, path: Path, descriptor: int, record: bytes, before: Holder | None) -> None:
        self._path, self._descriptor, self._record, self.before = path, descriptor, record, before

    def is_recorded(self) -> bool:
        """Return whether the file still names this process, and no other that took over. Raises OSError."""
        return os.pread(self._descriptor, len(self._record) + 1, 0) == self._record

    def require(self) -> None:
        """Raise StorageError if the lock was taken over, or its file or folder moved: others may write there."""
        with storage_errors(self._path):
            held = is_same_file(self._descriptor, self._path) and self.is_recorded()
            self._path.parent.stat()  # a folder that is missing has a plainer message
        if not held:
            raise StorageError(
                "This process lost its lock: another took over, the lock file was deleted or replaced, or the folder "
                "was moved.",
                where=str(self._path.absolute()),
                next_step="saved rows are safe; make sure that no other process writes there, then run the same "
                "command again to resume",
            )


@contextmanager
def locked(folder: Path, *, take_over: bool = False) -> Iterator[Lock]:
    """Hold the folder's lock for the block. Raises RunLocked, naming the holder, if another process has it.

    `take_over` declares a holder on another host dead; a live holder on this host still keeps the lock.
    """
    path = folder / LOCK_NAME
    with storage_errors(path):
        descriptor, granted = _opened(path)
    try:
        if granted is False:
            raise _refusal(folder, holder(folder))
        before = _refuse_others(folder, take_over, granted is True)
        record = json.dumps(asdict(_own(path))).encode()
        with storage_errors(path):
            _write(descriptor, record)
        lock = Lock(path, descriptor, record, before)
        try:
            yield lock
        finally:
            with suppress(OSError):
                if lock.is_recorded():
                    _write(descriptor, b"")
    finally:
        os.close(descriptor)


def _opened(path: Path) -> tuple[int, bool | None]:
    """Open the lock file; return it and whether the system grants its lock.

    Without locks in the file system that is None, and the file's content decides alone.
    """
    while True:
        descriptor = open_to_change(path)
        try:
            granted = try_lock(descriptor)
        except NoLocks:
            return descriptor, None
        except BaseException:
            os.close(descriptor)
            raise
        if is_same_file(descriptor, path):
            return descriptor, granted
        os.close(descriptor)  # deleted or replaced in between


def _write(descriptor: int, record: bytes) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, record, 0)


def _own(path: Path) -> Holder:
    return Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        since=datetime.now().astimezone().isoformat(timespec="seconds"),
        boot=boot_id(),
        file=_file_id(path),
    )


def _file_id(path: Path) -> str:
    """Return device and inode number: a file that is mounted twice as two file systems has two devices."""
    try:
        seen = path.stat()
    except OSError:
        return ""
    return f"{seen.st_dev}:{seen.st_ino}"


def _same_lock(folder: Path, last: Holder) -> bool:
    """Return whether the holder locked this file on this machine since it was booted, under whatever host name."""
    here = (boot_id(), _file_id(folder / LOCK_NAME))
    return all(here) and (last.boot, last.file) == here


def _refuse_others(folder: Path, take_over: bool, granted: bool) -> Holder | None:
    last = holder(folder)
    if last is None or (last.pid == os.getpid() and not last.elsewhere):
        return None
    if last.elsewhere and granted and _same_lock(folder, last):
        return last
    if last.alive or (last.elsewhere and not take_over):
        raise _refusal(folder, last)
    return last if last.elsewhere else None


def _refusal(folder: Path, last: Holder | None) -> RunLocked:
    step = "wait for it, stop it, or choose another --output"
    if last is not None and last.elsewhere and not _same_lock(folder, last):
        step += "; if that process is dead (its host crashed or no longer exists), add --take-over"
    return RunLocked(
        f"Another process is writing to this run: {last or 'unknown'}.", where=str(folder.absolute()), next_step=step
    )


def holder(folder: Path) -> Holder | None:
    """Return the last holder if it did not release the lock, None if there is none or it is unreadable."""
    try:
        record = read_json(folder / LOCK_NAME)
        # The host alone is enough to keep another one out.
        return Holder(
            host=str(record["host"]),
            pid=int(record.get("pid", 0)),
            started=float(record.get("started", 0)),
            since=str(record.get("since", "an unknown time")),
            boot=str(record.get("boot", "")),
            file=str(record.get("file", "")),
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


def writing(folder: Path) -> Holder | None:
    """Return the process that is writing to this run, without touching the lock.

    A holder on another host counts as writing, dead or not: only the next invocation finds that out.
    """
    last = holder(folder)
    return last if last is not None and (last.elsewhere or last.alive) else None
