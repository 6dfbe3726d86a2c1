"""One execution of `run` on one run folder: reading the table, finding what is still to do, updating the manifest.

The loop is in `runner`, which reports here what goes into run.json.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from gxr_batch.engines import create
from gxr_batch.engines.base import Encoder, EngineInfo, Pulse, Workers
from gxr_batch.engines.suspects import Suspects
from gxr_batch.errors import TableError
from gxr_batch.ledger import FAILED, HELD, OK, TODO, Counts, Drift, RunWriter, encode_metadata
from gxr_batch.ledger.state import Bools
from gxr_batch.records import Key, Result
from gxr_batch.rows.ingest import ingest
from gxr_batch.run import messages
from gxr_batch.run.fingerprint import (
    file_marks,
    fingerprint,
    follow,
    of_the_opened_model,
    provenance,
    refuse_other_texts,
    settle,
)
from gxr_batch.run.invocation_record import InvocationRecord, now, user_name
from gxr_batch.run.pipeline import Pipeline
from gxr_batch.run.prepare import Prepared, notices_of, refuse_emptied
from gxr_batch.run.stop import StopReason
from gxr_batch.text_checks.screening import Screen

Say = Callable[[str], None]
_ROW_IDS_LOGGED = 1000  # of released rows; run.json has all of them


@dataclass(frozen=True, kw_only=True)
class Options:
    """Command line options of one invocation, in addition to the job file."""

    limit: int | None = None
    fresh: bool = False
    retry: str | None = None
    retry_rows: tuple[str, ...] = ()
    take_over: bool = False
    allow_empty: bool = False
    overrides: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Progress:
    """The progress of an invocation: `counts` covers the whole table, everything else this invocation.

    `wanted` keys are to be generated; `done` and `failed` came from the engine, `rejected` could not become prompts,
    `withheld` were held back by identifier screening, `cut` prompts lost the end of their longest cell.
    """

    counts: Counts
    wanted: int = 0
    done: int = 0
    failed: int = 0
    rejected: int = 0
    withheld: int = 0
    cut: int = 0
    new_tokens: int = 0
    rows_in_flight: int = 0
    memory_bytes: int = 0
    splits: int = 0
    retries: int = 0
    workers: Workers | None = None
    seconds: float = 0.0

    def book(self, result: Result) -> None:
        """Count a row from the engine."""
        self.done += 1
        self.failed += result.status == "failed"
        self.new_tokens += result.new_tokens or 0

    def keep(self, result: Result) -> None:
        """Count a row that never reached the engine."""
        self.rejected += result.status == "failed"
        self.withheld += result.status == "held"

    def pulse(self, pulse: Pulse) -> None:
        """Record the engine's report."""
        self.rows_in_flight, self.memory_bytes = pulse.rows_in_flight, pulse.memory_bytes
        self.splits, self.retries, self.workers = pulse.splits, pulse.retries, pulse.workers


