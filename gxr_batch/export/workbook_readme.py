"""Writes the workbook's first sheet, README: what the workbook is, where it came from, how to review it."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

from gxr_batch.cells import for_workbook
from gxr_batch.export.export_rows import Source
from gxr_batch.export.workbook_layout import Formats
from gxr_batch.forms import Form
from gxr_batch.records import DISCLAIMER, ERROR_CATEGORIES
from gxr_batch.text_checks.descriptions import LEGEND

_APPROVED_BANNER = (
    "AI-generated teaching material. Each case was approved by the person in gxr_reviewer; {corrected}, if "
    "filled, replaces {text}. Research and education only; not for diagnosis, treatment or any clinical use."
)
_STATUS_MEANINGS = {
    "unreviewed": "not yet reviewed",
    "approved": "good as generated",
    "approved_with_edits": "good with the text in Corrected text",
    "rejected": "not to be used",
}
_HOW = {
    "in short": "Each row of the sheet Cases is one case. Fill in the yellow columns and do not edit the blue ones: a "
    "row whose generated text was changed is refused on import.",
    "Quality": "1 (unusable) to 5 (ready to teach with)",
    "error counts": "number of errors of each kind, significant and insignificant: "
    f"{', '.join(ERROR_CATEGORIES.values())}",
    "Corrected text": "the full corrected text, for approved_with_edits",
    "Comment": "anything else",
    "Reviewer": "your name; Reviewed on: the date (if empty, the day of the import)",
    "your own changes": "You may sort, filter or delete rows, and move or add columns: rows are matched by gxr_row_id "
    "and gxr_sample. Keep the row of small column names below the captions: the import finds the columns by them.",
}
# For texts with a form, which are corrected by section.
_OF_A_FORM = {
    "approved_with_edits": "good with the corrections in the columns Corrected",
    "Corrected text": "a column for each section, for approved_with_edits: the corrected section, a list as lines "
    'that begin with "- "; empty if the section is good as generated',
}
_FLAGS = (
    "Flags in gxr_flags mark what to check first. A flag is not a score, and a case without flags may have errors. "
    "gxr_findings_lost lists findings of the row that the text does not name, or denies; gxr_findings_kept the others."
)
_WIDTHS = (30, 110)
_LINE_POINTS = 15


def approved_banner(form: Form | None) -> str:
    """Return what a workbook of approved cases says of itself."""
    corrected, text = ("a column Corrected", "its section") if form else ("gxr_review_text", "gxr_text")
    return _APPROVED_BANNER.format(corrected=corrected, text=text)


def state(source: Source) -> str:
    """Return the review state of these cases in words."""
    if source.approved:
        return "approved by a reviewer"
    return "partly reviewed" if len(source.reader.reviews) and not source.part else "not reviewed"


def write_readme(workbook: Any, formats: Formats, source: Source) -> None:
    """Write the README sheet."""
    sheet = workbook.add_worksheet("README")
    for place, width in enumerate(_WIDTHS):
        sheet.set_column(place, place, width)
    sheet.hide_gridlines(2)
    sheet.set_landscape()
    sheet.set_paper(9)
    sheet.fit_to_pages(1, 0)
    title = f"AI-generated teaching cases, {state(source)}"
    banner = approved_banner(source.reader.form) if source.approved else DISCLAIMER
    own = _OF_A_FORM if source.reader.form else {}
    lines: list[_Line] = [_Line(title, "", formats.title), _Line("", banner, formats.banner), _BLANK]
    lines += [_Line(name, value) for name, value in _facts(source).items() if value]
    lines += [_BLANK, _Line("How to review", "", formats.heading)]
    lines += [_Line(name, own.get(name, text)) for name, text in _HOW.items()]
    lines += [_BLANK, _Line("Status", "", formats.heading)]
    meanings = {status: own.get(status, text) for status, text in _STATUS_MEANINGS.items()}
    lines += [_Line(status, text, label=formats.statuses[status]) for status, text in meanings.items()]
    if not source.blind:
        lines += [_BLANK, _Line("Flags", "", formats.heading), _Line("", _FLAGS)]
        lines += [_Line(flag, text) for flag, text in LEGEND.items()]
    for row, line in enumerate(lines):
        _write(sheet, row, line, formats)


class _Line(NamedTuple):
    """A label and a text. `form` formats both; `label`, if set, formats the label."""

    name: str
    text: str
    form: Any = None
    label: Any = None


_BLANK = _Line("", "")


def _write(sheet: Any, row: int, line: _Line, formats: Formats) -> None:
    # Set the row height, because not every program computes it when it opens the file.
    wrapped = max(1, -(-len(line.text) // _WIDTHS[1]))
    sheet.set_row(row, 26 if line.form in (formats.title, formats.heading) else _LINE_POINTS * wrapped + 3)
    if line.name:
        sheet.write_string(row, 0, for_workbook(line.name).text, line.label or line.form or formats.label)
    if line.text:
        sheet.write_string(row, 1, for_workbook(line.text).text, line.form or formats.plain)


def _facts(source: Source) -> dict[str, str]:
    """Return where the cases came from, as label and value."""
    manifest, counts = source.reader.manifest, source.counts
    model, prompt = manifest.model.get("provenance", {}), manifest.job.get("prompt", {})
    last = manifest.invocations[-1] if manifest.invocations else {}
    facts = {
        "job": manifest.name,
        "rows": f"{counts.total:,}: {counts.ok:,} generated, {counts.failed:,} failed, {counts.held:,} held"
        + (f", {counts.left:,} left and not in this file" if source.partial else ""),
        "in this file": source.part or ("approved cases only" if source.approved else "every finished row"),
        "model": " ".join(str(part) for part in (model.get("gxr_model"), model.get("gxr_model_revision")) if part),
        "adapter": model.get("gxr_adapter") or "none",
        "template": prompt.get("template_column") or prompt.get("template", ""),
        "started": _moment(manifest.created_at),
        "last change": _moment(last.get("finished_at", "")),
        "run folder": source.reader.folder.name,
    }
    hidden = ("job", "model", "adapter", "template", "run folder") if source.blind else ()
    return {name: str(value) for name, value in facts.items() if name not in hidden}


def _moment(written: str) -> str:
    """Return a timestamp of the manifest in readable form, with its UTC offset."""
    try:
        return datetime.fromisoformat(written).strftime("%Y-%m-%d %H:%M (UTC%z)")
    except ValueError:
        return written
