"""Turns rows that are still to do into prompts, and what comes back into results.

Rows that cannot become a prompt are booked as failed with their reason and never reach the engine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gxr_batch.engines.base import Encoder
from gxr_batch.errors import RowError
from gxr_batch.fitter import TRUNCATED, Fitted, Fitter
from gxr_batch.job import Job
from gxr_batch.ledger import TODO, RunWriter
from gxr_batch.ledger.state import Bools
from gxr_batch.plan import longest_first, row_seed
from gxr_batch.prepare import Prepared
from gxr_batch.records import Completion, Encoded, Key, Messages, Prompt, Result, Row, Status
from gxr_batch.rows import read_rows

_NO_PROMPT = Fitted(Messages((), ""), Encoded(None, None), "")


class _Taken(NamedTuple):
    """What a result needs of a prompt that an engine holds."""

    row: Row
    attempt: int
    prompt: Prompt
    fitted: Fitted


class Feed:
    """The rows of one invocation on their way to the engine and back."""

    def __init__(self, prepared: Prepared, job: Job, encoder: Encoder, ledger: RunWriter, todo: Bools) -> None:
        self._prepared, self._job, self._ledger, self._todo = prepared, job, ledger, todo
        self._fitter = Fitter(prepared.templates, job, encoder)
        self._seed = int(job.sampling.seed)
        self._max_new_tokens = job.sampling.settings().max_new_tokens
        self._in_flight: dict[Key, _Taken] = {}
        self._suspects, self._condemned = ledger.in_flight.begin(*self._known_to_the_ledger(ledger.in_flight.known))
        self._alone: list[_Taken] = []
        self.rejected = self.cut = 0
        self.seconds = 0.0

    @property
    def in_flight(self) -> int:
        """How many prompts the engine took and has not returned."""
        return len(self._in_flight)

    @property
    def condemned(self) -> frozenset[Key]:
        """The keys that are given up, because the process died over them twice."""
        return self._condemned

    @property
    def suspects(self) -> int:
        """How many keys were in the engine when the process died before."""
        return len(self._suspects)

    def rounds(self) -> Iterator[Iterator[Prompt]]:
        """Yield the prompts, longest first within each window of input order; then every suspect in a round alone."""
        yield self._hand_out(
            longest_first(self._encoded(), self._job.engine.window, lambda taken: taken.prompt.encoded.length or 0)
        )
        if self._alone:
            self._ledger.seal()  # what is done by now must not die with the next suspect
        for taken in self._alone:
            yield self._hand_out(iter([taken]))

    def _hand_out(self, ordered: Iterator[_Taken]) -> Iterator[Prompt]:
        while True:
            began = time.perf_counter()
            taken = next(ordered, None)
            if taken is not None:
                self._in_flight[taken.prompt.key] = taken
                self.cut += TRUNCATED in taken.fitted.flags
                self._ledger.in_flight.take(taken.prompt.key)
            self.seconds += time.perf_counter() - began
            if taken is None:
                return
            yield taken.prompt

    def settle(self, completion: Completion) -> tuple[int, Result]:
        """Return the row's position and the result that a completion makes of it."""
        taken = self._in_flight.pop(completion.key)
        self._ledger.in_flight.settle(completion.key)
        error = completion.error
        if error is None and not completion.text.strip():
            error = "the model returned empty text"
        return taken.row.position, self._result(taken, completion, error)

    def _encoded(self) -> Iterator[_Taken]:
        wanted: Bools = np.any(self._todo, axis=1)
        for row in read_rows(self._ledger.folder / "input.parquet", self._prepared.fields, wanted):
            samples = [int(sample) + 1 for sample in np.flatnonzero(self._todo[row.position])]
            if killers := [sample for sample in samples if Key(row.row_id, sample) in self._condemned]:
                self._reject(row, killers, RowError("crashed the process"))
                samples = [sample for sample in samples if sample not in killers]
            try:
                fitted = self._fitter.fit(row) if samples else _NO_PROMPT
            except RowError as error:
                self._reject(row, samples, error)
                continue
            for sample in samples:
                taken = self._take(row, sample, fitted)
                if taken.prompt.key in self._suspects:
                    self._alone.append(taken)
                else:
                    yield taken

    def _known_to_the_ledger(self, keys: Sequence[Key]) -> tuple[set[Key], set[Key]]:
        """Return which of these keys have no result yet, and which of those this invocation wants.

        Rows that are not in the table now, as under --limit, may come back.
        """
        at = self._ledger.positions_of([key.row_id for key in keys]) if keys else {}
        state = self._ledger.state
        here = {
            key: (at[key.row_id], key.sample - 1) for key in keys if key.row_id in at and key.sample <= state.samples
        }
        finished = {key for key, place in here.items() if state.status[place] != TODO}
        return set(keys) - finished, {key for key in here if key not in finished and self._todo[here[key]]}

    def _take(self, row: Row, sample: int, fitted: Fitted) -> _Taken:
        attempt = int(self._ledger.state.attempt[row.position, sample - 1]) + 1
        seed = row_seed(self._seed, row.row_id, sample, attempt)
        prompt = Prompt(Key(row.row_id, sample), fitted.messages, fitted.encoded, seed, self._max_new_tokens)
        return _Taken(row, attempt, prompt, fitted)

    def _reject(self, row: Row, samples: Sequence[int], error: RowError) -> None:
        """Book samples of a row that is not to be generated as failed."""
        now = int(time.time() * 1000)
        for sample in samples:
            taken = self._take(row, sample, _NO_PROMPT)
            completion = Completion(
                taken.prompt.key, "", "error", error.what, None, 0, 0.0, None, 0.0, 0.0, 0.0, now, now
            )
            self._ledger.add(row.position, self._result(taken, completion, error.what))
            self.rejected += 1

    def _result(self, taken: _Taken, completion: Completion, error: str | None) -> Result:
        row, prompt = taken.row, taken.prompt
        status: Status = "ok" if error is None else "failed"
        generated = completion.rows_in_batch > 0
        seconds, tokens = completion.seconds_generating, completion.new_tokens
        return Result(
            row_id=row.row_id,
            sample=prompt.key.sample,
            content_hash=row.content_hash,
            status=status,
            text=completion.text if error is None else None,
            finish_reason=completion.finish_reason if error is None else "error",
            error=error,
            flags=list(taken.fitted.flags),
            prompt_tokens=completion.prompt_tokens,
            new_tokens=tokens,
            max_new_tokens=prompt.max_new_tokens,
            seed=prompt.row_seed,
            attempt=taken.attempt,
            seconds_queued=completion.seconds_queued if generated else None,
            seconds_to_first_token=completion.seconds_to_first_token,
            seconds_generating=seconds if generated else None,
            seconds_share=completion.seconds_share if generated else None,
            tokens_per_second=tokens / seconds if seconds > 0 and tokens is not None else None,
            rows_in_batch=completion.rows_in_batch if generated else None,
            started_at=completion.started_at_ms,
            finished_at=completion.finished_at_ms,
            template=row.template,
            prompt_sha256=taken.fitted.sha256 or None,
        )
