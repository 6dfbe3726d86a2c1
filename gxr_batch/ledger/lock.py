"""One writer a run folder: an operating-system lock on run.lock, which also says who holds it.

The system frees the lock when its holder dies, however it dies, so a crash leaves nothing to clean up.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from gxr_batch.errors import RunLocked
from gxr_batch.storage import storage_errors

LOCK_NAME = "run.lock"
# `is_locked` holds the lock for an instant; a run that starts just then must not take that for another run.
_PATIENCE_SECONDS = 1.0


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock for the block. Raises RunLocked, naming the holder, where another process has it."""
    path = folder / LOCK_NAME
    lock = FileLock(path)
    with storage_errors(path):
        try:
            lock.acquire(timeout=_PATIENCE_SECONDS)
        except Timeout:  # an OSError too, but one about the other process, not about the disk
            raise RunLocked(
                f"Another process writes to this run: {holder(folder) or 'unknown'}.",
                where=str(folder.absolute()),
                next_step="wait for it, stop it, or choose another --output",
            ) from None
    try:
        with storage_errors(path):
            since = datetime.now().astimezone().isoformat(timespec="seconds")
            path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}))
        yield
    finally:
        lock.release()


def holder(folder: Path) -> str | None:
    """Return who took the lock last, as a phrase, or None where nobody did or the file cannot be read."""
    try:
        record = json.loads((folder / LOCK_NAME).read_text())
        return f"process {record['pid']} on {record['host']} since {record['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_locked(folder: Path) -> bool:
    """Return whether a process writes to this run now."""
    path = folder / LOCK_NAME
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:
        return False  # a folder that this user may not write to: nothing of this user's runs there
    lock.release()
    return False
