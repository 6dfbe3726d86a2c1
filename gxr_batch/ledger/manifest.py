"""run.json: what was requested, with which model, on which machine, and one entry for each invocation.

It explains a run; it never decides which rows are done. It holds settings, counts and row ids, never text of cells.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from gxr_batch.disk import denied, not_plain, storage_errors, write_text
from gxr_batch.errors import LaterVersion, RunError
from gxr_batch.files import DEEPEST, NotPlain, json_object, read_json, require_folder
from gxr_batch.job import recorded_job
from gxr_batch.job.schema import MOST_SAMPLES
from gxr_batch.ledger.parts import PARTS_NAME, file_metadata, part_numbers, part_path, refuse_later_parts
from gxr_batch.ledger.reviews import REVIEWS_NAME, refuse_later_reviews
from gxr_batch.ledger.run_format import FORMAT, later_version, refuse_later_format
from gxr_batch.ledger.state import MOST_COUNTED, Counts, are_counts

MANIFEST_NAME = "run.json"
# Keys of the manifest itself that earlier versions wrote. None so far.
_RETIRED: frozenset[str] = frozenset()
_AI = "gxr_ai_generated"
_SURROGATES = re.compile("[\ud800-\udfff]")
# Fields of an invocation's entry that other packages read.
_KINDS: dict[str, Any] = {
    "started_at": str,
    "generating_since": str,
    "counts": dict,
    "number": int,
    "done": int,
    "done_before": int,
    "streaming_seconds": int | float,
    "input_files": list,
    "released": dict,
    "workers": dict,
}


@dataclass(kw_only=True)
class Manifest:
    """The content of run.json, in this version's keys whichever version wrote it.

    `resolved` maps dotted job keys to the settled automatic values; `fingerprint` maps everything that decides the
    texts to its value; `model` describes the weights and device of the newest invocation that loaded them.
    """

    name: str
    created_at: str
    job: dict[str, Any]
    resolved: dict[str, Any] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    invocations: list[dict[str, Any]] = field(default_factory=list)
    format: int = FORMAT

    def save(self, folder: Path) -> None:
        """Replace run.json, in this version's format. Raises StorageError."""
        self.format = FORMAT
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        # A file name that is not UTF-8 has lone surrogates, which JSON's escapes preserve.
        write_text(folder / MANIFEST_NAME, _SURROGATES.sub(lambda found: f"\\u{ord(found[0]):04x}", text))

    def released(self) -> frozenset[tuple[str, str]]:
        """Return row id and content hash of the rows released by a person; identifier screening only flags them."""
        entries = (entry.get("released", {}).get("rows", {}) for entry in self.invocations)
        return frozenset(row for rows in entries for row in rows.items())


def known_manifest(folder: Path) -> Manifest | None:
    """Return run.json, or if it is lost the copy in the newest sound part; None if there is neither.

    Raises RunError if run.json is damaged, LaterVersion.
    """
    return load_manifest(folder) or _remembered(folder)


def _remembered(folder: Path) -> Manifest | None:
    newest_first = (file_metadata(part_path(folder, number)) for number in part_numbers(folder)[::-1])
    marks = next((marks for marks in newest_first if "gxr_fingerprint" in marks), {})
    try:
        known: dict[str, Any] = {
            name: json_object(marks[f"gxr_{name}"], DEEPEST) for name in ("resolved", "fingerprint")
        }
    except (ValueError, KeyError):
        return None
    return Manifest(name=folder.name, created_at="", job={}, **known)


def name_and_outcome(folder: Path) -> tuple[object, object]:
    """Return a run's name and the outcome of its newest invocation, whichever version wrote it; None if missing."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        data = read_json(folder / MANIFEST_NAME)
        return data["name"], data["invocations"][-1].get("outcome")
    return None, None


def refuse_links(folder: Path) -> None:
    """Raise StorageError if a folder inside a run folder is a link: a run neither reads nor writes through one."""
    for name in (PARTS_NAME, REVIEWS_NAME):
        with storage_errors(folder / name):
            require_folder(folder / name)


def refuse_later_run(folder: Path) -> None:
    """Raise LaterVersion if a later version wrote the manifest, a part or a review file. Touches nothing.

    Does not check whether they are sound.
    """
    try:
        load_manifest(folder)
    except LaterVersion:
        raise
    except RunError:
        pass
    refuse_later_files(folder)


def refuse_later_files(folder: Path) -> None:
    """Raise LaterVersion if a later version wrote a part or a review file; run.json is not read."""
    refuse_later_parts(folder)
    refuse_later_reviews(folder)


def _validate(manifest: Manifest) -> None:
    """Raise ValueError, KeyError, TypeError or AttributeError if an entry has the wrong type."""
    samples = manifest.job["sampling"]["samples_per_row"]
    marks = manifest.model.get("provenance", {})
    entries = [(name, value) for entry in manifest.invocations for name, value in entry.items()]
    wrong = [name for name, value in entries if not isinstance(value, _KINDS.get(name, object))]
    wrong += [name for name, value in entries if isinstance(value, int | float) and not abs(value) <= MOST_COUNTED]
    wrong += [name for name, value in entries if name == "counts" and not are_counts(value)]
    wrong += [name for name, value in entries if name == "input_files" and b"\0" in b"".join(map(os.fsencode, value))]
    released = [value["rows"] for name, value in entries if name == "released"]
    wrong += [name for rows in released for name, value in rows.items() if not isinstance(value, str)]
    wrong += [name for name, value in marks.items() if not isinstance(value, bool if name == _AI else str | None)]
    for name, value in entries:
        if name == "generating_since":
            datetime.fromisoformat(value)
    manifest.job.get("input", {}).get("path")
    shapes = (manifest.resolved, manifest.fingerprint, manifest.fingerprint.get("templates", {}))
    if (
        wrong
        or not all(isinstance(shape, dict) for shape in shapes)
        or not isinstance(samples, int)
        or not 1 <= samples <= MOST_SAMPLES
    ):
        raise ValueError


def load_manifest(folder: Path) -> Manifest | None:
    """Read run.json; None if there is none. Raises RunError if it is damaged, LaterVersion."""
    path = folder / MANIFEST_NAME
    try:
        data = read_json(path)
        refuse_later_format(path, data["format"])
        data["job"]["sampling"]["samples_per_row"]  # every version recorded it, so every manifest has it
        job, unknown = recorded_job(data["job"])
        unknown += sorted(data.keys() - Manifest.__dataclass_fields__.keys() - _RETIRED)
        for entry in data.get("invocations", []):
            if isinstance(entry.get("counts"), dict):
                unknown += sorted(f"counts.{name}" for name in entry["counts"].keys() - set(Counts._fields))
                entry["counts"] = dict.fromkeys(Counts._fields, 0) | entry["counts"]
        if unknown:
            raise later_version(path, f"key {unknown[0]}")
        fields = {key: value for key, value in data.items() if key not in _RETIRED}
        manifest = Manifest(**{**fields, "job": job})
        _validate(manifest)
        return manifest  # noqa: TRY300
    except FileNotFoundError:
        return None
    except PermissionError:
        raise denied(path) from None
    except NotPlain as error:
        raise not_plain(path, error) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise damaged_manifest(folder) from None


def damaged_manifest(folder: Path) -> RunError:
    """Return the error for a run.json that cannot be used."""
    return RunError(
        "The run's manifest is damaged.",
        where=str((folder / MANIFEST_NAME).absolute()),
        next_step=f"rename it to {MANIFEST_NAME}.damaged and run the job again: no generated row is lost",
    )
