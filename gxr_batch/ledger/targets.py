"""Where a file that is made of a run may be written: over none of the run's own files, and not over its input."""

from __future__ import annotations

from pathlib import Path

from gxr_batch.errors import RunError
from gxr_batch.ledger.reader import RunReader, is_run
from gxr_batch.storage import storage_errors

_OWN_FILES = frozenset(
    {
        "run.json",
        "input.parquet",
        "results.parquet",
        "failed.parquet",
        "run.lock",
        "log.jsonl",
        "inflight.json",
        "exports.json",
    }
)
_OWN_FOLDERS = ("parts", "reviews")


def checked_target(reader: RunReader, path: Path) -> Path:
    """Return where to write.

    Raises RunError where that is one of the run's own files, its input, or no regular file; StorageError.
    """
    with storage_errors(path):
        _refuse(reader, path)
    return path


def is_own(path: Path, folder: Path) -> bool:
    """Return whether a path is one of the files that a run lives on: of this run, or of any other."""
    runs = [parent for parent in path.parents if parent == folder or is_run(parent)]
    return any(path.relative_to(run).parts[0] in {*_OWN_FILES, *_OWN_FOLDERS} for run in runs)


def _refuse(reader: RunReader, path: Path) -> None:
    inputs = {Path(file).resolve() for entry in reader.manifest.invocations for file in entry.get("input_files", ())}
    real, folder = path.resolve(), reader.folder.resolve()
    wrong = {
        "It is one of the run's own files.": is_own(real, folder),
        "It is the run's input.": real in inputs,
        "It exists and is no regular file.": not path.name or (path.exists() and not path.is_file()),
        "Its folder does not exist.": not real.parent.is_dir(),
    }
    for reason, holds in wrong.items():
        if holds:
            raise RunError(f"No file can be written there. {reason}", where=str(real), next_step="choose another --to")
