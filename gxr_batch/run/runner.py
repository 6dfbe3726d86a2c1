"""The main job: read the table, render, generate, checkpoint, write the results. Run again, it resumes.

The steps of a job: prepare, open the run folder, `pipeline` (rows become prompts), engine, back here, ledger. Only this
module adds results; every other detail is in the module named after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain
from pathlib import Path

from gxr_batch.engines.base import Encoder, EngineInfo, Pulse, Session, require_time
from gxr_batch.errors import ApiOutage, OutOfTime
from gxr_batch.job import Job
from gxr_batch.ledger import Counts, Drift, open_run
from gxr_batch.ledger.join import INPUT_NAME
from gxr_batch.ledger.manifest import known_manifest
from gxr_batch.records import Completion, Key, Prompt, Result
from gxr_batch.run.invocation import Invocation, Options, Progress, Say
from gxr_batch.run.messages import of_lost_hint
from gxr_batch.run.output_folder import output_folder
from gxr_batch.run.pipeline import TRUNCATED, Kept, Work
from gxr_batch.run.planning import longest_first
from gxr_batch.run.prepare import prepare
from gxr_batch.run.stop import Stopper, StopReason, Watch
from gxr_batch.text_checks.flags import NOT_COMPUTED

Show = Callable[[Progress], None]
# Engines that hold their rows in other processes: a row never kills this one.
_APART = frozenset({"api", "vllm", "ray"})


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How an invocation ended.

    `folder` is the run folder, `counts` the rows of the whole table by state. `reason` says what stopped the
    invocation, None if nothing did. `drift` is how the table changed since the last invocation, None in the first;
    `info` the engine that was opened, None if none was. `exports` maps each format that the job asks for to written,
    current or failed.
    """

    folder: Path
    counts: Counts
    reason: StopReason | None
    progress: Progress
    drift: Drift | None
    info: EngineInfo | None
    exports: Mapping[str, str] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether every row of the table is generated, failed or held."""
        return not self.counts.left and self.reason is None

    @property
    def results(self) -> Path | None:
        """results.parquet, None if rows are still to do."""
        return None if self.counts.left else self.folder / "results.parquet"


def run(job: Job, options: Options, stopper: Stopper, say: Say, show: Show) -> RunResult:
    """Run a job until it finishes or `stopper` stops it. Raises GxrError; generated rows are kept.

    `say` receives messages for the user, `show` the progress, at least once a second while the engine works.
    """
    watch = Watch(job.run, stopper, time.monotonic())  # first, so that the time to read a long table counts too
    prepared = prepare(job, fresh=options.fresh)
    folder = output_folder(job, datetime.now().astimezone().date())
    if prepared.mismatch is not None and (options.fresh or known_manifest(folder) is None):
        raise prepared.mismatch  # before an earlier run is renamed
    with open_run(folder, fresh=options.fresh, take_over=options.take_over) as ledger:
        invocation = Invocation(prepared, options, ledger, say)
        drift = None
        if not invocation.nothing_left():
            drift = invocation.read_table()
            if invocation.todo.any():
                generate(invocation, watch, show)
            invocation.finish(stopper.reason)
        counts = invocation.progress.counts
        return RunResult(
            folder=folder,
            counts=counts,
            reason=stopper.reason if invocation.unfinished else None,
            progress=invocation.progress,
            drift=drift,
            info=invocation.info,
        )


def generate(invocation: Invocation, watch: Watch, show: Show) -> None:
    """Load the model and generate the rows to do. Whatever goes wrong, generated rows are sealed."""
    try:
        require_time(watch.until)  # a long table takes time too, as does loading, which cannot be ended
        encoder = invocation.engine.encoder()
        with invocation.engine.open(watch.until) as session:
            require_time(watch.until)
            invocation.opened(session.info)
            try:
                stream(session, Dispatch(invocation, encoder), watch, show)
            finally:
                invocation.info = session.info  # that of several workers changes without a notice
                invocation.ledger.seal()
    except ApiOutage as outage:  # not an error, and sealed rows are safe: stop as for a time limit
        watch.stopper.ask("api_outage")
        invocation.record.notify(f"{outage.what} ({outage.where})")
        invocation.announce_stop(watch.stopper.reason, invocation.progress.rows_in_flight)
    except OutOfTime as late:  # the same
        watch.look()
        invocation.record.notify(late.what)
        invocation.announce_stop(watch.stopper.reason, 0)
    except BaseException as error:
        invocation.record_error(error)
        raise


def stream(session: Session, dispatch: Dispatch, watch: Watch, show: Show) -> None:
    """Run the main loop: record, seal and show everything that the engine yields, and stop when due."""
    invocation = dispatch.invocation
    ledger, progress = invocation.ledger, invocation.progress
    checkpoint_seconds = invocation.job.run.checkpoint_seconds
    began = time.perf_counter()
    own = 0.0  # seconds in which this loop ran and the engine waited
    show(progress)  # from here on a signal requests an orderly stop
    request = watch.stopper.request
    try:
        for event in chain.from_iterable(session.stream(prompts, request) for prompts in dispatch.rounds()):
            woke = time.perf_counter()
            if isinstance(event, Pulse):
                progress.pulse(event)
                invocation.record_workers(event.workers)
                if event.notices:
                    invocation.changed(session.info, event.notices)
            else:
                watch.saw(dispatch.settle(event))
            ledger.seal_if_due(checkpoint_seconds)
            watch.look()
            invocation.announce_stop(watch.stopper.reason, dispatch.in_flight)
            progress.seconds = woke - began
            show(progress)
            own += time.perf_counter() - woke
        if dispatch.in_flight and watch.stopper.reason is None:
            raise RuntimeError(f"the engine took {dispatch.in_flight} prompts that it neither answered nor gave back")
    finally:
        progress.seconds = time.perf_counter() - began
        invocation.streamed(progress.seconds, progress.seconds - own - dispatch.seconds)


class Dispatch:
    """Hands the pipeline's prompts to the engine and records every result, including rows that never reach it.

    `seconds` is the time spent making and handing out prompts, while the engine waited.
    """

    def __init__(self, invocation: Invocation, encoder: Encoder) -> None:
        self.invocation, self._ledger = invocation, invocation.ledger
        self._pipeline = invocation.pipeline(encoder)
        self._suspects = invocation.suspects()
        self._deadly = invocation.job.engine.kind not in _APART
        self._in_flight: dict[Key, Work] = {}
        self._alone: list[Work] = []
        self._flag_faults: set[str] = set()
        self._hint_failed = False
        self.seconds = 0.0

    @property
    def in_flight(self) -> int:
        """The number of prompts that the engine took and has not returned."""
        return len(self._in_flight)

    def rounds(self) -> Iterator[Iterator[Prompt]]:
        """Yield the prompts, longest first within each window of input order; then each suspect in its own round."""
        rows = self._pipeline.rows(self._ledger.folder / INPUT_NAME, self.invocation.todo, self._suspects)
        window = self.invocation.job.engine.window
        yield self._hand_out(longest_first(self._for_the_engine(rows), window, lambda work: work.length))
        if self._alone:
            self._ledger.seal()  # finished rows must survive if the next suspect kills the process
        for work in self._alone:
            yield self._hand_out(iter([work]))

    def _for_the_engine(self, rows: Iterator[Work | Kept]) -> Iterator[Work]:
        """Record rows that never reach the engine, keep suspects for later, yield the rest."""
        for row in rows:
            if isinstance(row, Kept):
                self._ledger.add(row.position, row.result)
                self.invocation.progress.keep(row.result)
                if self._suspects.is_condemned(key := Key(row.result.row_id, row.result.sample)):
                    self.invocation.given_up.append(key)
            elif self._suspects.is_suspect(row.prompt.key):
                self._alone.append(row)
            else:
                yield row

    def _hand_out(self, ordered: Iterator[Work]) -> Iterator[Prompt]:
        while True:
            began = time.perf_counter()
            work = next(ordered, None)
            if work is not None:
                self._in_flight[work.prompt.key] = work
                self.invocation.progress.cut += TRUNCATED in work.fitted.flags
                self._ledger.in_flight.take(work.prompt.key, deadly=self._deadly)
                self._report_lost_hint()
            self.seconds += time.perf_counter() - began
            if work is None:
                return
            yield work.prompt

    def _report_lost_hint(self) -> None:
        if (reason := self._ledger.in_flight.failure) and not self._hint_failed:
            self._hint_failed = True
            self.invocation.record.notify(of_lost_hint(reason))

    def settle(self, completion: Completion) -> Result:
        """Record a prompt's completion and return its result. Raises StorageError."""
        work = self._in_flight.pop(completion.key)
        self._ledger.in_flight.settle(completion.key)
        result, fault = self._pipeline.result(work, completion)
        if fault and fault not in self._flag_faults:  # once per invocation: it may affect every row
            self._flag_faults.add(fault)
            self._ledger.log.event(NOT_COMPUTED, row_id=result.row_id, sample=result.sample, error=fault)
        self._ledger.add(work.row.position, result)
        self.invocation.progress.book(result)
        return result
