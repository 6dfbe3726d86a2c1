"""Identifies weights: one sha256 for a folder's safetensors files, cheap to compute again.

A file's sha256 is cached in the user's cache folder by path, size, modification time and inode, so that gigabytes are
read once and not in every invocation. A changed file gets another entry; the cache may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from gxr_batch.disk import write_text
from gxr_batch.errors import ModelUnavailable, StorageError
from gxr_batch.files import read_json
from gxr_batch.models.permissions import refuse_unreadable

_HASHES = "weights-sha256.json"
_BLOCK_BYTES = 2**20


def cache_home() -> Path:
    """Return the user's cache folder for gxr-batch, by the XDG rules; it need not exist.

    Raises StorageError if the user has no home folder and XDG_CACHE_HOME is not set.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    if Path(home).is_absolute():  # the XDG specification requires relative values to be ignored
        return Path(home) / "gxr-batch"
    with suppress(RuntimeError):  # no HOME and no passwd entry, as in a container that runs under any uid
        if (home_folder := Path.home()).is_absolute():  # else it would be in the current folder, whatever that is
            return home_folder / ".cache" / "gxr-batch"
    raise StorageError(
        "There is no place for the cache folder: this user has no home folder.",
        where="neither HOME nor XDG_CACHE_HOME is an absolute path",
        next_step="set XDG_CACHE_HOME to a folder that this user may write to, e.g. export "
        'XDG_CACHE_HOME="$PWD/.cache"',
    )


def weights_sha256(files: Iterable[Path]) -> str:
    """Return the sha256 of a set of weight files: the file's own for one, else one over the sorted (name, sha256).

    Raises ModelUnavailable if a file cannot be read.
    """
    # Sort by the listed name, hash the linked content: hub snapshots are links into a blob store.
    listed = list(files)
    refuse_unreadable(listed)  # even if the hash is known
    found = sorted((file.name, file.resolve()) for file in listed)
    known = _load()
    fresh: dict[str, str] = {}
    hashes = []
    for name, path in found:
        try:
            entry = _entry(path)
            digest = known.get(entry) or _sha256(path)
        except OSError as error:
            raise ModelUnavailable(
                f"A weight file cannot be read: {error.strerror or type(error).__name__}.", where=str(path)
            ) from None
        if entry not in known:
            fresh[entry] = digest
        hashes.append((name, digest))
    if fresh:
        _remember(fresh)
    if len(hashes) == 1:
        return hashes[0][1]
    return hashlib.sha256("".join(f"{name}\t{digest}\n" for name, digest in hashes).encode()).hexdigest()


def _entry(path: Path) -> str:
    stat = path.stat()
    return f"{path}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _load() -> dict[str, str]:
    try:
        return read_json(cache_home() / _HASHES)
    except (OSError, ValueError, StorageError):
        return {}


def _remember(fresh: dict[str, str]) -> None:
    """Add entries to the cache. If that fails, the next invocation just reads the weights again."""
    text = json.dumps(_load() | fresh, indent=0)
    with suppress(OSError, StorageError):
        folder = cache_home()
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / _HASHES, text)
