"""What kind of file a workbook really is, how openpyxl can read it, and what reading it may cost.

Which cells it has is left to others. Tables and reviewed sheets are read under the same limits: Excel's own for rows
and columns, bytes and seconds in proportion to the file's size, and cells. A small file can hold gigabytes.

Excel also saves "Strict Open XML", with other names for the same elements, which openpyxl does not know: such a file is
read as a copy in memory with the usual names. Encrypted workbooks are not zip files but OLE containers, like those of
Excel 97; the names of their streams tell them apart.
"""

from __future__ import annotations

import errno
import io
import re
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

from gxr_batch.cells import quoted
from gxr_batch.errors import GxrError, TableError
from gxr_batch.rows.source_files import CHUNK_BYTES, reading

_T = TypeVar("_T")
_ZIP, _OLE = b"PK\x03\x04", b"\xd0\xcf\x11\xe0"
_STRICT = b"http://purl.oclc.org/ooxml/"
_STRICT_NAME = re.compile(rb"""(["'])http://purl\.oclc\.org/ooxml/(\w+)/""")
_USUAL_NAME = rb"\1http://schemas.openxmlformats.org/\2/2006/"
# Of members with cells only the root element is changed, which declares the names: a cell may have any text.
_WITH_CELLS = re.compile(rb"<(\w+:)?(worksheet|sst)\b[^>]*>")
# What openpyxl and its dependencies raise for damaged files: zipfile's NotImplementedError is an unknown compression
# method, its RuntimeError an encrypted member.
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, LookupError, ValueError, TypeError, AttributeError, SyntaxError, EOFError,
    ArithmeticError, NotImplementedError, RuntimeError,
)  # fmt: skip
_ROWS_A_READ = 256
_MOST_ROWS, _MOST_COLUMNS = 1_048_576, 16_384  # Excel's limits
_MOST_IN_A_ROW = 2**26  # characters; shared strings need no space in the file
# What a file may unpack to, its cells up to the last one of each row, and the CPU time to read it: in proportion to its
# size, ten times what large exports need on a slow machine.
_MOST_BYTES, _BYTES_A_BYTE = 2**30, 200
_MOST_CELLS, _CELLS_A_BYTE = 2**22, 30
_MOST_SECONDS, _SECONDS_A_MIB = 30.0, 30.0
_LARGE = 2**26  # bytes of a part; only sheets and shared strings are larger
_MOST_IN_A_CELL = 2**24  # bytes between two tags
_ENCRYPTED, _BY_LABEL = (name.encode("utf-16-le") for name in ("EncryptedPackage", "DRMEncrypted"))


def is_zip(path: Path) -> bool:
    """Return whether a file is a zip archive, as workbooks are, by its first bytes. Raises TableError."""
    return _head(path) == _ZIP


def _head(path: Path) -> bytes:
    with reading(path), path.open("rb") as file:
        return file.read(4)


def refuse_other_containers(path: Path) -> None:
    """Raise TableError for an encrypted workbook, one of Excel 97, and the lock file of an open workbook."""
    if path.name.startswith("~$"):
        raise TableError(
            "This is the file by which Excel marks a workbook as open, not the workbook.",
            where=str(path.absolute()),
            next_step=f"close the workbook in Excel, and name {path.name.removeprefix('~$')}",
        )
    if _head(path) != _OLE:
        return
    if _contains(path, _BY_LABEL):
        what = "The workbook is encrypted by a sensitivity label or by rights management."
        step = "choose a label without encryption in Excel, or save the sheet as CSV UTF-8, and use that file"
    elif _contains(path, _ENCRYPTED):
        what = "The workbook is encrypted with a password."
        step = (
            "remove the password in Excel (File > Info > Protect Workbook > Encrypt with Password: leave it empty), "
            "and save it again"
        )
    else:
        what = "The workbook is in the format of Excel 97, despite its name."
        step = 'open it in Excel and save it with the type "Excel Workbook (*.xlsx)"'
    raise TableError(what, where=str(path.absolute()), next_step=step)


def _contains(path: Path, mark: bytes) -> bool:
    with reading(path), path.open("rb") as file:
        rest = b""
        while chunk := file.read(CHUNK_BYTES):
            if mark in rest + chunk:
                return True
            rest = chunk[-len(mark) :]
    return False


