"""Renders the report: one HTML file with its style, script, charts and cases."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from importlib.resources import files
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

from gxr_batch.audit.audit_files import audits_of
from gxr_batch.audit.error_bounds import LEVEL
from gxr_batch.audit.summary import summarise
from gxr_batch.ledger import Counts, RunReader
from gxr_batch.records import DISCLAIMER
from gxr_batch.report.aggregate import Period, Surveyed, Tally, histogram, newest_period
from gxr_batch.report.cases import CaseTable
from gxr_batch.report.charts import Chart, bar_chart, histogram_chart, period_charts
from gxr_batch.report.compare import Comparison
from gxr_batch.report.format import change, compared_with, figure, invocations_table, job_facts, model_facts
from gxr_batch.report.invocations import Invocation, invocations_of, newest_that_generated, previous, zone_of
from gxr_batch.text_checks.descriptions import described

_SCRIPTS = ("theme.js", "elements.js", "table.js", "sections.js", "case.js", "start.js")
# The part of the disclaimer that is replaced once texts are reviewed.
_UNREVIEWED = "not reviewed by a radiologist"
_REVIEWED = ("approved", "approved_with_edits", "rejected")
_REASONS_SHOWN = 12


class Content(NamedTuple):
    """The content of the report, besides run.json."""

    surveyed: Surveyed
    counts: Counts
    cases: CaseTable
    notices: Sequence[str]
    comparison: Comparison | None


def page(content: Content) -> str:
    """Return the report as HTML."""
    style, script = _web("page.css"), "\n".join(_web(name) for name in _SCRIPTS)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(_web("page.html.j2"))
    return template.render(
        style=Markup(style),  # the package's own files
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        version=version("gxr-batch"),
        made_at=datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        packed=content.cases.packed,
        findings=content.cases.findings,
        shown=content.cases.sentence,
        notices=content.notices,
        **_run(content),
        **_figures(content),
    )


def _web(name: str) -> str:
    return files("gxr_batch.report").joinpath("web", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the hash of an inline script or style for the Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _run(content: Content) -> dict[str, Any]:
    """Return the facts about the run."""
    reader, tally = content.surveyed.reader, content.surveyed.tally
    found = invocations_of(reader.manifest)
    newest = newest_that_generated(found)
    before = previous(reader, found)
    reviewed = sum(tally.reviews[status] for status in _REVIEWED)
    day = str(reader.manifest.created_at)[:10]
    facts = reader.manifest.model.get("provenance", {})
    return {
        "name": reader.manifest.name,
        "folder": reader.folder.absolute().name,
        "day": day,
        "subtitle": " · ".join(str(part) for part in (day, facts.get("gxr_model"), facts.get("gxr_adapter")) if part),
        "reviewed": "unreviewed" if not reviewed else "reviewed" if reviewed == tally.rows else "partly reviewed",
        "disclaimer": disclaimer_for(reviewed, tally.rows),
        "tiles": [*_tiles(content.counts, tally, newest, reviewed), *_audited(reader)],
        "job": job_facts(reader),
        "model": model_facts(reader, newest or (found[-1] if found else None)),
        "invocations": invocations_table(found, zone_of(reader.manifest)),
        "previous": before
        and {
            "where": before.where,
            "rows": change(before.invocation, newest) if newest else (),
            "changed": before.changed,
        },
        "compared": content.comparison and compared_with(content.surveyed, content.comparison),
    }


def disclaimer_for(reviewed: int, rows: int) -> str:
    """Return the disclaimer with the number of reviewed texts."""
    if not reviewed:
        return DISCLAIMER
    state = (
        "reviewed by the reviewer named in each case"
        if reviewed == rows
        else f"{rows - reviewed:,} of {rows:,} texts {_UNREVIEWED}"
    )
    return DISCLAIMER.replace(_UNREVIEWED, state)


def _tiles(counts: Counts, tally: Tally, newest: Invocation | None, reviewed: int) -> list[dict[str, str]]:
    speed = newest.rows_a_minute if newest else None
    tokens = f"{newest.tokens_a_second:,.0f} tok/s" if newest and newest.tokens_a_second else ""
    return [
        _tile("ok", f"{counts.ok:,}", "generated", f"of {counts.total:,} rows"),
        _tile("failed", f"{counts.failed:,}", "failed", _share(counts.failed, counts.total)),
        _tile("held", f"{counts.held:,}", "held", _share(counts.held, counts.total)),
        _tile("left", f"{counts.left:,}", "still to do", _share(counts.left, counts.total)),
        _tile("flags", f"{tally.flagged:,}", "with a flag", _share(tally.flagged, tally.rows)),
        _tile("reviewed", f"{reviewed:,}", "reviewed", _share(reviewed, tally.rows)),
        _tile("speed", figure(speed) if speed else "-", "rows per minute", tokens),
    ]


def _audited(reader: RunReader) -> list[dict[str, str]]:
    """Return how many rows are erroneous at most, if rows were drawn for an audit and read."""
    found = summarise(reader) if audits_of(reader.folder) else None
    if found is None or not found.whole.read:
        return []
    detail = f"{found.whole.read:,} rows drawn at random and read; {LEVEL:.0%} sure, at every look"
    return [_tile("audited", f"≤ {found.whole.bound:.1%}", "of the rows are erroneous", detail)]


def _tile(kind: str, number: str, what: str, detail: str) -> dict[str, str]:
    return {"kind": kind, "number": number, "what": what, "detail": detail}


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if part and whole else ""


def _figures(content: Content) -> dict[str, Any]:
    """Return the charts and the tables around them."""
    tally, reader = content.surveyed.tally, content.surveyed.reader
    period = newest_period(tally)
    newest = newest_that_generated(invocations_of(reader.manifest))
    slots = newest.slots if newest else None
    charts = period_charts(period, content.counts.left, slots, zone_of(reader.manifest)) if period else []
    flags = described(reader.form)
    common = tally.reasons.most_common(_REASONS_SHOWN)
    return {
        "total": f"{tally.rows:,}",
        "charts": charts + _row_charts(tally),
        "slot_use": _slot_use(tally, slots, period),
        "reasons": [(reason, f"{count:,}", tally.reason_rows[reason]) for reason, count in common],
        "legend": [(flag, flags[flag]) for flag in sorted(tally.flags) if flag in flags],
    }


def _row_charts(tally: Tally) -> list[Chart]:
    generated = tally.seconds > 0
    charts = []
    for title, unit, values in (
        ("Seconds per row", "seconds, with other rows in the batch", tally.seconds[generated]),
        ("Tokens per row", "new tokens", tally.new_tokens[generated]),
    ):
        if (found := histogram(values)) is not None:
            charts.append(histogram_chart(title, unit, found))
    if tally.finish_reasons:
        endings = {_ENDINGS.get(name, name): count for name, count in tally.finish_reasons.items()}
        charts.append(bar_chart("How texts ended", "rows", endings, tally.rows))
    if tally.flags:
        charts.append(bar_chart("Flags by kind", "rows; a row can have several", tally.flags, tally.rows))
    return charts


_ENDINGS = {
    "stop": "at an end token",
    "closed": "with a section at its token limit",
    "length": "at the token limit",
    "error": "with an error",
}


def _slot_use(tally: Tally, slots: float | None, period: Period | None) -> str:
    """Return a sentence about how many rows were decoded at the same time, weighted by their seconds."""
    measured = (tally.rows_in_batch > 0) & np.isfinite(tally.seconds)
    weight, batch = tally.seconds[measured], tally.rows_in_batch[measured]
    if period is None or not len(batch) or not weight.sum():
        return ""
    mean = float((batch * weight).sum() / weight.sum())
    of = f"of {slots:.0f} slots were in use" if slots else "rows were in the batch, itself included,"
    return f"While a row was generated, {figure(mean)} {of} on average."
