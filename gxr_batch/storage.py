"""What the disk refuses, in words: everything that writes says it alike."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from gxr_batch.errors import GxrError, RunError, StorageError

_DENIED = ("Permission to write was denied.", "mend the folder's permissions, or choose another --output")
_REASONS = {
    errno.ENOSPC: (
        "The disk is full.",
        "make room, then run the same command again: it goes on where it stopped",
    ),
    errno.EDQUOT: ("Your disk quota is used up.", "make room, then run the same command again"),
    errno.EFBIG: ("The file grew past the size limit of this process.", "raise `ulimit -f`, then run again"),
    errno.EROFS: ("The file system is read-only.", "make it writable, then run the same command again"),
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
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
def storage_errors(path: Path, *, gone: str = "") -> Iterator[None]:
    """Turn an OSError inside the block into a StorageError that names `path`; `gone` is said where it is missing."""
    try:
        yield
    except OSError as error:
        # pyarrow's FileNotFoundError has no errno.
        number = errno.ENOENT if isinstance(error, FileNotFoundError) else error.errno or 0
        what, step = _REASONS.get(
            number,
            (f"The disk refused: {error.strerror or type(error).__name__}.", "mend it, then run again"),
        )
        if number == errno.ENOENT and gone:
            what, step = gone, "choose another --output"
        raise StorageError(what, where=str(path.absolute()), next_step=step) from None


@contextmanager
def reading(path: Path, damaged: GxrError) -> Iterator[None]:
    """Raise `damaged` where the block cannot decode a Parquet file, StorageError where the disk does not give it."""
    try:
        with storage_errors(path):
            try:
                yield
            except OSError as error:
                if type(error) is OSError and error.errno is None:  # what pyarrow could read and could not decode
                    raise damaged from None
                raise
    except MemoryError:
        raise
    except pa.ArrowException:
        raise damaged from None


@contextmanager
def table_copy(path: Path) -> Iterator[None]:
    """Turn what reading a run's input.parquet raises inside the block into a RunError, or a StorageError."""
    damaged = RunError(
        "The run's copy of the table is damaged.",
        where=str(path.absolute()),
        next_step="run the job again: it takes the table in anew and generates no row twice",
    )
    with reading(path, damaged):
        try:
            yield
        except (ValueError, LookupError):
            raise damaged from None
