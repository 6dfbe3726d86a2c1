"""`gxr-batch run`: the main job, and the exports that its job asks for once it is finished."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gxr_batch.cli.exit_codes import Exit, bug_report
from gxr_batch.cli.options import job_options, read_job
from gxr_batch.errors import GxrError

if TYPE_CHECKING:
    from gxr_batch.run.runner import RunResult


_EXITS = {
    "interrupt": Exit.INTERRUPTED,
    "terminate": Exit.STOPPED,
    "stop_by": Exit.STOPPED,
    "time_limit": Exit.STOPPED,
    "max_failed": Exit.MAX_FAILED,
    "api_outage": Exit.STOPPED,
}
_WHY = {
    "interrupt": "stopped by Ctrl-C",
    "terminate": "stopped by a signal",
    "stop_by": "stopped because the stop-by time came near",
    "time_limit": "stopped because the time limit came near",
    "max_failed": "stopped because more rows failed than run.max_failed allows",
    "api_outage": "stopped because the server gave no answer for longer than api.give_up_after",
}


@click.command(name="run")
@job_options
@click.option("--fresh", is_flag=True, help="Start anew; the earlier run is kept as NAME.before-<timestamp>.")
@click.option(
    "--retry",
    type=click.Choice(["failed", "held", "truncated"]),
    help="Generate such rows once more, up to run.max_attempts times each; held rows are released by it, on record.",
)
@click.option("--row", "rows", metavar="ID", multiple=True, help="With --retry: only this row id; repeatable.")
@click.option("--stop-by", metavar="HH:MM", help="Stop in time for the next such local time of day.")
@click.option("--time-limit", metavar="DURATION", help='Stop after so long, e.g. "7h" or "30m".')
@click.option("--take-over", is_flag=True, help="Go on where a run on another host died; be sure that it is dead.")
def command(
    job_file: Path,
    overrides: tuple[str, ...],
    limit: int | None,
    output: str | None,
    quiet: bool,
    as_json: bool,
    fresh: bool,
    retry: str | None,
    rows: tuple[str, ...],
    stop_by: str | None,
    time_limit: str | None,
    take_over: bool,
) -> None:
    """Generate a teaching case for every row of the job's table.

    Results go to the run folder as Parquet, checkpointed on the way. Run the same command again and it goes on where it
    stopped; a finished run has nothing left to do.

    \b
    Exit codes: 0 all generated, 2 input wrong, 3 some rows failed or are held, 4 the machine cannot do it now,
    5 too many rows failed, 75 stopped on purpose, 130 Ctrl-C; after 4, 5, 75 and 130 run it again to go on.

    \b
    Example:
      gxr-batch run jobs/demo.toml --limit 4
    """
    from gxr_batch.cli.signals import Signals, catch_early

    catch_early()  # what follows takes a moment
    from gxr_batch.cli.progress import ProgressDisplay
    from gxr_batch.library import write_exports
    from gxr_batch.run.invocation import Options, Progress
    from gxr_batch.run.runner import run
    from gxr_batch.run.stop import Stopper

    if rows and not retry:
        raise click.UsageError("--row goes with --retry.")
    job = read_job(job_file, overrides, output=output, stop_by=stop_by, time_limit=time_limit)
    options = Options(limit=limit, fresh=fresh, retry=retry, retry_rows=rows, take_over=take_over, overrides=overrides)
    stopper = Stopper(job.run.grace_seconds)
    signals = Signals(stopper)
    with signals.handled(), ProgressDisplay(quiet) as display:

        def show(progress: Progress) -> None:
            signals.generating = True
            display.show(progress)

        outcome = run(job, options, stopper, display.say, show)
        signals.generating = False  # from here on a signal ends the program: the results are written
        exports = {}
        if not outcome.counts.left:
            exports = write_exports(outcome.folder, job.export.formats, display.say, _export_failed)
    click.echo(json.dumps(_summary(outcome, exports), indent=2) if as_json else _text(job.name, outcome))
    click.get_current_context().exit(_exit_code(outcome))


def _export_failed(form: str, error: Exception) -> None:
    """Report an export that failed, also under --quiet; a bug keeps its traceback."""
    said = f" {error}" if isinstance(error, GxrError) else f"\n{bug_report(error)}"
    click.echo(f"The export as {form} failed; the results are safe.{said}", err=True)


def _exit_code(outcome: RunResult) -> Exit:
    if outcome.reason:
        return _EXITS[outcome.reason]
    if outcome.counts.left:
        return Exit.STOPPED  # only the rows that --retry --row named were generated
    return Exit.SOME_FAILED if outcome.counts.failed or outcome.counts.held else Exit.DONE


def _summary(outcome: RunResult, exports: Mapping[str, str]) -> dict[str, Any]:
    progress = outcome.progress
    return {
        "run": str(outcome.folder),
        "finished": outcome.counts.left == 0 and outcome.reason is None,
        "reason": outcome.reason,
        **outcome.counts._asdict(),
        "drift": outcome.drift._asdict() if outcome.drift else None,
        "generated_now": progress.done,
        "rejected_now": progress.rejected,
        "withheld_now": progress.withheld,
        "cut_now": progress.cut,
        "new_tokens_now": progress.new_tokens,
        "seconds": round(progress.seconds, 3),
        "results": str(outcome.folder / "results.parquet") if outcome.counts.left == 0 else None,
        "exports": dict(exports),
    }


def _text(name: str, outcome: RunResult) -> str:
    from gxr_batch.cli.progress import duration, settled
    from gxr_batch.records import DISCLAIMER

    counts, progress, folder = outcome.counts, outcome.progress, outcome.folder
    if outcome.reason:
        title = f"{name}: {_WHY[outcome.reason]}"
    elif counts.left:
        title = f"{name}: the chosen rows are done, others are still to do"
    elif settled(progress):
        title = f"{name}: finished"
    else:
        title = f"{name}: nothing left to do"
    rows = f"{counts.ok:,} generated, {counts.failed:,} failed, {counts.held:,} held, {counts.left:,} to do"
    lines = [title, f"  rows     {counts.total:,}: {rows}"]
    if progress.done:
        speed = progress.done / max(progress.seconds, 1e-9)
        lines.append(
            f"  speed    {progress.done:,} rows in {duration(progress.seconds)}, {speed * 60:,.1f} rows/min, "
            f"{progress.new_tokens / max(progress.seconds, 1e-9):,.1f} tok/s"
        )
    if progress.cut:
        lines.append(f"  cut      {progress.cut:,} prompts lost the end of their longest cell; gxr_flags names them")
    if outcome.reason not in {None, "api_outage"} and not progress.done:
        lines.append("  note     no row ended in this start: rows need more time than it had")
    if outcome.reason or counts.left:
        lines.append("  next     run the same command again to go on (without --fresh)")
    if not counts.left:
        lines.append(f"  results  {folder / 'results.parquet'}")
        lines.append(f"  next     gxr-batch export {folder}")
    if counts.failed or counts.held:
        lines.append(f"  failed   {folder / 'failed.parquet'} names each row's reason in gxr_error")
    if counts.held:
        lines.append(
            f"  held     {counts.held:,} by identifier screening, until a person has looked; gxr_error names the rules"
        )
        lines.append("  next     the same command with --retry held releases them all, with --row ID some;")
        lines.append("           answers that are held: gxr-batch export --include-held")
    return "\n".join([*lines, DISCLAIMER])
