"""The boundary around models, tokenizers and adapters that others made: whatever is wrong with their files is one
ModelUnavailable that names file and key.

`read_object` reads a small JSON file within limits. `loading` is put around calls of a library with such files, and
around nothing else: a fault in our own code keeps its traceback.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gxr_batch.cells import quoted
from gxr_batch.disk import sha256_of
from gxr_batch.errors import GxrError, ModelUnavailable
from gxr_batch.files import NoObject, json_object, open_plain, read_bytes
from gxr_batch.models.permissions import refuse_unreadable

AGAIN = "correct the file, or copy the folder again"
_MIB = 2**20
# Far above what any program writes: names, sizes, a chat template, an index of all tensors.
MOST_BYTES = 16 * _MIB
_MOST_TOKENIZER_BYTES = 1024 * _MIB
_BIG = ("tokenizer.json", "tokenizer.model")
_DEPTH = 60
_KEY = re.compile(r"[A-Za-z_][\w.-]{2,}")
_PANIC = "PanicException"  # a fault in a library in Rust; derived from BaseException


@contextmanager
def loading(what: str, *files: Path, next_step: str = AGAIN) -> Iterator[None]:
    """Turn whatever a library raises inside the block into a ModelUnavailable with the sentence `what`.

    `files` are those that it reads; the message names the first, or the one with the key that the library complains of.
    """
    try:
        yield
    except (GxrError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise  # Ctrl-C, a signal
        if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error):
            raise  # torch, which is not imported here; the callers report it with the device
        if isinstance(error, ImportError):
            raise not_importable(error, files[0]) from None
        raise ModelUnavailable(
            f"{what} ({type(error).__name__}).", where=_place(error, files), next_step=next_step
        ) from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file with an object. Raises ModelUnavailable, also if there is no file."""
    try:
        return json_object(read_text(path), _DEPTH)
    except NoObject as error:
        raise _damaged(path, str(error)) from None


def read_text(path: Path) -> str:
    """Read a small text file. Raises ModelUnavailable."""
    refuse_unreadable([path])
    try:
        return read_bytes(path, MOST_BYTES, links=True).decode()
    except UnicodeDecodeError as error:
        raise _damaged(path, f"it is not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise _damaged(path, _reason(error)) from None


def refuse_large(path: Path) -> None:
    """Raise ModelUnavailable if the file of a tokenizer is no plain file, or too large to be read into memory."""
    try:
        with open_plain(path, links=True) as file:
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise _damaged(path, _reason(error)) from None
    if size > _MOST_TOKENIZER_BYTES:
        raise _damaged(path, f"it is larger than {_MOST_TOKENIZER_BYTES // _MIB:,} MiB")


def file_sha256(path: Path) -> str:
    """Return the sha256 of a small file, or of a tokenizer's. Raises ModelUnavailable."""
    refuse_unreadable([path])
    refuse_large(path)
    try:
        return sha256_of(path, links=True)
    except OSError as error:
        raise _damaged(path, _reason(error)) from None


def refuse_damaged(folder: Path, *names: str) -> None:
    """Raise ModelUnavailable if one of these JSON files of a folder exists and is damaged."""
    for name in names:
        path = folder / name
        if path.exists() or path.is_symlink():
            if path.name in _BIG:
                refuse_large(path)
            else:
                read_object(path)


def bad_value(path: Path, key: str, wanted: str) -> ModelUnavailable:
    """Return the error for a value of a JSON file."""
    return ModelUnavailable(
        f"The model's {path.name} has a value that cannot be used.",
        where=f"{path}: {key}",
        next_step=f"it must be {wanted}; {AGAIN}",
    )


def _reason(error: OSError) -> str:
    text = error.strerror or type(error).__name__
    return text[:1].lower() + text[1:]


def not_importable(error: ImportError, path: Path) -> ModelUnavailable:
    """Return the error for a package that a library wants to import to load this file or folder, which is not at fault.

    Libraries name the package only in their own message.
    """
    return ModelUnavailable(
        f"A package that loading this model needs cannot be imported: {quoted(' '.join(str(error).split()))}.",
        where=str(path),
        next_step="install that package, or another version of it, in this Python environment",
    )


def _damaged(path: Path, why: str) -> ModelUnavailable:
    return ModelUnavailable(f"A file of the model cannot be read: {why}.", where=str(path), next_step=AGAIN)


def _place(error: BaseException, files: tuple[Path, ...]) -> str:
    """Return the file with the key that an error names, else the first file.

    The libraries name keys in their messages, which are not shown: they may quote anything, at any length.
    """
    words = set(_KEY.findall(str(error)[:2000]))
    for path in files:
        if path.suffix != ".json" or path.name in _BIG:
            continue
        try:
            keys = _keys(read_object(path))
        except ModelUnavailable:
            continue
        if found := sorted((key for key in keys if key.rpartition(".")[2] in words), key=len):
            return f"{path}: {found[0]}"
    return str(files[0])


def _keys(document: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in document.items():
        if _KEY.fullmatch(key):
            yield f"{prefix}{key}"
            if isinstance(value, dict):
                yield from _keys(value, f"{prefix}{key}.")
