"""The part of the cache folder that belongs to one user, closed to all others.

A cache folder may be shared by a group: models and hashes in it are for everybody. Code that is loaded, and the record
of what this user has verified, must not come from others, so they are in a folder of this user, mode 0700. It is used
through its descriptor: someone who can write to the folder above could otherwise exchange it after it was looked at.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from gxr_batch.disk import write_whole
from gxr_batch.errors import StorageError
from gxr_batch.models.weights_hash import cache_home

_CLOSED = 0o700


def private_home() -> Path:
    """Return the path of this user's folder in the cache; it need not exist. Raises StorageError."""
    return cache_home() / f"private-{os.geteuid()}"


@contextmanager
def private_folder() -> Iterator[Path]:
    """Open this user's folder in the cache for the block, making it if necessary; see `closed_folder`.

    Raises StorageError if it belongs to somebody else or there is no place for it, OSError if the disk refuses.
    """
    folder = private_home()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(_CLOSED)
    with closed_folder(folder) as opened:
        yield opened


@contextmanager
def closed_folder(folder: Path) -> Iterator[Path]:
    """Open a folder that only this user can write to; yield its path by descriptor, which is valid in this process.

    Raises StorageError if it is no folder of this user, OSError if the disk refuses.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            raise StorageError("The folder belongs to another user.", where=str(folder))
        if stat.S_IMODE(found.st_mode) != _CLOSED:
            os.fchmod(descriptor, _CLOSED)
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def own_bytes(path: Path) -> bytes:
    """Return the content of a file that this user wrote and nobody else can change; b"" if there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return b""
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        own = found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        return file.read() if own and stat.S_ISREG(found.st_mode) else b""


def read_record(name: str) -> bytes:
    """Return what this user recorded under a name, b"" if nothing, or nothing that can be trusted."""
    with suppress(OSError, StorageError), private_folder() as folder:
        return own_bytes(folder / name)
    return b""


def write_record(name: str, content: bytes) -> None:
    """Record something under a name. If that fails, the next invocation just finds it out again."""

    def write(file: BinaryIO) -> None:
        os.fchmod(file.fileno(), 0o600)
        file.write(content)

    with suppress(OSError, StorageError), private_folder() as folder:
        write_whole(folder / name, write)
