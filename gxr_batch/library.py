"""The Python API: check and run a job from a program, as the command line does.

Nothing here prints, installs a signal handler or ends the process: notices and progress go to callbacks, an error is
raised as a `gxr_batch.errors.GxrError`, and what stopped a run is part of its result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from gxr_batch.job import Job
    from gxr_batch.ledger import RunReader
    from gxr_batch.run.check import CheckResult
    from gxr_batch.run.invocation import Progress
    from gxr_batch.run.runner import RunResult
    from gxr_batch.run.stop import Stopper


def load_job(path: str | Path, overrides: Iterable[str] = ()) -> Job:
    """Read a job file.

    `overrides` are `section.key=value` strings, as after `--set` on the command line. Relative paths in the job are
    relative to the current folder. Raises JobFileError if the file or an override is not valid.
    """
    from gxr_batch.errors import UserError
    from gxr_batch.job import load_job as load

    if isinstance(overrides, str):
        raise UserError("overrides takes a list of strings.", where="load_job", next_step=f"overrides=[{overrides!r}]")
    return load(Path(path), tuple(overrides))


def check_job(job: Job, *, limit: int | None = None) -> CheckResult:
    """Check everything in a job except the model's weights: templates, table, prompt lengths, disk space, memory.

    `limit` is the number of rows of the table to use. Writes nothing. Raises GxrError if `run_job` could not start.
    """
    from gxr_batch.engines.base import silent
    from gxr_batch.models.offline import asked_only_by_fetch
    from gxr_batch.run.check import check

    _check_limit(limit)
    with asked_only_by_fetch():
        return check(job, limit=limit, say=silent)


def run_job(
    job: Job,
    *,
    limit: int | None = None,
    fresh: bool = False,
    retry: Literal["failed", "held", "truncated"] | None = None,
    retry_rows: Sequence[str] = (),
    take_over: bool = False,
    allow_empty: bool = False,
    stopper: Stopper | None = None,
    on_notice: Callable[[str], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> RunResult:
    """Run a job, or resume it, until every row is generated, failed or held, or until something stops it.

    The keyword arguments correspond to the options of `gxr-batch run`; `retry_rows` are the row ids to retry, all of
    them if empty. `on_notice` receives sentences for the user, `on_progress` the counts, at least once a second while
    the engine works; an exception that either raises ends the run, and the next call resumes it.
    `stopper.ask("terminate")`, from another thread or a signal handler, stops the run cleanly within
    `run.grace_seconds`. Writes the exports that the job names once every row is finished.

    Raises GxrError: UserError for wrong input, MachineError for what the machine cannot do now. Rows that were
    generated before are safe in either case.
    """
    from gxr_batch.engines.base import silent
    from gxr_batch.models.offline import asked_only_by_fetch
    from gxr_batch.run.invocation import Options
    from gxr_batch.run.runner import run
    from gxr_batch.run.stop import Stopper

    _check_limit(limit)
    _check_retry(retry, retry_rows)
    say = on_notice or silent
    options = Options(
        limit=limit,
        fresh=fresh,
        retry=retry,
        retry_rows=tuple(retry_rows),
        take_over=take_over,
        allow_empty=allow_empty,
    )

    def show(progress: Progress) -> None:
        if on_progress is not None:
            on_progress(replace(progress))  # a copy, since the run keeps counting in its object

    with asked_only_by_fetch():
        result = run(job, options, stopper or Stopper(job.run.grace_seconds), say, show)
    bugs: list[Exception] = []

    def failed(form: str, error: Exception) -> None:
        from gxr_batch.errors import GxrError

        known = isinstance(error, GxrError)
        if not known:
            bugs.append(error)
        say(f"The export as {form} failed; the results are safe. {error if known else type(error).__name__}")

    exports = {} if result.counts.left else write_exports(result.folder, job.export.formats, say, failed)
    if bugs:
        raise bugs[0]
    return replace(result, exports=exports)


def write_exports(
    folder: Path,
    formats: Sequence[str],
    say: Callable[[str], None],
    failed: Callable[[str, Exception], None],
) -> dict[str, str]:
    """Export a finished run in these formats, except files that exist and are up to date.

    Returns the outcome of each format: written, current or failed. `failed` is called with the error of a format.
    """
    outcome: dict[str, str] = {}
    if not formats:
        return outcome
    from gxr_batch.ledger import RunReader

    for form in formats:
        try:
            written = _write_export(RunReader(folder), form)
        except Exception as error:  # a bug in an export must not hide the results of a run
            failed(form, error)
            outcome[form] = "failed"
        else:
            outcome[form] = "written" if written else "current"
            if written:
                say(written)
    return outcome


def _write_export(reader: RunReader, form: str) -> str:
    """Write one export; return what to report to the user, "" if it is up to date already."""
    from gxr_batch.cells import quoted
    from gxr_batch.export import Choice, default_path, export
    from gxr_batch.ledger.exports import is_current
    from gxr_batch.report import REPORT_NAME, report
    from gxr_batch.rows.columns import counted

    path = reader.folder / REPORT_NAME if form == "report" else default_path(reader, form, Choice())
    if is_current(reader.folder, path):
        return ""
    if form == "report":
        page = report(reader, None, None, include_held=False)
        return "\n".join([f"Exported {quoted(page.path)}: {page.shown:,} cases of {page.rows:,} rows", *page.notices])
    done = export(reader, form, None, Choice())
    return "\n".join([f"Exported {quoted(done.path)}: {counted(done.rows, 'row')}", *done.notes])


def _check_limit(limit: int | None) -> None:
    from gxr_batch.errors import UserError

    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise UserError("limit must be a whole number from 1, or None.", where="limit")


def _check_retry(retry: str | None, rows: Sequence[str]) -> None:
    from gxr_batch.errors import UserError

    if retry not in {None, "failed", "held", "truncated"}:
        raise UserError("retry must be failed, held, truncated or None.", where="retry")
    if isinstance(rows, str) or (rows and retry is None):
        raise UserError("retry_rows takes a list of row ids, together with retry.", where="retry_rows")
