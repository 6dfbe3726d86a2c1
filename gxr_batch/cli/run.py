"""`gxr-batch run`: generate a case for every row, then write the exports that the job names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gxr_batch.cli.exit_codes import Exit, bug_report
from gxr_batch.cli.options import job_options, read_job
from gxr_batch.cli.streams import safe
from gxr_batch.errors import GxrError

if TYPE_CHECKING:
    from gxr_batch.job import Job
    from gxr_batch.run.invocation import Options, Progress
    from gxr_batch.run.runner import RunResult


_EXITS = {
    "interrupt": Exit.INTERRUPTED,
    "terminate": Exit.STOPPED,
    "stop_by": Exit.STOPPED,
    "time_limit": Exit.STOPPED,
    "max_failed": Exit.MAX_FAILED,
    "api_outage": Exit.STOPPED,
}
STOPPED = {
    "interrupt": "stopped by Ctrl-C",
    "terminate": "stopped by a signal",
    "stop_by": "stopped at its stop-by time",
    "time_limit": "stopped at its time limit",
    "max_failed": "stopped: more rows failed than run.max_failed allows",
    "api_outage": "stopped: no answer from the server for api.give_up_after",
}


@click.command(name="run")
@job_options
@click.option("--fresh", is_flag=True, help="Start from scratch; the earlier run is kept as NAME.before-<timestamp>.")
@click.option(
    "--retry",
    type=click.Choice(["failed", "held", "truncated"]),
    help="Generate these rows again, up to run.max_attempts times each. For held rows this is a recorded release.",
)
@click.option("--row", "rows", metavar="ID", multiple=True, help="With --retry: only this row id; repeatable.")
@click.option("--stop-by", metavar="HH:MM", help="Stop before the next HH:MM, local time, and exit with 75.")
@click.option("--time-limit", metavar="DURATION", help='Stop within this time, e.g. "7h" or "30m", and exit with 75.')
@click.option("--allow-empty", is_flag=True, help="Accept a table without rows, although the run had some.")
@click.option("--take-over", is_flag=True, help="Resume a run that died on another host. Make sure that it is dead.")
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
    allow_empty: bool,
    take_over: bool,
) -> None:
    """Generate a teaching case for every row of the job's table.

    Results go to the run folder as Parquet, with checkpoints during the run. Run the same command again to resume; if
    the run is finished, nothing is left to do.

    \b
    Exit codes:
      0    every row generated
      2    wrong input
      3    finished; some rows failed or are held
      4    the machine cannot do it now
      5    more rows failed than run.max_failed allows
      75   stopped on purpose
      130  Ctrl-C
    After 4, 5, 75 and 130 the same command resumes.

    \b
    Example:
      gxr-batch run jobs/demo.toml --limit 4
    """
    from gxr_batch.run.invocation import Options

    if rows and not retry:
        raise click.UsageError("--row requires --retry.")
    job = read_job(job_file, overrides, output=output, stop_by=stop_by, time_limit=time_limit)
    options = Options(
        limit=limit,
        fresh=fresh,
        retry=retry,
        retry_rows=rows,
        take_over=take_over,
        allow_empty=allow_empty,
        overrides=overrides,
    )
    outcome = _run(job, options, quiet)
    click.echo(json.dumps(_summary(outcome), indent=2) if as_json else _text(job.name, outcome, limit))
    click.get_current_context().exit(_exit_code(outcome))


def _run(job: Job, options: Options, quiet: bool) -> RunResult:
    """Run the job with progress, signals and its exports."""
    from gxr_batch.cli.progress import ProgressDisplay
    from gxr_batch.cli.signals import Signals
    from gxr_batch.library import write_exports
    from gxr_batch.run.runner import run
    from gxr_batch.run.stop import Stopper

    stopper = Stopper(job.run.grace_seconds)
    signals = Signals(stopper)
    with signals.handled(), ProgressDisplay(quiet) as display:

        def show(progress: Progress) -> None:
            signals.generating = True
            display.show(progress)

        outcome = run(job, options, stopper, display.say, show)
        signals.generating = False  # from here on a signal ends the program; the results are written
        if not outcome.counts.left:
            exports = write_exports(outcome.folder, job.export.formats, display.say, _export_failed)
            outcome = replace(outcome, exports=exports)
    return outcome


def _export_failed(form: str, error: Exception) -> None:
    """Report a failed export, also with --quiet; a bug keeps its traceback."""
    said = f" {error}" if isinstance(error, GxrError) else f"\n{bug_report(error)}"
    click.echo(safe(f"The export as {form} failed; the results are safe.{said}"), err=True)


def _exit_code(outcome: RunResult) -> Exit:
    if outcome.reason:
        return _EXITS[outcome.reason]
    if outcome.counts.left:
        return Exit.STOPPED  # --retry --row generated only the rows that it named
    return Exit.SOME_FAILED if outcome.counts.failed or outcome.counts.held else Exit.DONE


def _summary(outcome: RunResult) -> dict[str, Any]:
    progress = outcome.progress
    return {
        "run": str(outcome.folder),
        "finished": outcome.finished,
        "reason": outcome.reason,
        **outcome.counts._asdict(),
        "drift": outcome.drift._asdict() if outcome.drift else None,
        "generated_now": progress.done,
        "rejected_now": progress.rejected,
        "withheld_now": progress.withheld,
        "cut_now": progress.cut,
        "new_tokens_now": progress.new_tokens,
        "seconds": round(progress.seconds, 3),
        "results": str(outcome.results) if outcome.results else None,
        "exports": dict(outcome.exports),
    }


def _title(name: str, outcome: RunResult) -> str:
    from gxr_batch.cli.progress import settled

    if outcome.reason:
        return f"{name}: {STOPPED[outcome.reason]}"
    if outcome.counts.left:
        return f"{name}: the rows you named are done, others are left"
    return f"{name}: finished" if settled(outcome.progress) else f"{name}: nothing left to do"


def _text(name: str, outcome: RunResult, limit: int | None) -> str:
    from gxr_batch.cells import quoted
    from gxr_batch.cli.layout import duration, labelled, rate, wrapped
    from gxr_batch.records import DISCLAIMER
    from gxr_batch.rows.columns import counted

    counts, progress, folder = outcome.counts, outcome.progress, quoted(outcome.folder)
    rows = f"{counts.ok:,} generated, {counts.failed:,} failed, {counts.held:,} held, {counts.left:,} left"
    entries = [("rows", f"{counts.total:,}: {rows}")]
    if limit:
        entries.append(("limit", f"only the first {counted(limit, 'row')} of the table; omit --limit for all rows"))
    if progress.done:
        seconds = max(progress.seconds, 1e-9)
        speed = f"{rate(progress.done / seconds * 60)} rows/min, {rate(progress.new_tokens / seconds)} tok/s"
        entries.append(("speed", f"{counted(progress.done, 'row')} in {duration(progress.seconds)}, {speed}"))
    if progress.cut:
        entries.append(
            ("cut", f"{counted(progress.cut, 'prompt')} too long: the end of the longest cell was cut; see gxr_flags")
        )
    if outcome.reason not in {None, "api_outage"} and not progress.done:
        why = "rows take longer than this invocation lasted" if outcome.info else "the engine was not ready in time"
        entries.append(("note", f"no row was finished: {why}"))
    if not counts.left:
        entries.append(("results", f"{folder}/results.parquet"))
    if counts.failed or counts.held:
        entries.append(("reasons", f"{folder}/failed.parquet, column gxr_error"))
    if counts.held:
        entries.append(("held", f"{counts.held:,} by identifier screening, until a person releases them"))
        entries.append(("next", f"gxr-batch export {folder} --include-held"))
        entries.append(("", "shows them; --retry held releases all, --retry held --row ID only some"))
    if outcome.reason or counts.left:
        entries.append(("next", "run the same command again to resume, without --fresh"))
    elif counts.ok:
        entries.append(("next", f"gxr-batch show {folder}"))
        if not outcome.exports:
            entries.append(("", f"gxr-batch export {folder}"))
    return "\n".join([_title(name, outcome), *labelled(entries), "", *wrapped(DISCLAIMER)])
