"""run.json: what was asked, with which model, on which machine, and one entry for each invocation.

It explains a run; it never decides which rows are done. It holds settings, counts and row ids, never text of cells.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from gxr_batch.errors import FingerprintError, RunError
from gxr_batch.ledger.files import write_whole
from gxr_batch.ledger.state import Counts

MANIFEST_NAME = "run.json"
FORMAT = 1
_AI = "gxr_ai_generated"
_SURROGATES = re.compile("[\ud800-\udfff]")
# What other parts of gxr-batch read of an invocation's entry.
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
    """The content of run.json.

    `resolved` maps dotted job keys to what an automatic value became; `fingerprint` maps what decides the texts to its
    value; `model` describes the weights and device of the newest invocation that loaded them.
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
        """Replace run.json. Raises StorageError."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        write_whole(folder / MANIFEST_NAME, lambda path: _write_text(path, text))

    def released(self) -> frozenset[tuple[str, str]]:
        """Return row id and content hash of the rows that a person released: identifier screening only flags these."""
        entries = (entry.get("released", {}).get("rows", {}) for entry in self.invocations)
        return frozenset(row for rows in entries for row in rows.items())

    def compare(self, fingerprint: dict[str, Any], *, raisable: frozenset[str] = frozenset(), where: str = "") -> None:
        """Raise FingerprintError, naming the keys, where a run with this fingerprint must not go on here.

        Keys in `raisable` may grow. Templates are compared by name: a run may come to use more of them.
        """
        changed = []
        for key, value in fingerprint.items():
            old = self.fingerprint.get(key)
            if key == "templates" and old is not None:
                changed += [f"template {name}" for name, digest in value.items() if old.get(name, digest) != digest]
            elif key in self.fingerprint and old != value and not (key in raisable and _larger(value, old)):
                changed.append(f"{key} ({_brief(old)} -> {_brief(value)})" if _speakable(key) else key)
        if changed:
            raise FingerprintError(
                f"This run was made with other settings: {', '.join(changed)}.",
                where=where,
                next_step="add --fresh to start anew (the old folder is kept under another name), "
                "choose another --output, or set the old value again",
            )


def _validate(manifest: Manifest) -> None:
    """Raise ValueError, KeyError, TypeError or AttributeError where an entry is not of the kind that others read."""
    samples = manifest.job["sampling"]["samples_per_row"]
    marks = manifest.model.get("provenance", {})
    entries = [(name, value) for entry in manifest.invocations for name, value in entry.items()]
    wrong = [name for name, value in entries if not isinstance(value, _KINDS.get(name, object))]
    wrong += [name for name, value in entries if name == "counts" and set(value) != set(Counts._fields)]
    released = [value["rows"] for name, value in entries if name == "released"]
    wrong += [name for rows in released for name, value in rows.items() if not isinstance(value, str)]
    wrong += [name for name, value in marks.items() if not isinstance(value, bool if name == _AI else str | None)]
    for name, value in entries:
        if name == "generating_since":
            datetime.fromisoformat(value)
    manifest.job.get("input", {}).get("path")
    shapes = (manifest.resolved, manifest.fingerprint, manifest.fingerprint.get("templates", {}))
    if wrong or not all(isinstance(shape, dict) for shape in shapes) or not isinstance(samples, int) or samples < 1:
        raise ValueError


def _write_text(path: Path, text: str) -> None:
    # A file name that is not UTF-8 holds lone surrogates; JSON's own escapes keep them.
    path.write_text(_SURROGATES.sub(lambda found: f"\\u{ord(found[0]):04x}", text), encoding="utf-8")


def _larger(value: Any, old: Any) -> bool:
    return isinstance(old, int) and isinstance(value, int) and value > old


def _speakable(key: str) -> bool:
    return key != "prompt.system"  # a system text is a prompt, and prompts stay out of messages


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


def load_manifest(folder: Path) -> Manifest | None:
    """Read run.json; None where there is none. Raises RunError where it is damaged or from a later version."""
    path = folder / MANIFEST_NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] > FORMAT:
            raise RunError(
                "This run was made by a later version of gxr-batch.",
                where=str(path),
                next_step="update gxr-batch",
            )
        manifest = Manifest(**data)
        _validate(manifest)
        return manifest  # noqa: TRY300
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise RunError(
            "The run's manifest is damaged.",
            where=str(path.absolute()),
            next_step=f"rename it to {MANIFEST_NAME}.damaged and run the job again: no generated row is lost",
        ) from None
