"""A finished run whose texts have a form, written through the ledger without an engine."""

from __future__ import annotations

import json
from pathlib import Path

from small_runs import PROVENANCE, manifest, result, start

from gxr_batch.forms import Form, composed, form_of
from gxr_batch.job import Job
from gxr_batch.ledger import encode_metadata, open_run

JOB = Job.model_validate(
    {
        "name": "n",
        "input": {"path": "f.csv"},
        "form": {
            "sections": ["Impression", "Key findings", "Answer", "Difficulty", "Grade"],
            "section": {
                "Key findings": {"kind": "bullets"},
                "Answer": {"kind": "line", "hidden": True},
                "Difficulty": {"kind": "choice", "choices": ["easy", "moderate", "hard"]},
                "Grade": {"kind": "number"},
            },
        },
    }
)
FORM: Form = form_of(JOB)
CONTENTS = ["Right basal consolidation.", ["Consolidation", "=no effusion"], "It is pneumonia", "easy", 3.5]
TEXT = composed(FORM, CONTENTS)


def run_with_form(folder: Path, texts: dict[str, str] | None = None) -> Path:
    """Write a run of the rows a, b and c, or of these texts."""
    texts = texts or dict.fromkeys("abc", TEXT)
    folder.mkdir(parents=True)
    with open_run(folder) as ledger:
        start(ledger, list(texts))
        for at, (row, text) in enumerate(texts.items()):
            ledger.add(at, result(row, text=text))
        ledger.seal()
        made = manifest(form=FORM.recorded)
        made.job = json.loads(JOB.model_dump_json())
        made.model = {"provenance": PROVENANCE}
        made.save(folder)
        ledger.write_results(PROVENANCE, encode_metadata({"gxr_source": "s"}), FORM)
    return folder
