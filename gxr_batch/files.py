"""Opens and makes files in folders that other people write to: plain files only, never through a planted link.

A pipe would wait for its other end, a device may never end, and a link in a run folder may lead to any file of this
user. Temporary files have names that nobody can foresee, and are locked while they are written: a later start can tell
which ones the dead left behind.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY_SUFFIX = ".tmp"
# Job files and templates are a few KiB.
MOST_TEXT_BYTES = 2**22
# JSON of a run: deeper or longer than the program ever writes it. run.json names every row that a person released.
DEEPEST = 40
_MOST_JSON_BYTES = 2**28
_LOCK_TRIES = 500
_LOCK_PAUSE_S = 0.002
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a link",
}
# Names of temporary files and folders; earlier versions had fixed ones, or a process number in them.
_TEMPORARY = re.compile(
    r"(?:.+\.(?:[0-9a-f]{16}|[0-9]+-[0-9a-f]{8})"
    r"|run\.json|(?:input|results|failed|part-[0-9]{8}|review-[0-9]{8})\.parquet)\.tmp(?:\.ids)?",
    re.DOTALL,
)


class NotPlain(OSError):
    """A file is not a plain one of a sensible size. `strerror` says what it is."""

    def __init__(self, what: str) -> None:
        super().__init__(errno.EINVAL, what)


class NoLocks(OSError):
    """The file system has no locks."""


class NoObject(ValueError):
    """What should be a JSON object is not, or not one of a sensible depth; the message says why."""


def open_plain(path: Path, *, links: bool = False) -> BufferedReader:
    """Open a plain file for reading; `links` follows a link to one. Raises NotPlain, OSError."""
    return os.fdopen(_opened(path, os.O_RDONLY, links=links), "rb")


def open_to_change(path: Path, flags: int = 0) -> int:
    """Open a plain file for reading and writing, or make it, and return the descriptor. Raises NotPlain, OSError."""
    return _opened(path, os.O_RDWR | os.O_CREAT | flags, links=False)


def _opened(path: Path, flags: int, *, links: bool) -> int:
    try:
        _require_plain(os.stat(path, follow_symlinks=links).st_mode)
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | (0 if links else os.O_NOFOLLOW)
    descriptor = os.open(path, flags, 0o666)
    try:
        _require_plain(os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _require_plain(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise NotPlain(f"it is {_KINDS.get(stat.S_IFMT(mode), 'no file')}, not a plain file")


def require_folder(path: Path) -> None:
    """Raise NotPlain if a path is a link, and NotADirectoryError if it is a file. A missing folder is accepted."""
    with suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            raise NotPlain("it is a link, not a folder")
        if not stat.S_ISDIR(mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))


def read_text(path: Path) -> str:
    """Return the text of a small file that the user named. Raises NotPlain, OSError, UnicodeDecodeError."""
    return read_bytes(path, MOST_TEXT_BYTES, links=True).decode("utf-8-sig")


def why_unreadable(error: OSError | UnicodeDecodeError) -> str:
    """Return in words why `read_text` failed."""
    return "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error.strerror)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a run or of the cache. Raises NoObject, OSError."""
    return json_object(read_bytes(path, _MOST_JSON_BYTES), DEEPEST)


def json_object(content: bytes | str, deepest: int) -> dict[str, Any]:
    """Return the object that JSON holds. Raises NoObject, also if it is nested deeper than `deepest` levels."""
    try:
        value = json.loads(content)
    except RecursionError:
        raise NoObject("its values are nested too deeply") from None
    except json.JSONDecodeError as error:
        raise NoObject(f"it is not valid JSON at line {error.lineno}, column {error.colno}") from None
    except ValueError:  # bytes that are no text, or a number of thousands of digits
        raise NoObject("it has text that is not UTF-8, or a number without end") from None
    if not isinstance(value, dict):
        raise NoObject("it holds no JSON object")
    level: list[Any] = [value]
    for _ in range(deepest):
        inside = (one.values() if isinstance(one, dict) else one for one in level)
        level = [value for values in inside for value in values if isinstance(value, dict | list)]
        if not level:
            return value
    raise NoObject("its values are nested too deeply")


def read_bytes(path: Path, most: int, *, links: bool = False) -> bytes:
    """Return the content of a plain file of at most `most` bytes. Raises NotPlain, OSError."""
    with open_plain(path, links=links) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise NotPlain(f"it is larger than {most >> 20:,} MiB")
    return content


def try_lock(descriptor: int) -> bool:
    """Return whether the operating system grants an exclusive lock on an open file, held until that is closed.

    Raises NoLocks, OSError.
    """
    from filelock import lock_descriptor

    try:
        return lock_descriptor(descriptor, blocking=False)
    except OSError as error:
        if error.errno in {errno.ENOSYS, errno.ENOTSUP}:
            raise NoLocks(error.errno, error.strerror) from None
        raise


def is_same_file(descriptor: int, path: Path) -> bool:
    """Return whether a path still names an open file or folder."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    return False


def temporary_path(target: Path) -> Path:
    """Return a name next to `target` that nobody can foresee."""
    return target.with_name(f"{target.name}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")


def new_file(path: Path) -> BinaryIO:
    """Make a file that does not exist, and open it for writing, locked. Raises FileExistsError, OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        file = os.fdopen(os.open(path, flags, 0o666), "wb")
        if _claimed(file.fileno(), path):
            return file
        file.close()


@contextmanager
def scratch_folder(name: str, parent: Path | None = None) -> Iterator[Path]:
    """Make a folder that only this user can read, for the block; `parent` is the system's temporary folder by default.

    Removes folders of this name that killed processes left there. Raises OSError.
    """
    parent = parent or Path(tempfile.gettempdir())
    remove_leftovers(parent, name, own=True)
    path = temporary_path(parent / name)
    descriptor = -1
    try:
        while descriptor < 0:
            path.mkdir(0o700)
            descriptor = _claimed_folder(path)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if descriptor >= 0:
            os.close(descriptor)


def _claimed_folder(path: Path) -> int:
    """Open and lock a folder that was just made; return its descriptor, or -1 if another process removed it."""
    with suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        if _claimed(descriptor, path):
            return descriptor
        os.close(descriptor)
    return -1


def _claimed(descriptor: int, path: Path) -> bool:
    """Lock a file or folder that was just made; False if another process removed it as a leftover before that.

    Such a process locks it first and removes it at once, so the lock is waited for, but not for ever: a user who can
    read the file can lock it too.
    """
    with suppress(OSError):  # the file system has no locks
        for _ in range(_LOCK_TRIES):
            if try_lock(descriptor):
                break
            time.sleep(_LOCK_PAUSE_S)
    return is_same_file(descriptor, path)


def remove_leftovers(folder: Path, name: str = "", *, own: bool = False) -> None:
    """Remove temporary files and folders that no process writes any more, for targets called `name` if it is given.

    `own` leaves those of other users alone. Never raises for a single file: it is only space.
    """
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            if entry.name.startswith(f"{name}." if name else "") and _TEMPORARY.fullmatch(entry.name):
                with suppress(OSError):
                    if not own or entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                        _remove_if_dead(Path(entry.path))


def _remove_if_dead(path: Path) -> None:
    if stat.S_ISDIR(os.lstat(path).st_mode):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        remove: Any = shutil.rmtree
    else:
        descriptor = _opened(path, os.O_RDWR, links=False)
        remove = os.unlink
    try:
        if try_lock(descriptor) and is_same_file(descriptor, path):
            remove(path)
    finally:
        os.close(descriptor)
