"""Which files a path names, the kind of each, and whether a file has changed since the survey.

A file is identified by the sha256 of its bytes. File system errors become TableError if the user can fix the path,
StorageError if the disk is at fault.
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

from gxr_batch.disk import expanded
from gxr_batch.errors import StorageError, TableError

Kind = Literal["delimited", "parquet"]

CHUNK_BYTES = 2**20
_KINDS: dict[str, Kind] = {".csv": "delimited", ".tsv": "delimited", ".txt": "delimited", ".parquet": "parquet"}
_WORKBOOKS = {".xlsx", ".xlsm", ".xlsb", ".xls", ".ods"}
# First bytes of other kinds of files that are sometimes named like a text file.
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
    """One file of the table as of the survey.

    `schema` has the columns that are read, under their final names; `places` has the position of each in the file
    (from 0), and `width` counts all columns of the file. `encoding` and `delimiter` are empty for Parquet.
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
    """Return the files that a path or a glob matches, in name order. Raises TableError if there are none."""
    path = expanded(pattern)
    if path.is_dir():
        raise TableError(
            "The input path is a folder, not a table.",
            where=str(path.absolute()),
            next_step=f'name a file in it, or use a glob: input.path = "{pattern.rstrip("/")}/*.csv"',
        )
    if os.path.lexists(path):  # a name that contains [ or * is taken literally first
        return [path]
    found = sorted(glob.glob(str(path), recursive=True))
    files = [Path(name) for name in found if not Path(name).is_dir()]
    if not files:
        what = "No file matches the input path." if glob.has_magic(pattern) else "There is no such input file."
        raise TableError(
            what,
            where=str(path.absolute()),
            next_step="check input.path; relative paths start at the current directory",
        )
    return files


def kind_of(path: Path) -> Kind:
    """Return a file's kind by its extension. Raises TableError for an unsupported one."""
    ending = path.suffix.lower()
    if ending in _WORKBOOKS:
        raise TableError("A workbook cannot be read as a table.", where=str(path), next_step=_SAVE_AS_CSV)
    if ending not in _KINDS:
        raise TableError(
            f"Files that end in {ending} cannot be read." if ending else "A file without an extension cannot be read.",
            where=str(path),
            next_step=f"the table must be one of {', '.join(_KINDS)}, uncompressed",
        )
    return _KINDS[ending]


def stat_file(path: Path) -> os.stat_result:
    """Return the size and times of a regular file that is not empty. Raises TableError."""
    with reading(path):
        seen = path.stat()
    if not stat.S_ISREG(seen.st_mode):
        raise TableError(
            "The input is not a regular file, and tables are read twice.",
            where=str(path),
            next_step="write it to a file first",
        )
    if seen.st_size == 0:
        raise TableError("The file is empty.", where=str(path), next_step="it needs at least a header line")
    return seen


def refuse_disguise(path: Path, head: bytes) -> None:
    """Raise TableError if the first bytes of a text file show another kind of file."""
    for mark, truth in _DISGUISES.items():
        if head.startswith(mark):
            step = (
                _SAVE_AS_CSV
                if "Excel" in truth
                else "give it the right extension"
                if truth == "Parquet"
                else "decompress it"
            )
            raise TableError(f"The file is {truth}, despite its name.", where=str(path), next_step=step)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes. Raises TableError, StorageError."""
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changed(file: SourceFile) -> bool:
    """Return whether a file's bytes changed since the survey. It is read again only if its size or time differs."""
    try:
        seen = file.path.stat()
    except OSError:
        return True
    if (seen.st_size, seen.st_mtime_ns) == (file.size, file.mtime_ns):
        return False
    return seen.st_size != file.size or sha256_of(file.path) != file.sha256


def changed_error(file: SourceFile) -> TableError:
    """Return the error for a file that changed after the survey."""
    return TableError(
        "The file changed while it was being read.",
        where=str(file.path),
        next_step="wait until it is complete, then run the same command again",
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a TableError or a StorageError that names `path`."""
    try:
        yield
    except FileNotFoundError:
        raise TableError(
            "There is no such input file.", where=str(path.absolute()), next_step="is it a link to a missing file?"
        ) from None
    except PermissionError:
        raise TableError(
            "Permission denied: the file cannot be read.",
            where=str(path.absolute()),
            next_step="ask its owner for permission, or use a copy",
        ) from None
    except OSError as error:
        raise StorageError(
            f"The file cannot be read: {error.strerror or type(error).__name__}.",
            where=str(path.absolute()),
            next_step="check the disk, then run the same command again",
        ) from None
