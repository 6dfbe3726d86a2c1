"""Where the run of a job is. Imports no table and no template: `status`, `show` and `export` ask only this."""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path

from gxr_batch.errors import LaterVersion
from gxr_batch.job import Job, load_job
from gxr_batch.ledger import is_run
from gxr_batch.ledger.manifest import known_manifest, name_and_outcome
from gxr_batch.ledger.parts import PARTS_NAME


def output_folder(job: Job, today: date) -> Path:
    """Return the run folder. With {date} in the name, an unfinished run of this job keeps its date."""
    pattern = Path(job.run.output.replace("{name}", job.name))
    if "{date}" not in str(pattern):
        return pattern
    first = next(place for place, part in enumerate(pattern.parts) if "{date}" in part)
    base = Path(*pattern.parts[:first])
    any_date = "/".join(pattern.parts[first:]).replace("{date}", "[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]")
    for folder in sorted(base.glob(any_date), reverse=True):
        if _unfinished(folder, job):
            return folder
    return Path(str(pattern).replace("{date}", today.isoformat()))


def run_folder_of(path: Path) -> Path:
    """Return the run folder of a job file, and any other path as it is. Raises JobFileError."""
    return output_folder(load_job(path), date.today()) if path.suffix == ".toml" and path.is_file() else path


def _unfinished(folder: Path, job: Job) -> bool:
    if not is_run(folder) and not os.path.isdir(folder / PARTS_NAME):
        return False
    try:
        manifest = known_manifest(folder)
    except LaterVersion:
        name, outcome = name_and_outcome(folder)
        if name != job.name or outcome == "finished":  # another job, or nothing to resume
            return False
        raise
    if manifest is None:
        return False
    if not manifest.job:  # known from its parts, since run.json is lost: whether it was finished is not
        return True
    if not manifest.invocations:
        return False
    same = manifest.name == job.name and manifest.job.get("input", {}).get("path") == job.input.path
    return same and manifest.invocations[-1].get("outcome") != "finished"
