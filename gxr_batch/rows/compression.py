"""Compressed files as streams of their content: gzip, zstd, bzip2 and xz, recognised by their first bytes.

Several compressed streams one after the other, as `cat` makes them, are read as one.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import pyarrow as pa

from gxr_batch.errors import TableError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _typeshed import WriteableBuffer

# Extension -> name of the compression.
EXTENSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bzip2", ".xz": "xz"}
_FIRST_BYTES = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "bzip2": b"BZh", "xz": b"\xfd7zXZ\x00"}

_OPENERS: dict[str, Callable[[Any], IO[bytes]]] = {
    "gzip": lambda file: cast(IO[bytes], gzip.GzipFile(fileobj=file)),
    "zstd": lambda file: cast(IO[bytes], pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")),
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
}


def compression_of(head: bytes) -> str:
    """Return the name of the compression that a file's first bytes show, "" if none."""
    return next((name for name, mark in _FIRST_BYTES.items() if head.startswith(mark)), "")


def is_stub(head: bytes, compression: str) -> bool:
    """Return whether the first bytes of a file are less than the mark of a compression: nothing else of it is left."""
    return len(head) < len(_FIRST_BYTES[compression]) and _FIRST_BYTES[compression].startswith(head)


def decompressed(source: io.RawIOBase, compression: str, path: Path) -> io.RawIOBase:
    """Return a stream of the content of `source`, which is `source` itself without a compression.

    Reading raises TableError, naming `path`, if the file is damaged or truncated.
    """
    if not compression:
        return source
    with _damage(path):
        return _Content(_OPENERS[compression](source), path)


class _Content(io.RawIOBase):
    """A decompressed stream whose errors name the file."""

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self._stream, self._path = stream, path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        with _damage(self._path):
            content = self._stream.read(len(view))
        view[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn errors of a decompressor into a TableError; an error of the disk passes."""
    try:
        yield
    except MemoryError:
        raise
    except (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise damaged_error(path) from None


def damaged_error(path: Path) -> TableError:
    """Return the error for a compressed file that is not whole."""
    return TableError(
        "The compressed file is damaged or truncated.",
        where=str(path.absolute()),
        next_step="copy or download it again",
    )
