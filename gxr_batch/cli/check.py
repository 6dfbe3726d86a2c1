"""`gxr-batch check`: try everything of a job but the model's weights."""

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
    """Try everything of a job but the model's weights: job file, templates, table, prompt lengths, room on the disk.

    Shows three prompts as the model would get them. Writes nothing.

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
    from gxr_batch.run.check import quantiles

    shortest, median, longest = quantiles(found.lengths)
    counted = bool(found.lengths) or not found.usable
    lengths = f"{shortest:,} to {longest:,} tokens, median {median:,}" if counted else "counted by the server alone"
    templates = ", ".join(f"{template} {count:,}" for template, count in found.templates.items()) or "none used"
    lines = [
        f"{name}: {found.rows:,} rows, {found.usable:,} usable, {len(found.unusable):,} not",
        f"  templates  {templates}",
        f"  prompts    {lengths}",
        f"  output     {found.folder} ({'an earlier run is there: run goes on with it' if found.resumes else 'new'})",
        f"  room       up to {_mib(found.bytes_needed)} needed, {_mib(found.bytes_free)} free",
        f"  privacy    {_privacy(found)}",
    ]
    if found.fits:
        lines.insert(5, f"  memory     {found.device}: {_fits(found)}")
    if found.bytes_needed > found.bytes_free:
        lines.append("  WARNING    the disk may fill up before the run ends")
    if found.cut:
        lines.append(f"  cut        {found.cut:,} prompts lose the end of their longest cell")
    for reason, count in found.reasons.most_common(5):
        lines.append(f"  unusable   {count:,} rows: {reason}")
    if found.unusable:
        lines.append(f"             e.g. {', '.join(found.unusable[:_NAMED])}; a run books them as failed and goes on")
    for row_id, messages in found.shown:
        lines.append(f"\n--- prompt of row {row_id} ({messages.template})")
        lines += [f"[{turn.role}]\n{turn.text}" for turn in messages.turns]
    return "\n".join(lines)


def _privacy(found: CheckResult) -> str:
    """Say what identifier screening hits, by rule and row id; the texts are in the table."""
    if found.screening == "off":
        return "identifier screening is off"
    if not found.identified:
        return f"identifier screening ({found.screening}) hits no row"
    rules = ", ".join(f"{rule} {count:,}" for rule, count in found.identifiers.most_common())
    ids, rows = ", ".join(found.identified[:_NAMED]), len(found.identified)
    what = "a run holds these rows" if found.screening == "hold" else "a run flags these rows"
    return f"identifier screening ({found.screening}) hits {rows:,} rows: {rules}; e.g. {ids}; {what}"


def _fits(found: CheckResult) -> str:
    said = [
        f"{fit.max_seq_length} {f'fits with up to {fit.slots} slots' if fit.slots else 'does not fit'}"
        for fit in found.fits
    ]
    return f"max_seq_length {', '.join(said)}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
