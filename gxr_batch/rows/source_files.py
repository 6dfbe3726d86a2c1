"""What a table is read from: the protocol of a source, files as sources, and whether a file changed since the survey.

A file is identified by the sha256 of its bytes. File system errors become TableError if the user can fix the path,
StorageError if the disk is at fault.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import pyarrow as pa

from gxr_batch.errors import StorageError, TableError
from gxr_batch.rows.compression import EXTENSIONS

Kind = Literal["delimited", "jsonl", "parquet", "workbook"]
Say = Callable[[str], None]

CHUNK_BYTES = 2**20
TABLES: dict[str, Kind] = {
    ".csv": "delimited",
    ".tsv": "delimited",
    ".txt": "delimited",
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".xlsx": "workbook",
    ".xlsm": "workbook",
}
_COMPRESSED: tuple[Kind, ...] = ("delimited", "jsonl")
# Extension -> command that unpacks it.
_ARCHIVES = {".zip": "unzip", ".7z": "7z x", ".tar": "tar -xf", ".tgz": "tar -xf", ".txz": "tar -xf"}
_OTHER_WORKBOOKS = {".xlsb", ".xls", ".ods", ".numbers"}
# First bytes of other kinds of files that are sometimes named like a text file.
_DISGUISES = {
    b"PK\x03\x04": "an Excel workbook or a zip archive",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"PAR1": "Parquet",
    b"\x1f\x8b": "compressed with gzip",
}
_SAVE_AGAIN = (
    'open it in Excel, choose File > Save As and the type "Excel Workbook (*.xlsx)" or '
    '"CSV UTF-8 (Comma delimited) (*.csv)", then set input.path to that file'
)


class NothingInside(TableError):
    """A file has no header and no row. Among other files it is passed over."""


class Source(Protocol):
    """One table of the input: a file, or what the caller of `survey` reads instead.

    A source with the same mark yields the same rows.
    """

    @property
    def path(self) -> Path:
        """What messages and run.json name."""
        ...

    @property
    def schema(self) -> pa.Schema:
        """The columns, under their final names."""
        ...

    @property
    def mark(self) -> str:
        """What identifies the content and how it is read."""
        ...

    def batches(self, nulls: Collection[str], say: Say) -> Iterator[pa.Table]:
        """Yield the rows as tables of `schema`, text cells that are one of `nulls` as null. Raises TableError."""
        ...

    def changed(self) -> bool:
        """Return whether the content changed since the survey."""
        ...


class Constant(NamedTuple):
    """A text column with one value for every row of a file."""

    name: str
    value: str | None


@dataclass(frozen=True, kw_only=True)
class SourceFile(ABC):
    """One file of the table as of the survey.

    `schema` has the columns that are read, under their final names, and then the `constants`; `places` has the position
    of each column in the file (from 0), and `width` counts all columns of the file. `encoding` and `delimiter` are
    empty for files that have none.
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
    constants: tuple[Constant, ...] = ()

    @property
    def own_schema(self) -> pa.Schema:
        """The columns that the file itself has."""
        return pa.schema(list(self.schema)[: len(self.places)])

    @property
    def reading(self) -> str:
        """Everything that decides how the file is read, except encoding and delimiter; "" if it is read plainly."""
        return ""

    @property
    def mark(self) -> str:
        """The content of the file and how it is read."""
        folders = "".join(f" {name!r}={value!r}" for name, value in self.constants)
        return f"{self.kind} {self.encoding} {self.delimiter!r} {self.sha256}{self.reading}{folders}"

    def batches(self, nulls: Collection[str], say: Say) -> Iterator[pa.Table]:
        """Yield the rows as tables of `schema`. Raises TableError if a row cannot be read or the file changed."""
        values = [pa.scalar(None if value in nulls else value, pa.string()) for _, value in self.constants]
        for table in self.own_batches(nulls, say):
            more = [pa.repeat(value, table.num_rows) for value in values]
            yield pa.Table.from_arrays([*table.columns, *more], schema=self.schema) if more else table

    @abstractmethod
    def own_batches(self, nulls: Collection[str], say: Say) -> Iterator[pa.Table]:
        """Yield the rows as tables of `own_schema`."""

    def changed(self) -> bool:
        """Return whether the file's bytes changed since the survey."""
        return changed(self)


class Look(NamedTuple):
    """What the survey finds in a file: the names as written, their types, and the class and fields to read it with."""

    names: list[str]
    types: list[pa.DataType]
    sha256: str
    file: type[SourceFile]
    fields: Mapping[str, object]
    notices: tuple[str, ...] = ()


def kind_of(path: Path) -> Kind:
    """Return a file's kind by its extension. Raises TableError for an unsupported one."""
    ending = path.suffix.lower()
    inner = path.with_suffix("").suffix.lower() if ending in EXTENSIONS else ending
    if inner in _OTHER_WORKBOOKS:
        raise TableError(f"A workbook in {inner} format cannot be read.", where=str(path), next_step=_SAVE_AGAIN)
    kind = TABLES.get(inner)
    if kind is None and (unpack := _ARCHIVES.get(ending) or _ARCHIVES.get(inner)):
        raise TableError(
            f"The file is an archive ({ending}), and only the tables in it can be read.",
            where=str(path),
            next_step=f"unpack it with {unpack} {shlex.quote(str(path))}, then name the table",
        )
    if kind is None:
        raise TableError(
            f"Files that end in {ending} cannot be read." if ending else "A file without an extension cannot be read.",
            where=str(path),
            next_step=f"the table must be one of {', '.join(TABLES)}, as text perhaps compressed, as in .csv.gz",
        )
    if ending in EXTENSIONS and kind not in _COMPRESSED:
        raise TableError(
            f"A {inner} file inside a {ending} file cannot be read.", where=str(path), next_step="decompress it"
        )
    return kind


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
        raise NothingInside("The file is empty.", where=str(path), next_step="it needs at least a header line")
    return seen


def refuse_disguise(path: Path, head: bytes) -> None:
    """Raise TableError if the first bytes of a text file show another kind of file."""
    for mark, truth in _DISGUISES.items():
        if head.startswith(mark):
            step = (
                _SAVE_AGAIN
                if "Excel" in truth
                else "give it the right extension"
                if truth == "Parquet"
                else f"name it {path.name}.gz, or decompress it"
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


def changed_error(file: Source) -> TableError:
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
