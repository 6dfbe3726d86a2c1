"""How the ledger writes: to a temporary name in the same folder, fsynced, renamed, the folder fsynced.

A file exists under its final name whole, or not at all. Errors of the disk become `StorageError`, named by file.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gxr_batch.errors import StorageError

# One writer a folder (run.lock), so a fixed temporary name is safe, and a killed run leaves at most one behind.
TEMPORARY_SUFFIX = ".tmp"

_REASONS = {
    errno.ENOSPC: (
        "The disk is full.",
        "make room, then run the same command again: it goes on where it stopped",
    ),
    errno.EDQUOT: ("Your disk quota is used up.", "make room, then run the same command again"),
    errno.EFBIG: ("The file grew past the size limit of this process.", "raise `ulimit -f`, then run again"),
    errno.EROFS: ("The file system is read-only.", "make it writable, then run the same command again"),
    errno.EACCES: (
        "Permission to write was denied.",
        "mend the folder's permissions, or choose another --output",
    ),
    errno.EPERM: (
        "Permission to write was denied.",
        "mend the folder's permissions, or choose another --output",
    ),
    errno.ENOENT: (
        "The run folder is gone.",
        "was it moved or deleted? put it back, then run the same command again",
    ),
    errno.EEXIST: ("A file stands where the run needs a folder.", "move it away, or choose another --output"),
    errno.EISDIR: ("A folder stands where a file belongs.", "move it away, or choose another --output"),
    errno.ENOTDIR: ("A part of this path is a file, not a folder.", "choose another --output"),
    errno.EIO: (
        "The disk reported an input/output error.",
        "check the disk, then run the same command again",
    ),
}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a StorageError that names `path`."""
    try:
        yield
    except OSError as error:
        what, step = _REASONS.get(
            error.errno or 0,
            (f"The disk refused: {error.strerror or type(error).__name__}.", "mend it, then run again"),
        )
        raise StorageError(what, where=str(path.absolute()), next_step=step) from None


def write_whole(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file, then make it durable under its final name. Raises StorageError."""
    temporary = target.with_name(target.name + TEMPORARY_SUFFIX)
    with storage_errors(target):
        try:
            write(temporary)
            publish(temporary, target)
        except BaseException:
            with suppress(OSError):  # half a file is of no use, and on a full disk its room is
                temporary.unlink()
            raise


def publish(temporary: Path, target: Path) -> None:
    """Make a finished temporary file durable and give it its final name. Raises OSError."""
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
