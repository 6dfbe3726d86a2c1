"""The first sheet: what this is, where it came from, how to review it."""

from __future__ import annotations

from typing import Any

from gxr_batch.cells import for_workbook
from gxr_batch.export.source import Source
from gxr_batch.export.xlsx.formats import Formats
from gxr_batch.records import DISCLAIMER, ERROR_CATEGORIES, REVIEW_STATUSES

APPROVED_TITLE = "AI-generated teaching cases, approved by a reviewer"
APPROVED_BANNER = (
    "AI-generated teaching material. Each case was approved by the person in gxr_reviewer; gxr_review_text, where "
    "filled, replaces gxr_text. Research and education only; not for diagnosis, treatment or any clinical use."
)
_HOW = (
    "Each row of the sheet Cases is one case. The dark blue columns are as they were generated: please leave them "
    "unchanged, a changed text is refused when the sheet is read back.",
    f"gxr_review_status: {', '.join(REVIEW_STATUSES)}.",
    "gxr_review_quality: 1 (unusable) to 5 (ready to teach with).",
    f"Counts of errors, significant and insignificant each: {', '.join(ERROR_CATEGORIES.values())}.",
    "gxr_review_text: the whole corrected text, for approved_with_edits. gxr_review_comment: anything else.",
    "gxr_reviewer and gxr_reviewed_at: your name and the date.",
    "Rows may be sorted, filtered or deleted, columns moved or added: rows are found by gxr_row_id and gxr_sample.",
    "gxr_flags points at what deserves a closer look. A flag is a hint of a rule, never a score, and its absence is no "
    "proof of anything.",
)


def write_readme(workbook: Any, formats: Formats, source: Source) -> None:
    """Write the sheet."""
    sheet = workbook.add_worksheet("README")
    sheet.set_column(0, 0, 26)
    sheet.set_column(1, 1, 100)
    sheet.hide_gridlines(2)
    manifest, counts = source.reader.manifest, source.counts
    model = manifest.model.get("provenance", {})
    job = manifest.job
    last = manifest.invocations[-1] if manifest.invocations else {}
    facts = {
        "job": manifest.name,
        "rows": f"{counts.total:,}: {counts.ok:,} generated, {counts.failed:,} failed, {counts.held:,} held"
        + (f", {counts.left:,} still to do and not in this file" if source.partial else ""),
        "in this file": "the approved cases alone" if source.approved else "every row that is done",
        "model": " ".join(str(part) for part in (model.get("gxr_model"), model.get("gxr_model_revision")) if part),
        "adapter": model.get("gxr_adapter") or "none",
        "template": job.get("prompt", {}).get("template_column") or job.get("prompt", {}).get("template", ""),
        "started": manifest.created_at,
        "last change": last.get("finished_at", ""),
        "run folder": str(source.reader.folder.name),
    }
    about = APPROVED_TITLE if source.approved else "AI-generated teaching cases, not reviewed"
    lines: list[tuple[str, str, Any]] = [(about, "", formats.title)]
    lines += [("", APPROVED_BANNER if source.approved else DISCLAIMER, formats.banner), ("", "", formats.plain)]
    lines += [(name, str(value), formats.plain) for name, value in facts.items()]
    lines += [("", "", formats.plain), ("How to review", "", formats.title)]
    lines += [("", sentence, formats.plain) for sentence in _HOW]
    for row, (name, text, form) in enumerate(lines):
        if name:
            sheet.write_string(row, 0, for_workbook(name).text, form)
        if text:
            sheet.write_string(row, 1, for_workbook(text).text, form)
