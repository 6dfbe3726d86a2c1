"""`gxr-batch check`: check a job without loading the model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gxr_batch.cli.options import job_options, read_job, say_to_stderr

if TYPE_CHECKING:
    from gxr_batch.run.check import CheckResult

_NAMED = 5
_COLUMNS_NAMED = 10


@click.command(name="check")
@job_options
def command(
    job_file: Path,
    overrides: tuple[str, ...],
    limit: int | None,
    output: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Check a job without loading the model: job file, templates, table, prompt lengths, memory, disk space.

    Shows three prompts as the model gets them. Writes nothing.

    \b
    Example:
      gxr-batch check jobs/demo.toml
    """
    from gxr_batch.run.check import check

    job = read_job(job_file, overrides, output=output)
    found = check(job, limit=limit, say=say_to_stderr(quiet))
    if as_json:
        click.echo(json.dumps(_summary(found), indent=2))
    else:
        print_findings(job.name, found)


def _summary(found: CheckResult) -> dict[str, Any]:
    from gxr_batch.run.check import quantiles

    shortest, median, longest = quantiles(found.lengths)
    counted = bool(found.lengths) or not found.usable
    return {
        "rows": found.rows,
        "usable": found.usable,
        "unusable": len(found.unusable),
        "cut": found.cut,
        "identifiers": {
            "screening": found.screening,
            "rows": len(found.identified),
            "rules": dict(found.identifiers),
            "row_ids": found.identified[:_NAMED],
        },
        "reasons": dict(found.reasons),
        "templates": dict(found.templates),
        "prompt_tokens": {"shortest": shortest, "median": median, "longest": longest} if counted else None,
        "output": str(found.folder),
        "goes_on": found.resumes,
        "bytes_needed": found.bytes_needed,
        "bytes_free": found.bytes_free,
        "fits": [asdict(fit) for fit in found.fits],
    }


def print_findings(name: str, found: CheckResult) -> None:
    """Print what `check` found, with its three prompts."""
    click.echo(_text(name, found))


def _text(name: str, found: CheckResult) -> str:
    from gxr_batch.cells import for_terminal, quoted
    from gxr_batch.cli.layout import labelled, mib
    from gxr_batch.rows.columns import counted
    from gxr_batch.run.check import quantiles

    shortest, median, longest = quantiles(found.lengths)
    known = bool(found.lengths) or not found.usable
    lengths = f"{shortest:,} to {longest:,} tokens, median {median:,}" if known else "counted only by the server"
    templates = ", ".join(f"{quoted(template)} {count:,}" for template, count in found.templates.items()) or "none used"
    state = "contains an earlier run, which `gxr-batch run` resumes" if found.resumes else "new"
    entries = [
        ("templates", templates),
        ("prompts", lengths),
        ("output", f"{quoted(found.folder)} ({state})"),
    ]
    if found.fits:
        entries += [("memory", found.device), ("", _fits(found))]
    entries.append(("disk", f"up to {mib(found.bytes_needed)} needed, {mib(found.bytes_free)} free"))
    entries.append(("privacy", _privacy(found)))
    if found.unscreened:
        names = ", ".join(map(quoted, found.unscreened[:_COLUMNS_NAMED])) + (
            ", ..." if found.unscreened[_COLUMNS_NAMED:] else ""
        )
        entries.append(("", f"not screened, since no prompt uses them: {names}"))
    if found.bytes_needed > found.bytes_free:
        entries.append(("WARNING", "the disk may fill up before the run ends"))
    if found.cut:
        entries.append(("cut", f"{counted(found.cut, 'prompt')} too long: the end of the longest cell is cut"))
    entries += [("unusable", f"{counted(count, 'row')}: {reason}") for reason, count in found.reasons.most_common(5)]
    if found.unusable:
        ids = ", ".join(map(quoted, found.unusable[:_NAMED]))
        entries.append(("", f"e.g. {ids}; a run marks these rows as failed and continues"))
    lines = [
        f"{name}: {counted(found.rows, 'row')}, {found.usable:,} usable, {len(found.unusable):,} not",
        *labelled(entries),
    ]
    for row_id, messages in found.shown:
        lines.append(f"\n--- prompt of row {quoted(row_id)} ({quoted(messages.template)})")
        lines += [f"[{turn.role}]\n{turn.text}" for turn in messages.turns]
    return for_terminal("\n".join(lines))


def _privacy(found: CheckResult) -> str:
    """Return what identifier screening found, by rule and row id, without the texts."""
    from gxr_batch.cells import quoted
    from gxr_batch.rows.columns import counted

    if found.screening == "off":
        return "identifier screening is off"
    if not found.identified:
        return f"identifier screening ({found.screening}) found nothing"
    rules = ", ".join(f"{rule} {count:,}" for rule, count in found.identifiers.most_common())
    ids, rows = ", ".join(map(quoted, found.identified[:_NAMED])), counted(len(found.identified), "row")
    what = "a run holds these rows" if found.screening == "hold" else "a run flags these rows"
    return f"identifier screening ({found.screening}) found something in {rows}: {rules}; e.g. {ids}; {what}"


def _fits(found: CheckResult) -> str:
    lengths = [
        f"{fit.max_seq_length}: {f'up to {fit.slots} slots' if fit.slots else 'does not fit'}" for fit in found.fits
    ]
    return f"max_seq_length {', '.join(lengths)}"
