"""Text files as streams: detecting a file's encoding, and reading it line by line while hashing its bytes.

An encoding is accepted only if the whole file decodes in it, so that no row can fail to decode later.
"""

from __future__ import annotations

import codecs
import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gxr_batch.errors import TableError
from gxr_batch.rows.source_files import CHUNK_BYTES, reading, refuse_disguise

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# UTF-32 first: its little-endian mark begins with the UTF-16 one.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF8, "utf-8", "UTF-8 with a byte order mark"),
    (codecs.BOM_UTF16_LE, "utf-16", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16", "UTF-16"),
)
BYTE_ORDER_MARK = "\ufeff"


class Scanned(NamedTuple):
    """The result of one pass over a text file. `notice` names the encoding unless it is plain UTF-8."""

    encoding: str
    sha256: str
    notice: str


def scan(path: Path, wanted: str) -> Scanned:
    """Hash a text file and determine its encoding ("auto" = detect it). Raises TableError if it does not decode."""
    with reading(path), path.open("rb") as file:
        head = file.read(4)
    refuse_disguise(path, head)
    if wanted != "auto":
        return Scanned(wanted, _decodes_or_raise(path, _known(wanted)), "")
    for mark, encoding, label in _MARKS:
        if head.startswith(mark):
            return Scanned(encoding, _decodes_or_raise(path, encoding), f"read as {label}")
    sha256, decodes = _pass(path, "utf-8")
    if decodes:
        return Scanned("utf-8", sha256, "")
    sha256 = _decodes_or_raise(path, "cp1252", "neither UTF-8 nor cp1252")
    notice = (
        "read as cp1252 (Western European Windows) because it is not UTF-8; set input.encoding if letters look wrong"
    )
    return Scanned("cp1252", sha256, notice)


def _known(encoding: str) -> str:
    try:
        "x".encode(encoding)  # refuses codecs that are not text encodings, such as rot13
        codecs.getincrementaldecoder(encoding)
    except (LookupError, UnicodeError, ValueError):
        raise TableError(
            f"Unknown text encoding: {encoding}.",
            where="input.encoding",
            next_step='set it to "auto", or to one such as "utf-8", "cp1252", "latin-1", "utf-16"',
        ) from None
    return encoding


def _pass(path: Path, encoding: str) -> tuple[str, bool]:
    """Return the file's sha256 and whether all of it decodes."""
    digest, decodes = hashlib.sha256(), True
    decoder = codecs.getincrementaldecoder(encoding)()
    with reading(path), path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            if decodes:
                decodes = _decodes(decoder, chunk)
    return digest.hexdigest(), decodes and _decodes(decoder, b"", final=True)


def _decodes(decoder: codecs.IncrementalDecoder, chunk: bytes, *, final: bool = False) -> bool:
    try:
        decoder.decode(chunk, final)
    except UnicodeError:
        return False
    return True


def _decodes_or_raise(path: Path, encoding: str, complaint: str = "") -> str:
    sha256, decodes = _pass(path, encoding)
    if not decodes:
        raise TableError(
            f"The file is {complaint or f'not {encoding}'} text.",
            where=f"{path}, line {_undecodable_line(path, encoding)}",
            next_step='set input.encoding, e.g. to "utf-8", "cp1252", "latin-1", "utf-16"',
        )
    return sha256


def _undecodable_line(path: Path, encoding: str) -> int:
    """Return the line (from 1) of the first bytes that do not decode."""
    decoder = codecs.getincrementaldecoder(encoding)()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    line = 1
    with reading(path), path.open("rb") as file:
        while chunk := file.read(4096):
            state = decoder.getstate()
            try:
                line += newlines.decode(decoder.decode(chunk)).count("\n")
            except UnicodeError:
                decoder.setstate(state)
                try:
                    for byte in chunk:
                        line += newlines.decode(decoder.decode(bytes((byte,)))).count("\n")
                except UnicodeError:
                    break
    return line


class _HashedFile(io.RawIOBase):
    """A file that hashes and counts what is read from it."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.taken = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        size = self._file.readinto(view) or 0
        self._digest.update(view[:size])
        self.taken += size
        return size

    def sha256(self) -> str:
        return self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()
        super().close()


class Lines:
    """The lines of a text file with their line ends and without a byte order mark, hashed while they are read."""

    def __init__(self, source: _HashedFile, text: io.TextIOWrapper) -> None:
        self._source, self._text = source, text

    @property
    def bytes_taken(self) -> int:
        """Bytes of the file read so far, up to a buffer ahead."""
        return self._source.taken

    def sample(self, characters: int) -> str:
        """Return the beginning of the text; the stream cannot be read as lines afterwards."""
        return self._text.read(characters).removeprefix(BYTE_ORDER_MARK)

    def sha256(self) -> str:
        """Read the rest of the file and return the sha256 of all of it."""
        while self._source.read(CHUNK_BYTES):
            pass
        return self._source.sha256()

    def __iter__(self) -> Iterator[str]:
        first = self._text.readline().removeprefix(BYTE_ORDER_MARK)
        if separator_line(first):
            first = "\n"  # a hint for Excel, not a row: replaced by a blank line to keep line numbers right
        return chain([first] if first else [], self._text)


def separator_line(line: str) -> str:
    """Return the delimiter that a first line such as `sep=;` names, "" for any other line."""
    word = line.strip("\r\n").strip('"')
    return word[4] if len(word) == 5 and word[:4].lower() == "sep=" else ""


@contextmanager
def open_lines(path: Path, encoding: str) -> Iterator[Lines]:
    """Open a text file to be read line by line. Raises TableError, StorageError."""
    with reading(path):
        source = _HashedFile(io.FileIO(path))
        # Line ends are kept: the csv module needs them.
        with source, io.TextIOWrapper(io.BufferedReader(source, CHUNK_BYTES), encoding=encoding, newline="") as text:
            yield Lines(source, text)
