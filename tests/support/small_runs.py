"""Small runs, written through the ledger without an engine."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gxr_batch.ledger import Manifest, encode_metadata, open_run, read_results
from gxr_batch.records import Result

PROVENANCE = {
    "gxr_model": "m",
    "gxr_model_revision": "",
    "gxr_adapter": None,
    "gxr_ai_generated": True,
    "gxr_review_status": "unreviewed",
    "gxr_disclaimer": "d",
}


def result(row_id: str, *, content: str | None = None, status="ok", sample=1, attempt=1, text=None) -> Result:
    return Result(
        row_id=row_id,
        sample=sample,
        content_hash=content or f"hash of {row_id}",
        status=status,
        text=text if text is not None or status != "ok" else f"text of {row_id}",
        finish_reason="stop" if status == "ok" else "error",
        error=None if status == "ok" else "reason",
        flags=[],
        prompt_tokens=3,
        new_tokens=4,
        max_new_tokens=8,
        seed=1,
        attempt=attempt,
        seconds_queued=0.0,
        seconds_to_first_token=0.1,
        seconds_generating=0.2,
        seconds_share=0.1,
        tokens_per_second=20.0,
        rows_in_batch=2.0,
        started_at=1_700_000_000_000,
        finished_at=1_700_000_000_200,
        template="t",
        reasoning=None,
        prompt_sha256="p",
    )


def write_input(path: Path, ids: list[str], contents: dict[str, str] | None = None) -> None:
    hashes = [(contents or {}).get(row_id, f"hash of {row_id}") for row_id in ids]
    table = {"findings": [f"findings of {row_id}" for row_id in ids], "gxr_row_id": ids, "gxr_content_hash": hashes}
    pq.write_table(pa.table(table), path)


def start(ledger, ids, contents=None, samples=1):
    write_input(ledger.incoming_input, ids, contents)
    return ledger.adopt_input(samples)


def finish(ledger):
    ledger.write_results(PROVENANCE, encode_metadata({"gxr_source": "s"}))


def finish_with_a_failure(folder):
    with open_run(folder) as ledger:
        start(ledger, ["a", "b"])
        ledger.add(0, result("a"))
        ledger.add(1, result("b", status="failed"))
        ledger.seal()
        finish(ledger)


def manifest(**fingerprint) -> Manifest:
    return Manifest(name="n", created_at="t", job={"sampling": {"samples_per_row": 1}}, fingerprint=fingerprint)


def read_with_manifest(folder: Path):
    made = manifest()
    made.model = {"provenance": PROVENANCE}
    made.save(folder)
    return read_results(folder)