@contextmanager
def readable(path: Path) -> Iterator[IO[bytes]]:
    """Yield a workbook's bytes as openpyxl can read them, as an open file that may be read for a limited time.

    Raises TableError, and BadZipFile and zlib.error for a damaged file.
    """
    with reading(path), _places(), path.open("rb") as file:
        timed: Any = _Timed(file, path)
        with zipfile.ZipFile(timed) as archive:
            _refuse_size(archive, path)
            strict = _STRICT in archive.read("_rels/.rels")
            source = _with_usual_names(archive) if strict else None
        timed.seek(0)
        yield timed if source is None else timed.with_bytes(source)


class _Timed:
    """An open file that raises TableError once reading it has taken more CPU time than a file of its size needs."""

    def __init__(self, file: IO[bytes], path: Path, until: float | None = None) -> None:
        self._file, self._path = file, path
        if until is None:
            until = time.thread_time() + _MOST_SECONDS + _SECONDS_A_MIB * path.stat().st_size / 2**20
        self._until = until

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def with_bytes(self, source: IO[bytes]) -> _Timed:
        """Return other bytes of the same workbook, under the same limit."""
        return _Timed(source, self._path, self._until)

    def read(self, size: int = -1) -> bytes:
        """Read. Raises TableError."""
        if time.thread_time() > self._until:
            raise _too_costly(self._path, "takes far longer to read than its size explains")
        return self._file.read(size)


def _too_costly(path: Path, what: str) -> TableError:
    return TableError(
        f"The workbook {what}.",
        where=str(path.absolute()),
        next_step="save the sheet as CSV UTF-8 in a spreadsheet, and use that file",
    )


