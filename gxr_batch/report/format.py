"""How the page writes what it knows: numbers, dates and times, and the tables of facts about a run.

Times are shown in the time zone in which the run was last invoked. Moments of single rows are written by the page's own
script (web/elements.js), numbers of charts in charts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any

from gxr_batch.ledger import RunReader
from gxr_batch.report.aggregate import Surveyed
from gxr_batch.report.compare import Comparison, Line
from gxr_batch.report.invocations import Start, mapping, zone_of

Pairs = list[tuple[str, str]]


def figure(value: float | None, unit: str = "") -> str:
    """Return a number with about three digits, empty where there is none."""
    if value is None:
        return ""
    text = f"{value:,.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:,.3g}"
    return f"{text} {unit}".rstrip()


def moment(text: str, zone: timezone) -> str:
    """Return a recorded moment in the run's time zone, to the second; as it stands where it is none."""
    with suppress(ValueError):
        return datetime.fromisoformat(text).astimezone(zone).strftime("%Y-%m-%d %H:%M:%S")
    return text


def job_facts(reader: RunReader) -> Pairs:
    """Return what was asked for."""
    job = reader.manifest.job
    prompt, sampling = mapping(job.get("prompt")), mapping(job.get("sampling"))
    limits = {key: value for key, value in sampling.items() if value is not None and key != "preset"}
    column = prompt.get("template_column")
    return [
        ("job", reader.manifest.name),
        ("run folder", str(reader.folder.absolute().name)),
        ("begun", moment(str(reader.manifest.created_at), zone_of(reader.manifest))),
        ("input", str(mapping(job.get("input")).get("path", ""))),
        ("template", str(prompt.get("template", "")) + (f", or as column {column} says" if column else "")),
        (
            "sampling",
            ", ".join([f"preset {sampling.get('preset')}", *(f"{key} {value}" for key, value in limits.items())]),
        ),
    ]


def model_facts(reader: RunReader, newest: Start | None) -> Pairs:
    """Return what generated."""
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


def starts_table(found: Sequence[Start], zone: timezone) -> dict[str, Any]:
    """Return the starts of a run as a table, without the columns that are empty in all of them."""
    columns = {
        "no.": [str(start.number) for start in found],
        "start": [moment(start.began, zone) for start in found],
        "end": [moment(start.ended, zone) for start in found],
        "outcome": [start.outcome for start in found],
        "resumed": ["yes" if start.resumed else "no" for start in found],
        "rows": [figure(start.rows) for start in found],
        "rejected": [figure(start.rejected or None) for start in found],
        "rows/min": [figure(start.rows_a_minute) for start in found],
        "tok/s": [figure(start.tokens_a_second) for start in found],
        "slots": [figure(start.slots) for start in found],
        "device": [start.device for start in found],
        "peak memory": [_bytes(start.memory_bytes) for start in found],
        "batch splits": [figure(start.splits or None) for start in found],
        "workers lost": [figure(start.workers_lost or None) for start in found],
    }
    kept = {name: cells for name, cells in columns.items() if any(cells) or name == "no."}
    return {"header": list(kept), "rows": list(zip(*kept.values(), strict=True))}


def change(before: Start, now: Start) -> list[tuple[str, str, str, str]]:
    """Return the figures of two starts side by side, with the change in percent."""
    pairs = (
        ("rows generated", before.rows, now.rows, ""),
        ("rows a minute", before.rows_a_minute, now.rows_a_minute, ""),
        ("tokens a second", before.tokens_a_second, now.tokens_a_second, ""),
        ("tokens a row", before.tokens_a_row, now.tokens_a_row, ""),
        ("seconds to load the model", before.load_seconds, now.load_seconds, "s"),
        ("slots", before.slots, now.slots, ""),
        ("peak memory", _gib(before.memory_bytes), _gib(now.memory_bytes), "GiB"),
        ("batch splits", before.splits, now.splits, ""),
        ("prompts cut", before.cut, now.cut, ""),
        ("failed, in the whole run", before.counts.get("failed"), now.counts.get("failed"), ""),
        ("held, in the whole run", before.counts.get("held"), now.counts.get("held"), ""),
    )
    return [
        (name, figure(then, unit), figure(today, unit), _percent(then, today))
        for name, then, today, unit in pairs
        if then is not None or today is not None
    ]


def compared_with(this: Surveyed, comparison: Comparison) -> dict[str, Any]:
    """Return what the page says of two runs side by side."""
    other, name = comparison.other.reader, comparison.name
    sentence = (
        f"{comparison.matched:,} rows are in both runs: {comparison.same:,} have the same text, "
        f"{comparison.different:,} another one, {comparison.without_text:,} have no text in one of them. "
        f"{comparison.other_prompt:,} were asked with another prompt. "
        f"{comparison.only_this:,} rows are only in this run, {comparison.only_other:,} only in {name}."
    )
    return {
        "name": name,
        "sentence": sentence,
        "this": _identity(this.reader),
        "other": _identity(other),
        "lines": _lines(comparison.lines),
        "flags": _lines(comparison.flags),
    }


def _identity(reader: RunReader) -> Pairs:
    kept = {"job", "begun", "template", "sampling", "model", "revision", "adapter", "engine"}
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
