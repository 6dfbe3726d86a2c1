"""Which weights these are: one sha256 for a folder's safetensors files, cheap to ask for again.

A file's sha256 is kept in the user's cache folder under its path, size, modification time and inode, so that gigabytes
are read once and not at every start. A changed file has another entry; the cache may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from gxr_batch.errors import ModelUnavailable

_HASHES = "weights-sha256.json"
_BLOCK_BYTES = 2**20


def cache_home() -> Path:
    """Return the user's cache folder for gxr-batch, after the XDG rules; it need not exist."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative values ignored.
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "gxr-batch"


def weights_sha256(files: Iterable[Path]) -> str:
    """Return the sha256 of a set of weight files: the file's own for one, else one over the sorted (name, sha256).

    Raises ModelUnavailable if a file cannot be read.
    """
    # The name as listed, the content as linked to: hub snapshots are links into a store of blobs.
    found = sorted((file.name, file.resolve()) for file in files)
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
        known = json.loads((cache_home() / _HASHES).read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(fresh: dict[str, str]) -> None:
    """Add entries to the cache. Where that is impossible the next start reads the weights again, nothing else."""
    folder = cache_home()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=f".{_HASHES}.")
        with os.fdopen(descriptor, "w") as file:
            json.dump(_load() | fresh, file, indent=0)
        Path(name).replace(folder / _HASHES)
    except OSError:
        return