def _refuse_size(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise TableError if the workbook unpacks to more than a file of its size may, or has a cell without end."""
    parts = [part for part in archive.infolist() if part.filename.endswith((".xml", ".rels"))]  # images are not read
    unpacked = sum(part.file_size for part in parts)  # zipfile never reads more
    if unpacked > _MOST_BYTES + _BYTES_A_BYTE * path.stat().st_size:
        raise _too_costly(path, f"would unpack to {unpacked / 2**30:,.1f} GiB")
    for part in parts:
        if part.file_size > _LARGE:
            with archive.open(part) as source:
                _refuse_large_part(source, path)


def _refuse_large_part(source: IO[bytes], path: Path) -> None:
    chunk = source.read(CHUNK_BYTES)
    if not _WITH_CELLS.search(chunk):
        raise _too_costly(path, f"has settings of more than {_LARGE / 2**20:,.0f} MiB")
    text = 0  # bytes since the last tag began
    while chunk:
        first = chunk.find(b"<")
        if text + (len(chunk) if first < 0 else first) > _MOST_IN_A_CELL:
            raise _too_costly(path, f"has a cell of more than {_MOST_IN_A_CELL / 2**20:,.0f} MiB")
        text = text + len(chunk) if first < 0 else len(chunk) - chunk.rfind(b"<")
        chunk = source.read(CHUNK_BYTES)


@contextmanager
def _places() -> Iterator[None]:
    """Turn the error for a place before the beginning of a file into BadZipFile: the disk is not at fault."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise zipfile.BadZipFile from None


@contextmanager
def damage_as(error: type[GxrError], path: Path) -> Iterator[None]:
    """Convert what openpyxl raises for a damaged file into `error`, and drop its warnings; both may quote the file."""
    from openpyxl.utils.exceptions import InvalidFileException

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _places():
                yield
        except (*_DAMAGE, InvalidFileException):
            raise error(
                "The file is not a readable workbook.",
                where=str(path.absolute()),
                next_step="open it in a spreadsheet and save it again as .xlsx",
            ) from None


def load_book(source: IO[bytes]) -> Any:
    """Open a workbook to be read row by row. Its texts are escaped (`_x000D_`); callers resolve that once, at the end.

    openpyxl itself resolves a part of it in shared texts alone: whether `_x0041_` was escaped is lost then.
    """
    from openpyxl.cell.text import Text
    from openpyxl.reader.excel import ExcelReader
    from openpyxl.xml.constants import SHARED_STRINGS, SHEET_MAIN_NS
    from openpyxl.xml.functions import iterparse

    class Reader(ExcelReader):
        def read_strings(self) -> None:
            part: Any = self.package.find(SHARED_STRINGS)  # type: ignore[no-untyped-call]
            if part is None:
                return
            with self.archive.open(part.PartName[1:]) as file:
                for _, node in iterparse(file):
                    if node.tag == f"{{{SHEET_MAIN_NS}}}si":
                        text: Any = Text.from_tree(node)
                        self.shared_strings.append(text.content)
                        node.clear()

    reader = Reader(source, read_only=True, data_only=True)
    reader.read()
    return reader.wb


def numbered_rows(
    path: Path,
    sheet: Any,
    guard: Callable[[], AbstractContextManager[None]],
    convert: Callable[[Any], _T],
    empty: _T,
    *,
    width: int = 0,
) -> Iterator[tuple[int, list[_T]]]:
    """Yield the rows of a sheet with their numbers from 1, up to the last cell with a value, each cell converted.

    Rows that the file lacks are left out; `empty` is the value of cells that it lacks. `width`: cells that the caller
    makes of each row at least.

    openpyxl works only inside `guard`, which is never around a yield: it changes how the process shows warnings.
    Raises TableError if the sheet exceeds a limit.
    """
    rows = _rows(path, sheet, width, convert, empty)
    while True:
        with guard():
            some = list(islice(rows, _ROWS_A_READ))
        if not some:
            return
        yield from some


def _rows(
    path: Path, sheet: Any, width: int, convert: Callable[[Any], _T], empty: _T
) -> Iterator[tuple[int, list[_T]]]:
    """Yield numbered rows. openpyxl's own iteration fills every gap, in time and memory that no file needs."""
    from openpyxl.cell.read_only import ReadOnlyCell
    from openpyxl.worksheet._reader import WorkSheetParser

    book = sheet.parent
    longest = max(map(len, sheet._shared_strings), default=0)
    most = _MOST_CELLS + _CELLS_A_BYTE * path.stat().st_size
    last = total = 0
    with sheet._get_source() as source:
        parser = WorkSheetParser(
            source,
            sheet._shared_strings,
            data_only=book.data_only,
            epoch=book.epoch,
            date_formats=book._date_formats,
            timedelta_formats=book._timedelta_formats,
        )
        for number, cells in parser.parse():
            if number <= last:  # as openpyxl does with a row that repeats a number
                continue
            last = number
            filled = [cell for cell in cells if cell["value"] is not None]
            reach = max((cell["column"] for cell in filled), default=0)
            total += max(reach, width)
            if number > _MOST_ROWS or reach > _MOST_COLUMNS:
                raise _too_costly(
                    path, f"has a cell outside the {_MOST_ROWS:,} rows and {_MOST_COLUMNS:,} columns of Excel"
                )
            if total > most:
                raise _too_costly(path, f"has more than {most:,} cells in the sheet {quoted(sheet.title)}")
            if longest * len(filled) > _MOST_IN_A_ROW and _characters(filled) > _MOST_IN_A_ROW:
                raise _too_costly(path, f"has too much text in row {number} of the sheet {quoted(sheet.title)}")
            row = [empty] * reach
            for cell in filled:
                row[cell["column"] - 1] = convert(ReadOnlyCell(sheet, **cell))
            yield number, row


def _characters(cells: list[Any]) -> int:
    return sum(len(cell["value"]) for cell in cells if isinstance(cell["value"], str))


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def unescaped(text: str) -> str:
    """Return a text as typed: the file format writes a carriage return as `_x000D_`. Halves of a character are joined.

    A half without its other half remains; see `cells.is_unicode`.
    """
    from openpyxl.utils.escape import unescape

    if "_x" not in text:
        return text
    return unescape(text).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def without_halves(text: str) -> str:
    """Return a text with U+FFFD for each half of a surrogate pair."""
    return _LONE_SURROGATE.sub("\ufffd", text)


def _with_usual_names(archive: zipfile.ZipFile) -> io.BytesIO:
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target:
        for member in archive.infolist():
            with archive.open(member) as old, target.open(member.filename, "w", force_zip64=True) as new:
                start = old.read(CHUNK_BYTES)
                if root := _WITH_CELLS.search(start):
                    start = _STRICT_NAME.sub(_USUAL_NAME, start[: root.end()]) + start[root.end() :]
                elif member.filename.endswith((".xml", ".rels")):
                    start = _STRICT_NAME.sub(_USUAL_NAME, start + old.read())
                new.write(start)
                while chunk := old.read(CHUNK_BYTES):
                    new.write(chunk)
    copy.seek(0)
    return copy
