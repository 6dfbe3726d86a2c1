"""Formats numbers, times and tables of facts for the report.

Times are in the time zone of the last invocation. web/elements.js formats the times of single rows, charts.py the
numbers of charts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from math import isfinite
from typing import Any

from gxr_batch.audit.comparison import difference_texts, method_text, p_text
from gxr_batch.audit.paired_tests import PairedCounts
from gxr_batch.ledger import RunReader
from gxr_batch.report.aggregate import Surveyed
from gxr_batch.report.compare import Comparison, Line
from gxr_batch.report.invocations import Invocation, mapping, zone_of

Pairs = list[tuple[str, str]]


def figure(value: float | None, unit: str = "") -> str:
    """Return a number with about three digits, or "" for None and for what is no number or infinite."""
    if value is None or not isfinite(value):
        return ""
    text = f"{value:,.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:,.3g}"
    return f"{text} {unit}".rstrip()


def moment(text: str, zone: timezone) -> str:
    """Return a recorded time in the run's time zone, to the second; other text is returned unchanged."""
    with suppress(ValueError, OverflowError):
        return datetime.fromisoformat(text).astimezone(zone).strftime("%Y-%m-%d %H:%M:%S")
    return text


def job_facts(reader: RunReader) -> Pairs:
    """Return the facts about the job."""
    job = reader.manifest.job
    prompt, sampling = mapping(job.get("prompt")), mapping(job.get("sampling"))
    limits = {key: value for key, value in sampling.items() if value is not None and key != "preset"}
    column = prompt.get("template_column")
    return [
        ("job", reader.manifest.name),
        ("run folder", str(reader.folder.absolute().name)),
        ("started", moment(str(reader.manifest.created_at), zone_of(reader.manifest))),
        ("input", str(mapping(job.get("input")).get("path", ""))),
        ("template", str(prompt.get("template", "")) + (f", or from column {column}" if column else "")),
        (
            "sampling",
            ", ".join([f"preset {sampling.get('preset')}", *(f"{key} {value}" for key, value in limits.items())]),
        ),
    ]


def model_facts(reader: RunReader, newest: Invocation | None) -> Pairs:
    """Return the facts about the model and engine."""
    facts, resolved = reader.manifest.model.get("provenance", {}), reader.manifest.resolved
    kind = resolved.get("engine.kind") or reader.manifest.fingerprint.get("engine.kind", "")
    worker = resolved.get("ray.worker", "") if kind == "ray" else ""
    pairs = [
        ("model", str(facts.get("gxr_model") or "")),
        ("revision", str(facts.get("gxr_model_revision") or "")),
        ("adapter", str(facts.get("gxr_adapter") or "none")),
        ("engine", f"{kind}, {worker} in each worker" if worker else str(kind)),
    ]
    if newest is not None:
        pairs += [
            ("device", newest.device),
            ("number format", newest.dtype),
            ("loaded in", figure(newest.load_seconds, "s")),
            ("versions", ", ".join(f"{name} {version}" for name, version in newest.packages.items())),
        ]
    return pairs


def invocations_table(found: Sequence[Invocation], zone: timezone) -> dict[str, Any]:
    """Return the invocations of a run as a table, without empty columns."""
    columns = {
        "no.": [str(one.number) for one in found],
        "start": [moment(one.began, zone) for one in found],
        "end": [moment(one.ended, zone) for one in found],
        "outcome": [one.outcome for one in found],
        "resumed": ["yes" if one.resumed else "no" for one in found],
        "rows": [figure(one.rows) for one in found],
        "rejected": [figure(one.rejected or None) for one in found],
        "rows/min": [figure(one.rows_a_minute) for one in found],
        "tok/s": [figure(one.tokens_a_second) for one in found],
        "slots": [figure(one.slots) for one in found],
        "device": [one.device for one in found],
        "peak memory": [_bytes(one.memory_bytes) for one in found],
        "batch splits": [figure(one.splits or None) for one in found],
        "workers lost": [figure(one.workers_lost or None) for one in found],
    }
    kept = {name: cells for name, cells in columns.items() if any(cells) or name == "no."}
    return {"header": list(kept), "rows": list(zip(*kept.values(), strict=True))}


def change(before: Invocation, now: Invocation) -> list[tuple[str, str, str, str]]:
    """Return the figures of two invocations and the change in percent."""
    pairs = (
        ("rows generated", before.rows, now.rows, ""),
        ("rows per minute", before.rows_a_minute, now.rows_a_minute, ""),
        ("tokens per second", before.tokens_a_second, now.tokens_a_second, ""),
        ("tokens per row", before.tokens_a_row, now.tokens_a_row, ""),
        ("seconds to load the model", before.load_seconds, now.load_seconds, "s"),
        ("slots", before.slots, now.slots, ""),
        ("peak memory", _gib(before.memory_bytes), _gib(now.memory_bytes), "GiB"),
        ("batch splits", before.splits, now.splits, ""),
        ("prompts cut", before.cut, now.cut, ""),
        ("failed, in total", before.counts.get("failed"), now.counts.get("failed"), ""),
        ("held, in total", before.counts.get("held"), now.counts.get("held"), ""),
    )
    return [
        (name, figure(then, unit), figure(today, unit), _percent(then, today))
        for name, then, today, unit in pairs
        if then is not None or today is not None
    ]


def compared_with(this: Surveyed, comparison: Comparison) -> dict[str, Any]:
    """Return the report's section that compares two runs."""
    other, name = comparison.other.reader, comparison.name
    compared = comparison.compared
    changed = f", {compared.changed:,} have other cells" if compared.changed else ""
    sentence = (
        f"{compared.matched:,} rows are in both runs: {compared.same:,} have the same text, "
        f"{compared.different:,} have different texts, {compared.without_text:,} have no text in one run{changed}. "
        f"{compared.other_prompt:,} have different prompts. "
        f"{compared.only_this:,} rows are only in this run, {compared.only_other:,} only in {name}."
    )
    return {
        "name": name,
        "sentence": sentence,
        "this": _identity(this.reader),
        "other": _identity(other),
        "lines": _lines(comparison.lines),
        "texts": f"{compared.texts:,}",
        "means": [
            (f"{name} per text", figure(mean.this), figure(mean.other), *difference_texts(mean))
            for name, mean in compared.means.items()
            if mean is not None
        ],
        "counts": [(name, *_counts(counts)) for name, counts in compared.flags.items()],
        "judged": _counts(compared.judged) if compared.read else (),
        "read": f"{compared.read:,}",
        "method": method_text(compared),
    }


def _counts(counts: PairedCounts) -> tuple[str, ...]:
    return (*(f"{count:,}" for count in counts[:4]), p_text(counts.p))


def _identity(reader: RunReader) -> Pairs:
    kept = {"job", "started", "template", "sampling", "model", "revision", "adapter", "engine"}
    return [pair for pair in (*job_facts(reader), *model_facts(reader, None)) if pair[0] in kept]


def _lines(lines: Sequence[Line]) -> list[tuple[str, str, str]]:
    return [(line.name, figure(line.this, line.unit), figure(line.other, line.unit)) for line in lines]


def _percent(then: Any, now: Any) -> str:
    numbers = isinstance(then, int | float) and isinstance(now, int | float)
    return f"{(now - then) / then:+.1%}" if numbers and then and now != then else ""


def _gib(size: float | None) -> float | None:
    return None if size is None else size / 2**30


def _bytes(size: float | None) -> str:
    return "" if size is None else f"{size / 2**30:,.2f} GiB"
