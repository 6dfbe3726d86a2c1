"""`gxr-batch finetune`: train a LoRA adapter on reviewed rows or examples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gxr_batch.cli.exit_codes import Exit

if TYPE_CHECKING:
    from gxr_batch.finetune import Outcome, TrainingProgress
    from gxr_batch.job import Job

_EXITS = {"interrupt": Exit.INTERRUPTED, "terminate": Exit.STOPPED}


@click.command(name="finetune")
@click.argument("job_file", metavar="JOB.toml", type=click.Path(path_type=Path))
@click.option("--set", "overrides", metavar="SECTION.KEY=VALUE", multiple=True, help="Override a key of the job file.")
@click.option("--output", metavar="DIR", help="Adapter folder to write. Default: finetune.output of the job file.")
@click.option("--fresh", is_flag=True, help="Start from scratch; keep the earlier training as NAME.before-<timestamp>.")
@click.option("--take-over", is_flag=True, help="Resume a training that died on another host; make sure it is dead.")
@click.option("--quiet", is_flag=True, help="Show no progress and no notices.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    job_file: Path,
    overrides: tuple[str, ...],
    output: str | None,
    fresh: bool,
    take_over: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train a LoRA adapter on finetune.data: files of examples, or runs with approved rows.

    Prompts are rendered as in `run`, and only the answers are trained on. The adapter folder appears once the training
    is finished, with a model card and an evaluation; set model.adapter to use it. If the training is stopped or killed,
    the same command resumes from the last checkpoint.

    \b
    Exit codes:
      0    finished
      2    wrong input
      4    the machine cannot do it now
      75   stopped by a signal
      130  Ctrl-C
    After 4, 75 and 130 the same command resumes.

    \b
    Example:
      gxr-batch finetune my.toml --set 'finetune.data=["data/examples.jsonl"]'
    """
    from gxr_batch.cli.progress import ProgressDisplay
    from gxr_batch.cli.signals import Signals
    from gxr_batch.finetune import Options, finetune
    from gxr_batch.job import load_job
    from gxr_batch.run.stop import Stopper

    given = {"finetune.output": output} if output is not None else {}
    job = load_job(job_file, overrides, given, table=False)
    stopper = Stopper(job.run.grace_seconds)
    signals = Signals(stopper)
    with signals.handled(), ProgressDisplay(quiet) as display:

        def show(progress: TrainingProgress) -> None:
            signals.generating = True  # from now on there is progress to save
            display.draw(progress.step, progress.steps, lambda: _describe(progress))

        for note in export_approved(job):
            display.say(note)
        options = Options(fresh=fresh, take_over=take_over)
        outcome = finetune(job, options, stopper, display.say, show)
    click.echo(json.dumps(_summary(outcome), indent=2) if as_json else _text(job.name, outcome))
    click.get_current_context().exit(_EXITS[outcome.reason] if outcome.reason else Exit.DONE)


def export_approved(job: Job) -> Iterator[str]:
    """Export the approved rows of the run folders in finetune.data, if their exports are older than the last review.

    Yields what to tell the user about each export. A file that the user named is never written.
    """
    from gxr_batch.cells import quoted
    from gxr_batch.export import Choice, default_path, export
    from gxr_batch.finetune.examples import matches
    from gxr_batch.ledger import RunReader, is_run
    from gxr_batch.ledger.exports import is_current

    for folder in filter(is_run, chain.from_iterable(map(matches, job.finetune.data))):
        reader = RunReader(folder)
        if not is_current(folder, default_path(reader, "chat-jsonl", Choice())):
            done = export(reader, "chat-jsonl", None, Choice(partial=True))
            yield from (f"{quoted(done.path)}: {note}" for note in done.notes)


def _describe(progress: TrainingProgress) -> str:
    """Return steps done, losses and the time left as text."""
    from gxr_batch.cli.layout import duration

    text = f"step {progress.step:,}/{progress.steps:,}"
    if progress.loss is not None:
        text += f", loss {progress.loss:.3f}"
    if progress.held_out_loss is not None:
        text += f", held-out {progress.held_out_loss:.3f}"
    if progress.seconds_a_step is not None:
        left = duration((progress.steps - progress.step) * progress.seconds_a_step)
        text += f", {progress.seconds_a_step:.1f} s/step, {left} left"
    return text


def _summary(outcome: Outcome) -> dict[str, Any]:
    return {
        "adapter": str(outcome.adapter) if outcome.reason is None else None,
        "finished": outcome.reason is None,
        "reason": outcome.reason,
        "step": outcome.step,
        "steps": outcome.steps,
        "training_rows": len(outcome.rows.training),
        "held_out_rows": len(outcome.rows.held_out),
        "too_long_rows": len(outcome.rows.too_long),
        "loss_before": outcome.loss_before,
        "loss_after": outcome.loss_after,
        "seconds": round(outcome.seconds, 3),
    }


def _text(name: str, outcome: Outcome) -> str:
    from gxr_batch.cells import quoted
    from gxr_batch.cli.layout import duration
    from gxr_batch.records import DISCLAIMER

    if outcome.reason:
        title = "stopped by Ctrl-C" if outcome.reason == "interrupt" else "stopped by a signal"
    else:
        title = "finished" if outcome.trained_now else "nothing left to do"
    rows, adapter = outcome.rows, quoted(Path(outcome.adapter))
    lines = [
        f"{name}: {title}",
        f"  rows     {len(rows.training):,} for training, {len(rows.held_out):,} held out"
        + (f", {len(rows.too_long):,} too long" if rows.too_long else ""),
        f"  steps    {outcome.step:,} of {outcome.steps:,}"
        + (f", {duration(outcome.seconds)} in this invocation" if outcome.trained_now else ""),
    ]
    if outcome.loss_before is not None and outcome.loss_after is not None:
        lines.append(f"  held-out loss {outcome.loss_before:.4f} before, {outcome.loss_after:.4f} after")
    if outcome.reason:
        lines.append("  next     run the same command again to resume (without --fresh)")
    else:
        lines.append(f"  adapter  {adapter}: model card in README.md, sample texts in evaluation.json")
        lines.append(f'  next     use it in a job file: [model] adapter = "{adapter}"')
    return "\n".join([*lines, DISCLAIMER])
