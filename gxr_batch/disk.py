"""Writes files whole, and turns disk errors into messages.

A file is written to a temporary name in the same folder, fsynced, renamed, and the folder fsynced: it exists under its
final name whole, or not at all. Every reader and writer reports disk errors in the same sentences, as a StorageError.
Which files there are, and what they mean, is left to the callers.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa

from gxr_batch.errors import GxrError, RunError, StorageError, UserError
from gxr_batch.files import TEMPORARY_SUFFIX, NotPlain, new_file, open_plain, scratch_folder, temporary_path

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_DENIED = (
    "Permission denied: this user may not read or write here.",
    "ask the owner for access (a shared folder needs `umask 002` for all its users), or choose another --output",
)
_REASONS = {
    errno.ENOSPC: (
        "The disk is full.",
        "free up disk space, then run the same command again to resume",
    ),
    errno.EDQUOT: ("Your disk quota is used up.", "free up disk space, then run the same command again"),
    errno.EFBIG: ("The file exceeds this process's file size limit.", "raise `ulimit -f`, then run again"),
    errno.EROFS: ("The file system is read-only.", "make it writable, then run the same command again"),
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.ENOENT: (
        "The run folder is missing.",
        "was it moved or deleted? restore it, then run the same command again",
    ),
    errno.EEXIST: (
        "There is a file where the run needs a folder.",
        "move it away, or choose another --output",
    ),
    errno.EISDIR: (
        "There is a folder where the run needs a file.",
        "move it away, or choose another --output",
    ),
    errno.ENOTDIR: ("A part of this path is a file, not a folder.", "choose another --output"),
    errno.EIO: (
        "The disk reported an input/output error.",
        "check the disk, then run the same command again",
    ),
}

_FULL = {_REASONS[number][0] for number in (errno.ENOSPC, errno.EDQUOT)}
_OTHER_TMPDIR = "free up disk space there, or set TMPDIR to another folder"


# In messages of libraries written in Rust.
_OS_ERROR = re.compile(r"\(os error (\d{1,3})\)")
_TORCH_WRITER = "inline_container.cc"  # in its messages


def expanded(name: str | Path) -> Path:
    """Return a path with ~ replaced by the home folder. Raises UserError if that folder is unknown."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # no HOME and no passwd entry, or an unknown user
        raise UserError(
            "The home folder meant by ~ is unknown.",
            where=str(name),
            next_step="write the path without ~, or set HOME",
        ) from None


def denied(path: str | Path) -> StorageError:
    """Return the error for a missing permission."""
    what, step = _DENIED
    return StorageError(what, where=os.path.abspath(path), next_step=step)


def not_plain(path: Path, error: NotPlain) -> StorageError:
    """Return the error for a file of a run that is a pipe, a device, a link, or far too large."""
    return StorageError(
        f"A file of the run cannot be used: {error.strerror}.",
        where=str(path.absolute()),
        next_step="find out who put it there, move it away, then run the same command again",
    )


@contextmanager
def storage_errors(path: Path, *, gone: str = "") -> Iterator[None]:
    """Turn an OSError inside the block into a StorageError that names `path`; if it is missing, with `gone`."""
    try:
        yield
    except NotPlain as error:
        raise not_plain(path, error) from None
    except OSError as error:
        # pyarrow's FileNotFoundError has no errno.
        number = errno.ENOENT if isinstance(error, FileNotFoundError) else error.errno or 0
        what, step = _REASONS.get(
            number,
            (
                f"The disk reported an error: {error.strerror or type(error).__name__}.",
                "fix it, then run the same command again",
            ),
        )
        if number == errno.ENOENT and gone:
            what, step = gone, "choose another --output"
        raise StorageError(what, where=str(path.absolute()), next_step=step) from None


@contextmanager
def library_errors(folder: Path, most: int = 0) -> Iterator[None]:
    """Raise an OSError where a library in the block, which writes to `folder`, reports one of the disk in its own way.

    safetensors and tokenizers have its number in their messages. torch does not say why: writing a file of `most`
    bytes, as large as its largest, tells.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if found := _OS_ERROR.search(str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from None
        if _TORCH_WRITER in str(error):
            _try_writing(folder, most)
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from None
        raise


def _try_writing(folder: Path, size: int) -> None:
    """Raise OSError if a file of this many bytes cannot be written to a folder."""
    block = bytes(2**20)
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(-(-size // len(block))):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def reading(path: Path, damaged: GxrError) -> Iterator[None]:
    """Raise `damaged` if the block cannot decode a Parquet file, StorageError if the disk cannot read it."""
    try:
        with storage_errors(path):
            try:
                yield
            except IsADirectoryError:
                raise damaged from None
            except OSError as error:
                if type(error) is OSError and error.errno is None:  # pyarrow could read it but not decode it
                    raise damaged from None
                raise
    except MemoryError:
        raise
    except pa.ArrowException:
        raise damaged from None


@contextmanager
def table_copy(path: Path) -> Iterator[None]:
    """Turn errors from reading a run's input.parquet inside the block into a RunError or a StorageError."""
    damaged = RunError(
        "The run's copy of the table is damaged.",
        where=str(path.absolute()),
        next_step="run the job again: it reads the table again and generates no row twice",
    )
    with reading(path, damaged):
        try:
            yield
        except (ValueError, LookupError):
            raise damaged from None


