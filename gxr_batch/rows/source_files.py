"""Which files a path means, what kind each is, and whether a file still is what the survey saw.

A file is known by the sha256 of its bytes. Errors of the file system become TableError where the user can mend the
path, StorageError where the disk is at fault.
"""

from __future__ import annotations

import glob
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from gxr_batch.errors import StorageError, TableError

Kind = Literal["delimited", "parquet"]

CHUNK_BYTES = 2**20
_KINDS: dict[str, Kind] = {".csv": "delimited", ".tsv": "delimited", ".txt": "delimited", ".parquet": "parquet"}
_WORKBOOKS = {".xlsx", ".xlsm", ".xlsb", ".xls", ".ods"}
# First bytes of what is sometimes found under a text file's name.
_DISGUISES = {
    b"PK\x03\x04": "an Excel workbook or a zip archive",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"PAR1": "Parquet",
    b"\x1f\x8b": "compressed with gzip",
}
_SAVE_AS_CSV = (
    'open it in Excel, choose File > Save As and the type "CSV UTF-8 (Comma delimited) (*.csv)", '
    "then set input.path to that file"
)


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of the table as the survey saw it.

    `schema` holds the columns that are taken, under their final names; `places` says where each stands in the file,
    counted from 0, and `width` how many columns the file has in all. `encoding` and `delimiter` are empty for Parquet.
    """

    path: Path
    kind: Kind
    sha256: str
    size: int
    mtime_ns: int
    schema: pa.Schema
    places: tuple[int, ...]
    width: int
    encoding: str = ""
    delimiter: str = ""


def find(pattern: str) -> list[Path]:
    """Return the files that a path or a glob means, in name order. Raises TableError where there is none."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise TableError(
            "The input path is a folder, not a table.",
            where=str(path.absolute()),
            next_step=f'name a file in it, or all of a kind: input.path = "{pattern.rstrip("/")}/*.csv"',
        )
    if os.path.lexists(path):  # a name that holds [ or * is taken by its letter first
        return [path]
    found = sorted(glob.glob(str(path), recursive=True))
    files = [Path(name) for name in found if not Path(name).is_dir()]
    if not files:
        what = "No file matches the input path." if glob.has_magic(pattern) else "There is no such input file."
        raise TableError(
            what,
            where=str(path.absolute()),
            next_step="check input.path; a relative path counts from the folder in which the command is started",
        )
    return files


def kind_of(path: Path) -> Kind:
    """Return what a file is by its ending. Raises TableError for one that cannot be read."""
    ending = path.suffix.lower()
    if ending in _WORKBOOKS:
        raise TableError("A workbook cannot be read as a table.", where=str(path), next_step=_SAVE_AS_CSV)
    if ending not in _KINDS:
        raise TableError(
            f"Files that end in {ending} cannot be read." if ending else "A file without an ending cannot be read.",
            where=str(path),
            next_step=f"the table must be one of {', '.join(_KINDS)}, unpacked",
        )
    return _KINDS[ending]


def stat_file(path: Path) -> os.stat_result:
    """Return the size and times of a regular file that is not empty. Raises TableError."""
    with reading(path):
        seen = path.stat()
    if not stat.S_ISREG(seen.st_mode):
        raise TableError(
            "The input is not a regular file, and a table is read twice.",
            where=str(path),
            next_step="write it to a file first",
        )
    if seen.st_size == 0:
        raise TableError("The file is empty.", where=str(path), next_step="it needs a header line at least")
    return seen


def refuse_disguise(path: Path, head: bytes) -> None:
    """Raise TableError where the first bytes of a text file are those of another kind."""
    for mark, truth in _DISGUISES.items():
        if head.startswith(mark):
            step = (
                _SAVE_AS_CSV if "Excel" in truth else "give it its right ending" if truth == "Parquet" else "unpack it"
            )
            raise TableError(f"The file is {truth}, whatever its name says.", where=str(path), next_step=step)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes. Raises TableError, StorageError."""
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changed(file: SourceFile) -> bool:
    """Return whether a file's bytes differ from those of the survey; read again only where its size or time differ."""
    try:
        seen = file.path.stat()
    except OSError:
        return True
    if (seen.st_size, seen.st_mtime_ns) == (file.size, file.mtime_ns):
        return False
    return seen.st_size != file.size or sha256_of(file.path) != file.sha256


def changed_error(file: SourceFile) -> TableError:
    """Return the error for a file that changed between the survey and the end of the reading."""
    return TableError(
        "The file changed while it was read.",
        where=str(file.path),
        next_step="wait until it is written, then run the same command again",
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a TableError or a StorageError that names `path`."""
    try:
        yield
    except FileNotFoundError:
        raise TableError(
            "There is no such input file.", where=str(path.absolute()), next_step="is it a link to a file that is gone?"
        ) from None
    except PermissionError:
        raise TableError(
            "Permission to read the file was denied.",
            where=str(path.absolute()),
            next_step="ask its owner, or copy it to a place of your own",
        ) from None
    except OSError as error:
        raise StorageError(
            f"The file cannot be read: {error.strerror or type(error).__name__}.",
            where=str(path.absolute()),
            next_step="check the disk, then run the same command again",
        ) from None
