"""Turns rows that are still to do into prompts, and what comes back into results.

Rows that cannot become a prompt are booked as failed with their reason and never reach the engine.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gxr_batch.engines.base import Encoder
from gxr_batch.errors import RowError
from gxr_batch.job import Job
from gxr_batch.ledger import RunWriter
from gxr_batch.ledger.state import Bools
from gxr_batch.plan import longest_first, row_seed
from gxr_batch.prepare import Prepared
from gxr_batch.prompts import render, row_template
from gxr_batch.records import Completion, Encoded, Key, Messages, Prompt, Result, Row, Status
from gxr_batch.rows import read_rows


class _Taken(NamedTuple):
    """What a result needs of a prompt that an engine holds."""

    row: Row
    attempt: int
    prompt: Prompt
    prompt_sha256: str


class Feed:
    """The rows of one invocation on their way to the engine and back."""

    def __init__(self, prepared: Prepared, job: Job, encoder: Encoder, ledger: RunWriter, todo: Bools) -> None:
        self._prepared, self._job, self._encoder, self._ledger, self._todo = (
            prepared,
            job,
            encoder,
            ledger,
            todo,
        )
        self._seed = int(job.sampling.seed)
        self._max_new_tokens = job.sampling.settings().max_new_tokens
        self._in_flight: dict[Key, _Taken] = {}
        self.rejected = 0
        self.seconds = 0.0

    @property
    def in_flight(self) -> int:
        """How many prompts the engine took and has not returned."""
        return len(self._in_flight)

    def prompts(self) -> Iterator[Prompt]:
        """Yield the prompts, longest first within each window of input order."""
        ordered = longest_first(
            self._encoded(), self._job.engine.window, lambda taken: taken.prompt.encoded.length or 0
        )
        while True:
            began = time.perf_counter()
            taken = next(ordered, None)
            self.seconds += time.perf_counter() - began
            if taken is None:
                return
            self._in_flight[taken.prompt.key] = taken
            yield taken.prompt

    def settle(self, completion: Completion) -> tuple[int, Result]:
        """Return the row's position and the result that a completion makes of it."""
        taken = self._in_flight.pop(completion.key)
        error = completion.error
        if error is None and not completion.text.strip():
            error = "the model returned empty text"
        return taken.row.position, self._result(taken, completion, error)

    def _encoded(self) -> Iterator[_Taken]:
        wanted: Bools = np.any(self._todo, axis=1)
        system = self._job.prompt.system
        for row in read_rows(self._ledger.folder / "input.parquet", self._prepared.fields, wanted):
            try:
                messages = render(row_template(self._prepared.templates, row.template), row.values, system=system)
                encoded = self._encode(messages)
            except RowError as error:
                self._reject(row, error)
                continue
            digest = _messages_sha256(messages)
            for sample in np.flatnonzero(self._todo[row.position]) + 1:
                yield self._take(row, int(sample), messages, encoded, digest)

    def _encode(self, messages: Messages) -> Encoded:
        encoded = self._encoder.encode(messages)
        room = self._job.model.max_seq_length - self._max_new_tokens
        if encoded.length is not None and encoded.length > room:
            raise RowError(
                f"the prompt is too long: {encoded.length} tokens, and model.max_seq_length - sampling.max_new_tokens "
                f"leaves room for {room}"
            )
        return encoded

    def _take(self, row: Row, sample: int, messages: Messages, encoded: Encoded, digest: str) -> _Taken:
        attempt = int(self._ledger.state.attempt[row.position, sample - 1]) + 1
        seed = row_seed(self._seed, row.row_id, sample, attempt)
        key = Key(row.row_id, sample)
        return _Taken(row, attempt, Prompt(key, messages, encoded, seed, self._max_new_tokens), digest)

    def _reject(self, row: Row, error: RowError) -> None:
        """Book every wanted sample of a row that cannot be generated as failed."""
        now = int(time.time() * 1000)
        for sample in np.flatnonzero(self._todo[row.position]) + 1:
            taken = self._take(row, int(sample), Messages((), row.template), Encoded(None, None), "")
            completion = Completion(
                taken.prompt.key, "", "error", error.what, None, 0, 0.0, None, 0.0, 0.0, 0.0, now, now
            )
            self._ledger.add(row.position, self._result(taken, completion, error.what))
            self.rejected += 1

    def _result(self, taken: _Taken, completion: Completion, error: str | None) -> Result:
        row, prompt = taken.row, taken.prompt
        status: Status = "ok" if error is None else "failed"
        generated = completion.rows_in_batch > 0
        seconds = completion.seconds_generating
        return Result(
            row_id=row.row_id,
            sample=prompt.key.sample,
            content_hash=row.content_hash,
            status=status,
            text=completion.text if error is None else None,
            finish_reason=completion.finish_reason if error is None else "error",
            error=error,
            flags=[],
            prompt_tokens=completion.prompt_tokens,
            new_tokens=completion.new_tokens,
            max_new_tokens=prompt.max_new_tokens,
            seed=prompt.row_seed,
            attempt=taken.attempt,
            seconds_queued=completion.seconds_queued if generated else None,
            seconds_to_first_token=completion.seconds_to_first_token,
            seconds_generating=seconds if generated else None,
            seconds_share=completion.seconds_share if generated else None,
            tokens_per_second=completion.new_tokens / seconds if seconds > 0 else None,
            rows_in_batch=completion.rows_in_batch if generated else None,
            started_at=completion.started_at_ms,
            finished_at=completion.finished_at_ms,
            template=row.template,
            prompt_sha256=taken.prompt_sha256 or None,
        )


def _messages_sha256(messages: Messages) -> str:
    return hashlib.sha256(json.dumps(messages.turns, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()
