"""How the ledger writes: to a temporary name in the same folder, fsynced, renamed, the folder fsynced.

A file exists under its final name whole, or not at all."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from gxr_batch.storage import storage_errors

# Under run.lock there is one writer, so a fixed temporary name is safe, and a killed run leaves at most one behind.
TEMPORARY_SUFFIX = ".tmp"


def write_whole(target: Path, write: Callable[[Path], None], *, unique: bool = False) -> None:
    """Let `write` fill a temporary file, then make it durable under its final name. Raises StorageError.

    Without run.lock two processes may write the same target: `unique` gives each a temporary name of its own.
    """
    mark = f".{os.getpid()}-{secrets.token_hex(4)}" if unique else ""
    temporary = target.with_name(f"{target.name}{mark}{TEMPORARY_SUFFIX}")
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


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def put_aside(path: Path) -> str:
    """Rename a damaged file, so that nothing takes it for a sound one and nothing is lost; return its new name.

    Raises StorageError.
    """
    target = path.with_name(f"{path.name}.damaged")
    number = 2
    while target.exists():
        target = path.with_name(f"{path.name}.damaged-{number}")
        number += 1
    with storage_errors(path):
        path.rename(target)
        sync_folder(path.parent)
    return target.name


def aside(path: Path, *, suffix: str = "") -> Path:
    """Return the name under which a folder or file is kept when another takes its place: NAME.before-<timestamp>.

    `suffix` is what has to stay at the end of a file's name, such as ".xlsx".
    """
    name = path.name.removesuffix(suffix)
    stamp = datetime.now().astimezone().strftime("%Y%m%dT%H%M%S")
    target = path.with_name(f"{name}.before-{stamp}{suffix}")
    number = 2
    while target.exists():
        target = path.with_name(f"{name}.before-{stamp}-{number}{suffix}")
        number += 1
    return target


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, durable names included. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
