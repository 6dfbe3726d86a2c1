"""Text files as streams: detecting a file's encoding, and reading it line by line while hashing its bytes.

A compressed file is read as the text inside; its hash is that of the compressed bytes.

An encoding is accepted only if the whole file decodes in it, so that no row can fail to decode later.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gxr_batch.cells import quoted
from gxr_batch.errors import TableError
from gxr_batch.rows.columns import counted
from gxr_batch.rows.compression import EXTENSIONS, compression_of, damaged_error, decompressed, is_stub
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
# Characters that show UTF-8. "Fuß…" and "É»" in cp1252 are UTF-8 too, but of rare letters, and at the end of a word.
# "surrogateescape" decodes a byte that is not UTF-8 as a surrogate.
_TELLING = re.compile(r"[\u00a0-\u00ff\u2000-\u22ff]|[^\x00-\x7f\ufeff\udc80-\udcff](?=\w)")
_BROKEN = re.compile(r"[\udc80-\udcff]")


class Scanned(NamedTuple):
    """The result of one pass over a text file. `notice` names the encoding unless it is plain UTF-8.

    `escapes` tells whether a quote follows a backslash somewhere.
    """

    encoding: str
    sha256: str
    notice: str
    escapes: bool = False


def stored_as(path: Path) -> tuple[str, list[str]]:
    """Return the compression of a file that is named as compressed, and a notice if its bytes show another one."""
    ending = path.suffix.lower()
    if ending not in EXTENSIONS:
        return "", []
    with reading(path), path.open("rb") as file:
        head = file.read(8)
    compression = compression_of(head)
    if is_stub(head, EXTENSIONS[ending]):
        raise damaged_error(path)
    if compression == EXTENSIONS[ending]:
        return compression, []
    return compression, [f"the file ends in {ending}, but is {compression or 'not compressed'}; read as it is"]


def scan(path: Path, wanted: str, compression: str = "") -> Scanned:
    """Hash a text file and determine its encoding ("auto" = detect it). Raises TableError if it does not decode."""
    with reading(path), _HashedFile(io.FileIO(path)) as source:
        head = decompressed(source, compression, path).read(4) or b""
    refuse_disguise(path, head)
    if wanted != "auto":
        return _decodes_or_raise(path, _known(wanted), compression)
    for mark, encoding, label in _MARKS:
        if head.startswith(mark):
            return _decodes_or_raise(path, encoding, compression)._replace(notice=f"read as {label}")
    found, decodes = _pass(path, "utf-8", compression)
    if decodes:
        return found
    if not compression and path.suffix.lower() in EXTENSIONS:  # named as compressed, and neither that nor plainly text
        raise damaged_error(path)
    _refuse_broken_utf8(path, compression)
    found = _decodes_or_raise(path, "cp1252", compression, "neither UTF-8 nor cp1252")
    notice = (
        "read as cp1252 (Western European Windows) because it is not UTF-8; set input.encoding if letters look wrong"
    )
    return found._replace(notice=notice)


def _known(encoding: str) -> str:
    try:
        "x".encode(encoding)  # refuses codecs that are not text encodings, such as rot13
        codecs.getincrementaldecoder(encoding)
    except (LookupError, UnicodeError, ValueError):
        raise TableError(
            f"Unknown text encoding: {quoted(encoding)}.",
            where="input.encoding",
            next_step='set it to "auto", or to one such as "utf-8", "cp1252", "latin-1", "utf-16"',
        ) from None
    return encoding


def _pass(path: Path, encoding: str, compression: str) -> tuple[Scanned, bool]:
    """Read all of the file; return what is known of it, and whether it decodes."""
    decodes, escapes = True, False
    decoder = codecs.getincrementaldecoder(encoding)()
    with reading(path), _HashedFile(io.FileIO(path)) as source:
        content = decompressed(source, compression, path)
        while chunk := content.read(CHUNK_BYTES):
            if decodes:
                try:
                    text = decoder.decode(chunk)
                except UnicodeError:
                    decodes = False
                else:
                    escapes = escapes or ("\\" in text and '\\"' in text)  # one character is found faster
        if decodes:
            try:
                decoder.decode(b"", True)
            except UnicodeError:
                decodes = False
        return Scanned(encoding, source.rest_sha256(), "", escapes), decodes


def _decodes_or_raise(path: Path, encoding: str, compression: str, complaint: str = "") -> Scanned:
    found, decodes = _pass(path, encoding, compression)
    if not decodes:
        raise TableError(
            f"The file is {complaint or f'not {encoding}'} text.",
            where=f"{path}, line {_undecodable_line(path, encoding, compression)}",
            next_step='set input.encoding, e.g. to "utf-8", "cp1252", "latin-1", "utf-16"',
        )
    return found


def _refuse_broken_utf8(path: Path, compression: str) -> None:
    """Raise TableError if a file that does not decode is mostly UTF-8: as cp1252, all of it would be garbled."""
    whole = broken = 0
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    with reading(path), _HashedFile(io.FileIO(path)) as source:
        content = decompressed(source, compression, path)
        while chunk := content.read(CHUNK_BYTES):
            text = decoder.decode(chunk)
            if not text.isascii():
                whole += len(_TELLING.findall(text))
                broken += len(_BROKEN.findall(text))
        broken += len(decoder.decode(b"", True))
    if whole > broken:
        raise TableError(
            f"The file is UTF-8 text, except for {counted(broken, 'byte')}.",
            where=f"{path}, line {_undecodable_line(path, 'utf-8', compression)}",
            next_step='fix that line, where a character may be cut in half; input.encoding = "cp1252" would read '
            "every line as cp1252",
        )


def _undecodable_line(path: Path, encoding: str, compression: str) -> int:
    """Return the line (from 1) of the first bytes that do not decode."""
    decoder = codecs.getincrementaldecoder(encoding)()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    line = 1
    with reading(path), _HashedFile(io.FileIO(path)) as source:
        file = io.BufferedReader(decompressed(source, compression, path))
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

    def rest_sha256(self) -> str:
        """Read the rest of the file and return the sha256 of all of it."""
        while self.read(CHUNK_BYTES):
            pass
        return self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()
        super().close()


class _Counted(io.RawIOBase):
    """A stream that counts what is read from it."""

    def __init__(self, stream: io.RawIOBase) -> None:
        self._stream = stream
        self.taken = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        size = self._stream.readinto(buffer) or 0
        self.taken += size
        return size

    def close(self) -> None:
        self._stream.close()
        super().close()


class Lines:
    """The lines of a text file with their line ends and without a byte order mark, hashed while they are read."""

    def __init__(self, source: _HashedFile, content: _Counted | _HashedFile, text: io.TextIOWrapper) -> None:
        self._source, self._content, self._text = source, content, text

    @property
    def bytes_taken(self) -> int:
        """Bytes of the content read so far, up to a buffer ahead."""
        return self._content.taken

    def skip(self, lines: int) -> None:
        """Pass over lines at the beginning, before any other is read."""
        for _ in range(lines):
            self._text.readline()

    def sample(self, characters: int) -> str:
        """Return the beginning of the text; the stream cannot be read as lines afterwards."""
        return self._text.read(characters).removeprefix(BYTE_ORDER_MARK)

    def sha256(self) -> str:
        """Read the rest of the file and return the sha256 of all of it."""
        return self._source.rest_sha256()

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
def open_lines(path: Path, encoding: str, compression: str = "") -> Iterator[Lines]:
    """Open a text file to be read line by line. Raises TableError, StorageError."""
    with reading(path):
        source = _HashedFile(io.FileIO(path))
        content = _Counted(decompressed(source, compression, path)) if compression else source
        # Line ends are kept: the csv module needs them.
        with source, io.TextIOWrapper(io.BufferedReader(content, CHUNK_BYTES), encoding=encoding, newline="") as text:
            yield Lines(source, content, text)