@contextmanager
def temporary_errors() -> Iterator[None]:
    """Turn an OSError while something is made in the system's temporary folder into a StorageError."""
    try:
        yield
    except OSError:
        raise StorageError(
            "No temporary folder can be made.",
            where=os.path.abspath(os.environ.get("TMPDIR", "/tmp")),
            next_step=f"{_OTHER_TMPDIR}, then run the same command again",
        ) from None


@contextmanager
def temporary_folder(name: str) -> Iterator[Path]:
    """Make a `scratch_folder` in the system's temporary folder for the block; if that is full, the error names TMPDIR.

    Raises StorageError.
    """
    with ExitStack() as stack:
        with temporary_errors():
            folder = stack.enter_context(scratch_folder(name))
        try:
            yield folder
        except StorageError as error:
            if error.where.startswith(str(folder)) and error.what in _FULL:
                error.next_step = f"{_OTHER_TMPDIR}, then run the same command again"
            raise


def write_whole(target: Path, write: Callable[[BinaryIO], None], *, last: Callable[[Path], None] | None = None) -> None:
    """Call `write` with a new file, then make that durable under the name `target`. Raises StorageError.

    It has a temporary name in the same folder until then: `last` is called with that when nothing but the renaming is
    left to do. A link under the name `target` is replaced, not followed.
    """
    temporary = temporary_path(target)
    with storage_errors(target):
        try:
            with new_file(temporary) as file:
                write(file)
                file.flush()
                publish(temporary, target, last)  # before the file is closed, and so no longer locked
        except BaseException:
            with suppress(OSError):  # on a full disk, half a file only takes up space
                temporary.unlink()
            raise


def write_text(target: Path, text: str) -> None:
    """Make a whole file of a text, as UTF-8. Raises StorageError."""

    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    write_whole(target, write)


@contextmanager
def lines_into(file: BinaryIO, *, encoding: str = "utf-8", newline: str) -> Iterator[io.TextIOWrapper]:
    """Let the block write text into a file that `write_whole` opened."""
    text = io.TextIOWrapper(file, encoding=encoding, newline=newline)
    yield text
    text.detach()  # also flushes; the file stays open


def publish(temporary: Path, target: Path, last: Callable[[Path], None] | None = None) -> None:
    """Make a finished temporary file durable and give it its final name, just after `last`. Raises OSError."""
    with open_plain(temporary) as file:
        os.fsync(file.fileno())
    if last is not None:
        last(temporary)
    temporary.replace(target)
    sync_folder(target.parent)


@contextmanager
def parquet_file(path: Path, **options: Any) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file of a run for the block. Raises NotPlain, OSError, and pyarrow's errors for damage."""
    import pyarrow.parquet as pq

    with open_plain(path) as file:
        # Arrow's threads may outlive a read, and one that holds a Python file aborts the process at its end.
        same = f"/dev/fd/{file.fileno()}"
        # Buffered ahead, the whole file would stay in memory while its batches are read.
        parquet = pq.ParquetFile(same if os.path.exists(same) else path, pre_buffer=False, **options)
    with parquet:
        yield parquet


def sha256_of(path: Path, *, links: bool = False) -> str:
    """Return the sha256 of a plain file, hex; `links` follows a link. Raises OSError."""
    with open_plain(path, links=links) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def put_aside(path: Path) -> str:
    """Rename a damaged file, so that it is kept but not read; return its new name.

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
    """Return the name under which a replaced folder or file is kept: NAME.before-<timestamp>.

    `suffix` stays at the end of a file's name, e.g. ".xlsx".
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
    """Make a folder and its missing parents, and make their names durable. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync_folder(path.parent)


def follow_umask(folder: Path) -> None:
    """Give the safetensors files in a folder the permissions of a new file. Raises OSError.

    The library makes them readable by their owner only, and a colleague could not use them.
    """
    probe = folder / f".mode-{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
    probe.touch()
    try:
        mode = probe.stat().st_mode
    finally:
        probe.unlink()
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def writable_by_others(path: Path) -> str:
    """Return who can change what is at a path besides this user and root, and where; "" if nobody can.

    Looks at the path and at every folder above it. A sticky folder protects what is in it, not itself.
    """
    named, real = Path(os.path.abspath(path)), Path(os.path.realpath(path))
    for place in dict.fromkeys((named, real, *named.parents, *real.parents)):
        with suppress(OSError):  # does not exist yet
            if who := _other_writer(place.stat(), protects=place not in {named, real}):
                return f"{who} ({place})"
    return ""


def _other_writer(found: os.stat_result, *, protects: bool) -> str:
    if found.st_uid not in {0, os.geteuid()}:
        return f"user {_user_name(found.st_uid)}"
    if protects and found.st_mode & stat.S_ISVTX:
        return ""
    if found.st_mode & stat.S_IWOTH:
        return "every user"
    return _others_in_group(found.st_gid) if found.st_mode & stat.S_IWGRP else ""


def _user_name(number: int) -> str:
    import pwd

    with suppress(KeyError):
        return pwd.getpwuid(number).pw_name
    return str(number)


def _others_in_group(number: int) -> str:
    """Return a group in words, "" for the one that many systems give each user: of the same name, without others."""
    import grp

    with suppress(KeyError):
        group, user = grp.getgrgid(number), _user_name(os.geteuid())
        return "" if group.gr_name == user and not {*group.gr_mem} - {user} else f"group {group.gr_name}"
    return f"group {number}"


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, if its file system can: some network disks cannot. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}:
            raise
    finally:
        os.close(descriptor)
