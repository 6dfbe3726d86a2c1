"""Records what was exported from which state of a run, to detect outdated exports and keep edited ones.

exports.json lists every export in the run folder with the state that it was made from and the file's size and time. A
file that changed since then contains a person's work, such as a reviewer's: it is set aside, never replaced. No export
replaces a file that a run depends on, or its input.

Modification times alone are not enough: a reviewer who saves an outdated workbook makes it newer than the results, an
export that began before the results changed ends after them, and no time tells an untouched workbook from a filled-in
one. States and times are compared for equality, never for order, so neither clock changes nor the coarse times of a
network disk matter. In a copy with new times (cp -r) every export counts as outdated and changed, which costs a file
and loses nothing.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from gxr_batch.disk import aside, storage_errors, sync_folder, write_text
from gxr_batch.errors import RunError
from gxr_batch.files import read_json, remove_leftovers
from gxr_batch.ledger.inflight import INFLIGHT_NAME
from gxr_batch.ledger.join import FAILED_NAME, INPUT_NAME, RESULTS_NAME
from gxr_batch.ledger.lock import LOCK_NAME
from gxr_batch.ledger.log import LOG_NAME
from gxr_batch.ledger.manifest import MANIFEST_NAME
from gxr_batch.ledger.parts import PARTS_NAME
from gxr_batch.ledger.reviews import REVIEWS_NAME, review_files
from gxr_batch.ledger.run_reader import RunReader, is_run

EXPORTS_NAME = "exports.json"
# Files that a run depends on, which no export may replace.
_OWN_FILES = frozenset(
    {MANIFEST_NAME, INPUT_NAME, RESULTS_NAME, FAILED_NAME, LOCK_NAME, LOG_NAME, INFLIGHT_NAME, EXPORTS_NAME}
)
_OWN_FOLDERS = (PARTS_NAME, REVIEWS_NAME)


def state_of(folder: Path) -> str:
    """Return an identifier of the current state of results and reviews."""
    with storage_errors(folder):
        results = folder / RESULTS_NAME
        made = results.stat() if results.exists() else None
        newest = review_files(folder)[-1:]
    return f"{made.st_mtime_ns if made else 0}-{made.st_size if made else 0}-{newest[0].name if newest else ''}"


def remember(folder: Path, path: Path, state: str) -> None:
    """Note that an export in the run folder was just made from a state. Raises StorageError."""
    if path.parent.resolve() != folder.resolve():
        return
    known = _known(folder)
    with storage_errors(path):
        made = path.stat()
    known[path.name] = {"state": state, "size": made.st_size, "mtime_ns": made.st_mtime_ns}
    write_text(folder / EXPORTS_NAME, json.dumps(known, indent=1) + "\n")


def is_current(folder: Path, path: Path) -> bool:
    """Return whether an export exists and was made from the current state, even if the file was edited since."""
    return path.is_file() and _known(folder).get(path.name, {}).get("state") == state_of(folder)


def outdated(folder: Path) -> list[str]:
    """Return the names of the exports in the run folder that were made from an earlier state."""
    state = state_of(folder)
    old = (name for name, entry in _known(folder).items() if entry.get("state") != state)
    return sorted(name for name in old if (folder / name).is_file())


def keep_changed(folder: Path, path: Path) -> Path | None:
    """Set aside a file that changed since it was exported; return its new name. Raises StorageError."""
    if path.parent.resolve() != folder.resolve() or not path.is_file():
        return None
    with storage_errors(path):
        made, entry = path.stat(), _known(folder).get(path.name, {})
        if (made.st_size, made.st_mtime_ns) == (entry.get("size"), entry.get("mtime_ns")):
            return None
        kept = aside(path, suffix=path.suffix)
        path.rename(kept)
        sync_folder(path.parent)
    return kept


def _known(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the content of exports.json, {} if it cannot be read: it is only a convenience."""
    with suppress(OSError, ValueError):
        known = read_json(folder / EXPORTS_NAME)
        return {name: entry for name, entry in known.items() if isinstance(entry, dict)}
    return {}


def checked_target(reader: RunReader, path: Path) -> Path:
    """Return the path to write to.

    Raises RunError if it is one of the run's own files, its input, or not a regular file; StorageError.
    """
    with storage_errors(path):
        _refuse(reader, path)
    remove_leftovers(path.parent, path.name)  # of exports that were killed
    return path


def is_own(path: Path, folder: Path) -> bool:
    """Return whether a path is one of the files that a run depends on, of this run or any other."""
    runs = [parent for parent in path.parents if parent == folder or is_run(parent)]
    return any(path.relative_to(run).parts[0] in {*_OWN_FILES, *_OWN_FOLDERS} for run in runs)


def _refuse(reader: RunReader, path: Path) -> None:
    inputs = {Path(file).resolve() for entry in reader.manifest.invocations for file in entry.get("input_files", ())}
    real, folder = path.resolve(), reader.folder.resolve()
    wrong = {
        "It is one of the run's own files.": is_own(real, folder),
        "It is the run's input.": real in inputs,
        "It exists and is not a regular file.": not path.name or (path.exists() and not path.is_file()),
        "Its folder does not exist.": not real.parent.is_dir(),
    }
    for reason, holds in wrong.items():
        if holds:
            raise RunError(f"Cannot write the file there. {reason}", where=str(real), next_step="choose another --to")
