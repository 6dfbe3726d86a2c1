"""What kind of file a workbook really is, and how openpyxl can read it. Which cells it has is left to others.

Excel also saves "Strict Open XML", with other names for the same elements, which openpyxl does not know: such a file is
read as a copy in memory with the usual names. Encrypted workbooks are not zip files but OLE containers, like those of
Excel 97; the names of their streams tell them apart.
"""

from __future__ import annotations

import errno
import io
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

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
    """Yield a workbook's bytes as openpyxl can read them, as an open file.

    Raises TableError, and BadZipFile and zlib.error for a damaged file.
    """
    with reading(path), _places(), path.open("rb") as file:
        with zipfile.ZipFile(file) as archive:
            strict = _STRICT in archive.read("_rels/.rels")
            source = _with_usual_names(archive) if strict else None
        if source is None:
            file.seek(0)
            yield file
        else:
            yield source


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
    sheet: Any, guard: Callable[[], AbstractContextManager[None]], convert: Callable[[Any], _T], *, values_only: bool
) -> Iterator[tuple[int, _T]]:
    """Yield the rows of a sheet with their numbers from 1, each converted.

    openpyxl works only inside `guard`, which is never around a yield: it changes how the process shows warnings.
    """
    with guard():
        sheet.reset_dimensions()  # other programs may save wrong dimensions
        rows = enumerate(sheet.iter_rows(values_only=values_only), start=1)
    while True:
        with guard():
            some = [(number, convert(cells)) for number, cells in islice(rows, _ROWS_A_READ)]
        if not some:
            return
        yield from some


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
