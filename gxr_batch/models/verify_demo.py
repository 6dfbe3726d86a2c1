"""Decides whether a converted demo model in a shared cache folder is the one that the conversion makes.

Others who can write there could put another model or tokenizer in its place. The files' digests are known for the
library versions of constraints.txt. Reading them takes a second, so a user's private folder has a record of the files,
by size, times and inode, that were verified or that this user's own conversion wrote.
"""

from __future__ import annotations

import hashlib
import json
import stat
from functools import cache
from pathlib import Path

from gxr_batch.disk import sha256_of
from gxr_batch.models.private_cache import read_record, write_record

_SHA256 = {
    "model.safetensors": "d9df495ac8121f17441f73a45548b59cd75068fbd5e57ed0883c9e4a443fe908",
    "tokenizer.json": "3c01ed742c180439796d05b781d1cc02ce30801903444b53a73c57fe9d798a84",
}
# Of the values in these, without those of _NOT_OF_THE_MODEL.
_VALUES_SHA256 = {
    "config.json": "64a22f25bffc3032908bb5ae4de467b1575442b297307df271be5d5cfe2d579c",
    "generation_config.json": "f910da57f7a3766499027a833ebc281aff8ea664c436e0e57ba0cb76e485ed3a",
    "tokenizer_config.json": "49d311430767f6de70b51c0b9d446bfb49eb77dd3550656f61aed29b87613776",
}
# The library's version, and whether it was offline while it wrote the file.
_NOT_OF_THE_MODEL = ("transformers_version", "local_files_only")
_NOT_LOADED = {"NOTICE", "gxr-batch.json"}
_RECORD = "demo-verified.json"
_MOST_JSON_BYTES = 2**20


def is_genuine(folder: Path) -> bool:
    """Return whether a folder holds exactly what the conversion makes, as far as it is loaded. Raises OSError."""
    state = _state(folder)
    if state.encode() == read_record(_RECORD):
        return True
    found = _matches(folder, state)
    if found:
        write_record(_RECORD, state.encode())
    return found


def remember(folder: Path) -> None:
    """Record a folder that this process has just converted. Raises OSError."""
    write_record(_RECORD, _state(folder).encode())


def _state(folder: Path) -> str:
    found = [(path, path.lstat()) for path in sorted(folder.iterdir())]
    return "\n".join(
        f"{path}|{info.st_mode}|{info.st_size}|{info.st_mtime_ns}|{info.st_ctime_ns}|{info.st_ino}"
        for path, info in found
    )


@cache
def _matches(folder: Path, state: str) -> bool:
    """Compare every file; `state` is for the cache of this process, if there is no private folder."""
    names = {path.name for path in folder.iterdir() if stat.S_ISREG(path.lstat().st_mode)}
    if len(names) != len(state.splitlines()) or names - _NOT_LOADED != _SHA256.keys() | _VALUES_SHA256.keys():
        return False
    values = all(_values_sha256(folder / name) == digest for name, digest in _VALUES_SHA256.items())
    return values and all(sha256_of(folder / name, links=True) == digest for name, digest in _SHA256.items())


def _values_sha256(path: Path) -> str:
    if path.stat().st_size > _MOST_JSON_BYTES:
        return ""
    try:
        values = json.loads(path.read_bytes())
        for name in _NOT_OF_THE_MODEL:
            values.pop(name, None)
    except (ValueError, AttributeError, RecursionError):
        return ""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
