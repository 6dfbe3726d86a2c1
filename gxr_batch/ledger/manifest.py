"""run.json: what was asked, with which model, on which machine, and one entry for each invocation.

It explains a run; it never decides which rows are done. It holds settings, counts and row ids, never text of cells.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gxr_batch.errors import FingerprintError, RunError
from gxr_batch.ledger.files import write_whole

MANIFEST_NAME = "run.json"
FORMAT = 1


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

    def compare(self, fingerprint: dict[str, Any], *, raisable: frozenset[str] = frozenset()) -> None:
        """Raise FingerprintError, naming the keys, where a run with this fingerprint must not go on here.

        Keys in `raisable` may grow. Templates are compared by name: a run may come to use more of them.
        """
        changed = []
        for key, value in fingerprint.items():
            old = self.fingerprint.get(key)
            if key == "templates" and old is not None:
                changed += [f"template {name}" for name, digest in value.items() if old.get(name, digest) != digest]
            elif key in self.fingerprint and old != value and not (key in raisable and value > old):
                changed.append(f"{key} ({_brief(old)} -> {_brief(value)})" if _speakable(key) else key)
        if changed:
            raise FingerprintError(
                f"This run was made with other settings: {', '.join(changed)}.",
                next_step="add --fresh to start anew (the old folder is kept under another name), "
                "choose another --output, or set the old value again",
            )


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


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
        return Manifest(**data)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(
            "The run's manifest is damaged.",
            where=str(path.absolute()),
            next_step=f"rename it to {MANIFEST_NAME}.damaged and run the job again: no generated row is lost",
        ) from None
