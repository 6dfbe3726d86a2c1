"""The main job: read the table, render, generate, checkpoint, write the results. Run again, it goes on.

Everything that is particular lives elsewhere: the table in rows, the prompts in prompts and feed, the generating in
engines, what is on disk in ledger, the stopping in stopping.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path

from gxr_batch.engines.base import EngineInfo, Pulse, Session
from gxr_batch.errors import ApiOutage
from gxr_batch.job import Job
from gxr_batch.ledger import Counts, Drift, open_run
from gxr_batch.run.invocation import Invocation, Options, Progress, Say
from gxr_batch.run.pipeline import Feed
from gxr_batch.run.prepare import output_folder, prepare
from gxr_batch.run.stop import Stopper, StopReason, Watch

Show = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an invocation ended. `reason` is None where every row of the table is ok, failed or held."""

    folder: Path
    counts: Counts
    reason: StopReason | None
    progress: Progress
    drift: Drift | None
    info: EngineInfo | None


def run(job: Job, options: Options, stopper: Stopper, say: Say, show: Show) -> Outcome:
    """Run a job to its end, or as far as `stopper` lets it. Raises GxrError; what was generated is safe.

    `say` receives sentences for the user, `show` the progress, at least once a second while the engine works.
    """
    watch = Watch(job.run, stopper, time.monotonic())  # first, so that reading a long table counts too
    prepared = prepare(job)
    folder = output_folder(job, datetime.now().astimezone().date())
    with open_run(folder, fresh=options.fresh, take_over=options.take_over) as ledger:
        invocation = Invocation(prepared, options, ledger, say)
        drift = None
        if not invocation.nothing_left():
            drift = invocation.take_in_table()
            if invocation.todo.any():
                generate(invocation, watch, show)
            invocation.close(stopper.reason)
        counts = invocation.progress.counts
        return Outcome(
            folder=folder,
            counts=counts,
            reason=stopper.reason if invocation.unfinished else None,
            progress=invocation.progress,
            drift=drift,
            info=invocation.info,
        )


def generate(invocation: Invocation, watch: Watch, show: Show) -> None:
    """Load the model and generate what is to do. Whatever goes wrong, the rows that came out are sealed."""
    try:
        encoder = invocation.engine.encoder()
        with invocation.engine.open() as session:
            invocation.opened(session.info)
            feed = Feed(invocation.prepared, invocation.job, encoder, invocation.ledger, invocation.todo)
            invocation.suspects(feed.suspects, feed.condemned)
            try:
                stream(session, feed, invocation, watch, show)
            finally:
                invocation.ledger.seal()
    except ApiOutage as outage:  # nobody's mistake, and what is sealed is safe: a stop like that of a clock
        watch.stopper.ask("api_outage")
        invocation.chronicle.tell(f"{outage.what} ({outage.where})")
        invocation.heed(watch.stopper.reason, invocation.progress.rows_in_flight)
    except BaseException as error:
        invocation.broke_off(error)
        raise


def stream(session: Session, feed: Feed, invocation: Invocation, watch: Watch, show: Show) -> None:
    """The loop: everything that the engine yields is booked, sealed when due, shown, and may end the run."""
    ledger, progress = invocation.ledger, invocation.progress
    checkpoint_seconds = invocation.job.run.checkpoint_seconds
    began = time.perf_counter()
    own = 0.0  # seconds in which this loop worked and the engine waited
    show(progress)  # from here on a signal asks for an orderly end
    request = watch.stopper.request
    try:
        for event in chain.from_iterable(session.stream(prompts, request) for prompts in feed.rounds()):
            woke = time.perf_counter()
            if isinstance(event, Pulse):
                progress.pulse(event)
                invocation.saw_workers(event.workers)
            else:
                position, result = feed.settle(event)
                ledger.add(position, result)
                watch.saw(result)
                progress.book(result)
            ledger.seal_if_due(checkpoint_seconds)
            watch.look()
            invocation.heed(watch.stopper.reason, feed.in_flight)
            progress.seconds, progress.rejected, progress.withheld = woke - began, feed.rejected, feed.withheld
            show(progress)
            own += time.perf_counter() - woke
        if feed.in_flight and watch.stopper.reason is None:
            raise RuntimeError(f"the engine took {feed.in_flight} prompts that it neither answered nor gave back")
    finally:
        progress.seconds = time.perf_counter() - began
        progress.rejected, progress.withheld, progress.cut = feed.rejected, feed.withheld, feed.cut
        invocation.chronicle.entry |= {
            "streaming_seconds": progress.seconds,
            "generating_seconds": progress.seconds - own - feed.seconds,
        }
