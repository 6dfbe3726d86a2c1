"""Records what was exported from which state of a run, to detect outdated exports and keep edited ones.

exports.json lists every export with the state that it was made from and the file's size and time: by name if it is in
the run folder, else by its absolute path. A file that changed since then contains a person's work, such as a
reviewer's: it is set aside, never replaced. No export replaces a file that a run depends on, its input, or a file
elsewhere that is no export of this run.

Modification times alone are not enough: a reviewer who saves an outdated workbook makes it newer than the results, an
export that began before the results changed ends after them, and no time tells an untouched workbook from a filled-in
one. States and times are compared for equality, never for order, so neither clock changes nor the coarse times of a
network disk matter. In a copy with new times (cp -r) every export counts as outdated and changed, which costs a file
and loses nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO

from gxr_batch.cells import quoted
from gxr_batch.disk import aside, storage_errors, sync_folder, write_text, write_whole
from gxr_batch.errors import RunError, StorageError
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
# What exports are called. Others in a run folder, such as a job file, are not even set aside.
_SUFFIXES = frozenset({".xlsx", ".csv", ".jsonl", ".parquet", ".html"})
# Ends the state of a comparison of two runs, which is never the report that a job's exports keep up to date.
_COMPARISON = " against"


def state_of(folder: Path) -> str:
    """Return an identifier of the current state of results and reviews."""
    with storage_errors(folder):
        results = folder / RESULTS_NAME
        made = results.stat() if results.exists() else None
        newest = review_files(folder)[-1:]
    return f"{made.st_mtime_ns if made else 0}-{made.st_size if made else 0}-{newest[0].name if newest else ''}"


class ExportFile:
    """A file to which an export of a run is about to be written, from the state of the run at this moment.

    Raises RunError if it is one of the run's own files, its input, not a regular file, or no export of this run;
    StorageError. `notes` tells about the file that was there before.
    """

    def __init__(self, reader: RunReader, path: Path, *, comparison: bool = False) -> None:
        self.path, self.notes = path, tuple[str, ...]()
        self._folder = reader.folder
        # Before any read, so that later changes make the file outdated.
        self._state = state_of(reader.folder) + (_COMPARISON if comparison else "")
        self._made: dict[str, int] = {}
        with storage_errors(path):
            _refuse(reader, path)
        remove_leftovers(path.parent, path.name)  # of exports that were killed

    def write(self, write: Callable[[BinaryIO], None]) -> None:
        """Write the file, and note from which state. Raises StorageError.

        An export elsewhere is written even if the run folder cannot be.
        """
        write_whole(self.path, write, last=self._look_again)
        known = _known(self._folder)
        with storage_errors(self.path):
            name = _name(self._folder, self.path)
        known[name] = {"state": self._state, **self._made}
        with suppress(StorageError) if name != self.path.name else nullcontext():
            write_text(self._folder / EXPORTS_NAME, json.dumps(known, indent=1) + "\n")

    def _look_again(self, finished: Path) -> None:
        """Set aside what a person saved while the export was written, which may take minutes."""
        if kept := _keep_changed(self._folder, self.path):
            self.notes = (f"the earlier file was changed since its export and is kept as {quoted(kept.name)}",)
        made = finished.stat()  # not that of the final name, under which a person may save at once
        self._made = {"size": made.st_size, "mtime_ns": made.st_mtime_ns}


def _name(folder: Path, path: Path) -> str:
    """Return the name of an export in exports.json."""
    parent = _real(path.parent)
    return path.name if parent == _real(folder) else str(parent / path.name)


def _real(path: Path) -> Path:
    """Return a path without links; unlike Path.resolve, it leaves links that lead to each other as they are."""
    return Path(os.path.realpath(path))


def is_current(folder: Path, path: Path) -> bool:
    """Return whether an export exists and was made from the current state, even if the file was edited since."""
    return path.is_file() and _known(folder).get(path.name, {}).get("state") == state_of(folder)


def outdated(folder: Path) -> list[str]:
    """Return the names of the exports in the run folder that were made from an earlier state."""
    state = state_of(folder)
    states = {name: str(entry.get("state")).removesuffix(_COMPARISON) for name, entry in _known(folder).items()}
    own = (name for name, made_from in states.items() if made_from != state and os.sep not in name)
    return sorted(name for name in own if (folder / name).is_file())


def _keep_changed(folder: Path, path: Path) -> Path | None:
    """Set aside a file that changed since it was exported; return its new name. Raises StorageError."""
    if not path.is_file():
        return None
    with storage_errors(path):
        made, entry = path.stat(), _known(folder).get(_name(folder, path), {})
        if not made.st_size or (made.st_size, made.st_mtime_ns) == (entry.get("size"), entry.get("mtime_ns")):
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


def is_own(path: Path, folder: Path) -> bool:
    """Return whether a path is one of the files that a run depends on, of this run or any other."""
    runs = [parent for parent in path.parents if parent == folder or is_run(parent)]
    return any(path.relative_to(run).parts[0] in {*_OWN_FILES, *_OWN_FOLDERS} for run in runs)


def _refuse(reader: RunReader, path: Path) -> None:
    inputs = {_real(Path(file)) for entry in reader.manifest.invocations for file in entry.get("input_files", ())}
    real, folder = _real(path), _real(reader.folder)
    wrong = {
        "It is one of the run's own files.": is_own(real, folder),
        "It is the run's input.": real in inputs,
        "It exists and is not a regular file.": not path.name or (path.exists() and not path.is_file()),
        "Its folder does not exist.": not real.parent.is_dir(),
    }
    for reason, holds in wrong.items():
        if holds:
            raise RunError(f"Cannot write the file there. {reason}", where=str(real), next_step="choose another --to")
    name = _name(folder, path)
    made_here = name in _known(folder) or (name == path.name and path.suffix in _SUFFIXES)
    if path.exists() and path.stat().st_size and not made_here:
        raise RunError(
            "Cannot write the file there. It exists and is no export of this run.",
            where=str(real),
            next_step="choose another --to, or move that file away first",
        )