class Invocation:
    """One execution of `run` on one run folder, from reading the table to closing the manifest."""

    def __init__(self, prepared: Prepared, options: Options, ledger: RunWriter, say: Say) -> None:
        self.prepared, self.options, self.ledger, self.say = prepared, options, ledger, say
        self.job = follow(prepared.job, ledger.manifest)
        self.engine = create(self.job, say)
        self.identity = self.engine.identity()
        self.info: EngineInfo | None = None
        self.screen = Screen(prepared.templates, prepared.fields.templates, self.job)
        self.source_key = prepared.source_key(options.limit)
        self.todo: Bools = np.zeros((0, 1), np.bool_)
        self.raised = False
        self.given_up: list[Key] = []  # rows that failed in this invocation for the deaths of processes before it
        self.progress = Progress(counts=ledger.counts())
        asked = {"set": list(options.overrides), "limit": options.limit}
        self.record = InvocationRecord(ledger, say, self.job, asked)
        self.record.notify(*prepared.job.warnings(), *notices_of(prepared, ledger.manifest))
        self.record.notify(*messages.of_kind(prepared.job, self.job))
        self.record.notify(*self.screen.notices())
        self.record.notify(*messages.of_versions(ledger.manifest, self.record.entry["packages"]))
        self.fingerprint = fingerprint(prepared, self.job, self.identity)
        self._check_fingerprint()

    def _check_fingerprint(self) -> None:
        """Refuse settings that would change the texts of this run."""
        if self.ledger.manifest is not None:
            raisable = {"sampling.max_new_tokens", "model.max_seq_length"} if self.options.retry else set()
            where = str(self.ledger.folder.absolute())
            known = self.ledger.manifest.fingerprint
            refuse_other_texts(known, self.fingerprint, raisable=frozenset(raisable), where=where)
            self.raised = any(known.get(key, self.fingerprint[key]) != self.fingerprint[key] for key in raisable)

    def save(self) -> None:
        """Save the progress of this invocation. Raises StorageError."""
        self.record.save(self.job, self.identity, self.info, self.fingerprint)

    def nothing_left(self) -> bool:
        """Return whether results.parquet is already the finished state of this exact table."""
        manifest = self.ledger.manifest
        last = manifest.invocations[-1] if manifest and manifest.invocations else {}
        if self.options.retry or last.get("outcome") != "finished" or last.get("source_key") != self.source_key:
            return False
        marks = self.ledger.results_metadata(last.get("results_sha256"))
        if marks.get("gxr_source") != self.source_key:
            return False
        if marks.get("gxr_invocation") != str(last.get("number")):
            return False
        table = marks.get("gxr_table")  # missing in runs of earlier versions
        if table and table != self.ledger.table_sha256():
            return False
        self.progress.counts = Counts(**last["counts"])
        self.record.log("nothing_to_do", **last["counts"])
        self.record.save_form(self.job)
        return True

    def read_table(self) -> Drift | None:
        """Read the table into the run folder and find what is still to do."""
        ledger, job = self.ledger, self.job
        taken = ingest(
            self.prepared.survey,
            self.prepared.fields,
            ledger.incoming_input,
            id_column=job.input.id_column,
            prior=ledger.previous_input,
            limit=self.options.limit,
        )
        if not self.options.allow_empty:
            try:
                refuse_emptied(taken.rows, ledger.manifest, job)
            except TableError:
                ledger.incoming_input.unlink(missing_ok=True)
                raise
        drift = ledger.adopt_input(job.sampling.samples_per_row)
        self.record.notify(*taken.notices, *ledger.damage())
        self.todo = self._todo()
        self.progress.counts = ledger.counts()
        self.progress.wanted = int(self.todo.sum())
        self.record.entry |= {
            "source_key": self.source_key,
            "input_sha256": self.prepared.survey.sha256,
            "input_files": [str(file.path.absolute()) for file in self.prepared.survey.files],
            "rows": taken.rows,
            "drift": drift._asdict() if drift else None,
            "set_aside": list(ledger.set_aside),
        }
        changed = drift._asdict() if drift else None
        self.record.log("table_read", rows=taken.rows, to_generate=self.progress.wanted, drift=changed)
        if drift is not None:
            self.say(f"Resuming {ledger.folder}: {drift}; {int(self.todo.sum()):,} to generate.")
        self.record.notify(
            *messages.of_disk_space(ledger.folder, job.sampling.settings().max_new_tokens, self.progress.wanted)
        )
        self.save()  # so that `status` finds the run while its model is loading
        return drift

    def pipeline(self, encoder: Encoder) -> Pipeline:
        """Return the pipeline for the rows to do. The engine must be open: it settles the job."""
        released = self.ledger.manifest.released() if self.ledger.manifest else frozenset()
        return Pipeline(self.prepared, self.job, encoder, self.screen, state=self.ledger.state, released=released)

    def suspects(self) -> Suspects:
        """Return the rows that were in the engine when an earlier invocation died; report how many are given up."""
        keys = self.ledger.in_flight.known
        at = self.ledger.positions_of([key.row_id for key in keys]) if keys else {}
        state = self.ledger.state
        here = {
            key: (at[key.row_id], key.sample - 1) for key in keys if key.row_id in at and key.sample <= state.samples
        }
        # Rows that are not in the table now, e.g. because of --limit, may come back. A row that is tried again is not
        # finished, though it has an earlier result: without its deaths it would kill every retry.
        finished = {key for key, place in here.items() if state.status[place] != TODO and not self.todo[place]}
        deaths = self.ledger.in_flight.keep(set(keys) - finished)
        wanted = {key: died for key, died in deaths.items() if key in here and self.todo[here[key]]}
        suspects = Suspects(wanted)
        notices = [*messages.of_suspects(suspects.waiting), *messages.of_condemned(suspects.condemned)]
        if notices:
            self.record.notify(*notices)
            self.save()
        return suspects

    def _todo(self) -> Bools:
        state = self.ledger.state
        todo: Bools = state.status == TODO
        if self.options.retry is None:
            return todo
        again = {
            "failed": state.status == FAILED,
            "held": state.status == HELD,
            "truncated": (state.status == OK) & state.truncated,
        }[self.options.retry]
        spent = again & (state.attempt >= self.job.run.max_attempts)
        if spent.any():
            self.say(
                f"{int(spent.sum()):,} not tried again: run.max_attempts = {self.job.run.max_attempts} is reached; "
                f"--set run.max_attempts={self.job.run.max_attempts + 1} tries them again."
            )
        chosen: Bools = again & ~spent & self._chosen_rows()[:, None]
        if self.options.retry == "held" and chosen.any():
            self._release(chosen)
        # With named rows, or after raising a limit, new rows must not get their first attempt.
        return chosen if self.options.retry_rows or self.raised else todo | chosen

    def _release(self, chosen: Bools) -> None:
        """Record that a person released these rows, with their content, before any of them runs."""
        rows = self.ledger.keys_at(np.any(chosen, axis=1))
        by = user_name()
        self.record.entry["released"] = {"by": by, "at": now(), "rows": rows}
        self.record.log("released", by=by, rows=len(rows), row_ids=list(rows)[:_ROW_IDS_LOGGED])
        self.record.notify(messages.of_release(len(rows), by))

    def _chosen_rows(self) -> Bools:
        """Return the rows that `--retry` applies to: those named by `--row`, else all."""
        if not self.options.retry_rows:
            return np.ones(self.ledger.state.rows, np.bool_)
        return self.ledger.rows_named(self.options.retry_rows)

    def opened(self, info: EngineInfo) -> None:
        """Record what was loaded, before the first row is generated."""
        self.info, self.identity = info, info.identity
        self.record.notify(*info.notices, *messages.of_forward(self.ledger.manifest, info))
        before = self.progress.counts
        self.record.entry |= {"generating_since": now(), "done_before": before.total - before.left}
        self.job = settle(self.job, info)
        self.fingerprint |= of_the_opened_model(self.job, self.identity)
        self._check_fingerprint()
        self.record.log(
            "engine_opened",
            kind=info.identity.kind,
            model=info.identity.model,
            device=info.device,
            dtype=info.dtype,
            slots=info.slots,
            load_seconds=round(info.load_seconds, 3),
        )
        self.save()
        # That of the run, not of this invocation, which may have raised a limit: it replaces a run.json that is lost.
        known = self.ledger.manifest.fingerprint if self.ledger.manifest else self.fingerprint
        self.ledger.part_metadata = encode_metadata(file_marks(self.job, info.identity, known))

    def changed(self, info: EngineInfo, notices: Sequence[str]) -> None:
        """Record that the engine continues in another way than it was opened."""
        self.info = info
        self.record.notify(*notices)
        self.save()

    def announce_stop(self, reason: StopReason | None, in_flight: int) -> None:
        """Report and log once why the run is about to stop."""
        if reason is not None and "stop_requested" not in self.record.entry:
            self.record.entry["stop_requested"] = reason
            self.record.log("stop_requested", reason=reason, in_flight=in_flight)
            self.say(messages.of_stop(reason, in_flight, self.job.run.grace_seconds))

    def record_workers(self, workers: Workers | None) -> None:
        """Log and save the number of live workers if it changed; `status` reads it during the run."""
        if workers is None:
            return
        known = self.record.entry.get("workers", {})
        self.record.entry["workers"] = workers._asdict()
        if any(known.get(name) != value for name, value in (("alive", workers.alive), ("lost", workers.lost))):
            self.record.log("workers", alive=workers.alive, lost=workers.lost)
            self.save()

    def streamed(self, seconds: float, generating: float) -> None:
        """Record how long the engine streamed, and how much of that time it was not waiting for this process."""
        self.record.entry |= {"streaming_seconds": seconds, "generating_seconds": generating}

    def record_error(self, error: BaseException) -> None:
        """Record that an error ended this invocation. Never raises, so that the error is not hidden."""
        self.record.entry |= {"finished_at": now(), "outcome": "broken off", "error": type(error).__name__}
        with suppress(Exception):
            self.ledger.drop_unsealed()
        self.record.entry["counts"] = self.ledger.counts()._asdict()
        with suppress(Exception):
            self.save()
            self.ledger.write_failed()

    def finish(self, reason: StopReason | None) -> None:
        """Write the results if the table is finished, the failed rows in any case, and the manifest last."""
        for key in self.given_up:  # recorded by now: if somebody tries it again, it begins without a death
            self.ledger.in_flight.settle(key)
        counts = self.progress.counts = self.ledger.counts()
        finished = counts.left == 0 and not self.unfinished
        self.record.entry |= {
            "finished_at": now(),
            "outcome": "finished" if finished else reason or "unfinished",
            "counts": counts._asdict(),
            "done": self.progress.done,
            "rejected": self.progress.rejected,
            "withheld": self.progress.withheld,
            "new_tokens": self.progress.new_tokens,
            "splits": self.progress.splits,
            "retries": self.progress.retries,
            "cut": self.progress.cut,
        }
        if counts.left:
            self.ledger.write_failed()
        else:
            marks = file_marks(self.job, self.identity, self.fingerprint) | {
                "gxr_source": self.source_key,
                "gxr_table": self.ledger.table_sha256(),
                "gxr_invocation": self.record.register(),
                "gxr_counts": counts._asdict(),
            }
            written = self.ledger.write_results(provenance(self.identity), encode_metadata(marks), self.prepared.form)
            self.record.entry["results_sha256"] = written
        outcome = self.record.entry["outcome"]
        self.record.log("ended", outcome=outcome, done=self.progress.done, **counts._asdict())
        # Last, so that a manifest with the outcome "finished" always has its results.
        self.save()

    @property
    def unfinished(self) -> int:
        """The number of keys that this invocation should have generated but did not."""
        progress = self.progress
        return progress.wanted - progress.done - progress.rejected - progress.withheld
