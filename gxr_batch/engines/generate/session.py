"""An opened generate engine: takes prompts a batch at a time, watches the worker thread, recovers from errors.

`generate` blocks for a whole batch, so it runs in a thread, while the stream yields rows as they end, gives a heartbeat
twice a second and obeys the stop request. A batch that fails is halved until the row at fault is alone in it and fails.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version

import torch
from transformers import PreTrainedTokenizerBase

from gxr_batch.engines.base import EngineInfo, Identity, Pulse, StopRequest
from gxr_batch.engines.generate.padded_batch import Batch, RowState
from gxr_batch.errors import EngineFailed, OutOfDeviceMemory
from gxr_batch.job import Job
from gxr_batch.models.device_memory import MemoryBudget
from gxr_batch.models.form_tokens import form_tokens
from gxr_batch.models.load_weights import LoadedModel, load_model
from gxr_batch.models.memory_estimate import row_bytes, rows_that_fit
from gxr_batch.records import Completion, Prompt

_PULSE_SECONDS = 0.5
_LOOK_SECONDS = 0.05
_CPU_SLOTS = 16
_MOST_SLOTS = 64
# How long a stream waits for memory that other processes took during the run; finished rows are safe by then.
_PATIENCE_SECONDS = 120.0
_CALM_BATCHES = 4  # batches without trouble before larger ones are tried again
_OVERFLOW = "the model's numbers overflowed on this row: its logits were NaN or infinite"


@contextmanager
def open_session(
    job: Job, identity: Identity, tokenizer: PreTrainedTokenizerBase, memory: MemoryBudget
) -> Iterator[GenerateSession]:
    """Load the model within this run's memory limit, with torch on the job's threads; release both afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(job.engine.threads or threads)
    session = None
    try:
        session = GenerateSession(job, identity, tokenizer, load_model(job.model, tokenizer, memory), memory)
        yield session
    finally:
        if session is not None:
            session.close()
        torch.set_num_threads(threads)


class GenerateSession:
    """The loaded model and its worker thread."""

    def __init__(
        self,
        job: Job,
        identity: Identity,
        tokenizer: PreTrainedTokenizerBase,
        loaded: LoadedModel,
        memory: MemoryBudget,
    ) -> None:
        self._sampling = job.sampling.settings()
        self._max_seq_length = job.model.max_seq_length
        self._tokenizer = tokenizer
        self._loaded = loaded
        self._form = form_tokens(job, tokenizer, loaded.end_ids, loaded.config.vocab_size)
        slots = self._auto_slots(memory) if job.engine.slots == "auto" else job.engine.slots
        self.info = EngineInfo(
            identity=identity,
            device=loaded.device,
            dtype=loaded.placement.dtype,
            quantization=loaded.quantization,
            slots=slots,
            load_seconds=loaded.load_seconds,
            # With one row at a time, no other row can change its last bits.
            reproducible=slots == 1,
            versions={name: version(name) for name in ("torch", "transformers")},
            notices=loaded.placement.notices,
            adapter=loaded.adapter,
        )
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="gxr-batch-generate")
        self._running: Batch | None = None
        self._batch_size = slots
        self._good_batches = 0
        self._gave_up = False
        self._counts = _Counts()

    def close(self) -> None:
        """Wait for the worker's current step and release the model."""
        if self._running is not None:
            self._running.abandoned.set()
        self._worker.shutdown()

    def stream(self, prompts: Iterator[Prompt], stop: StopRequest) -> Iterator[Completion | Pulse]:
        """Generate for every prompt, a batch at a time.

        `on_text` of a prompt gets the whole answer at its end: `generate` shows no text before. Raises EngineFailed if
        the device cannot continue.
        """
        counts = self._counts
        while True:
            rows: list[RowState] = []
            looked = time.monotonic()
            while len(rows) < self._batch_size and stop.admitting and (prompt := next(prompts, None)) is not None:
                row = RowState(prompt=prompt, token_ids=prompt.encoded.token_ids or [], taken_at=time.monotonic())
                if refusal := self._refusal(row):
                    yield _failed(row, refusal)
                else:
                    rows.append(row)
                if time.monotonic() - looked > _PULSE_SECONDS:  # encoding a window of prompts may take a while
                    looked = time.monotonic()
                    yield counts.pulse(len(rows), self._memory())
            if not rows:
                return
            splits = counts.splits
            yield from self._run(rows, stop, counts)
            self._grow_back(counts.splits == splits)
            if stop.must_return(time.monotonic()):
                return

    def _grow_back(self, went_well: bool) -> None:
        """Try larger batches again after some that fit in memory."""
        self._good_batches = self._good_batches + 1 if went_well else 0
        if self._good_batches >= _CALM_BATCHES and self._batch_size < self.info.slots:
            self._good_batches, self._batch_size = 0, min(2 * self._batch_size, self.info.slots)

    def _run(self, rows: list[RowState], stop: StopRequest, counts: _Counts) -> Iterator[Completion | Pulse]:
        """Generate for some rows, in as many batches as necessary."""
        groups = [rows]
        short_since = float("inf")
        while groups and not stop.must_return(time.monotonic()):
            batch = Batch(groups.pop(), stop, self._form)
            waiting = sum(map(len, groups))
            yield from self._watch(batch, stop, counts, waiting)
            left = batch.unfinished
            if batch.broke is None or not left:
                continue
            if issubclass(batch.broke, torch.AcceleratorError):
                raise EngineFailed(
                    "The device reported an error and cannot compute any more.",
                    where=self.info.device,
                    next_step="run the same command again; if it happens again, restart the machine",
                )
            no_memory = batch.no_memory
            if len(left) == 1 and no_memory:
                short_since = min(short_since, time.monotonic())
                if time.monotonic() - short_since >= _PATIENCE_SECONDS:
                    yield self._give_up_on(left[0])
                    short_since = float("inf")
                else:
                    time.sleep(_PULSE_SECONDS)
                    yield self._counts.pulse(1, self._memory())
                    groups.append(left)
                continue
            self._gave_up = False
            short_since = float("inf")
            if len(left) == 1:
                yield _failed(left[0], f"the model could not process this row ({batch.broke.__name__})")
                continue
            self._counts.splits += 1
            yield self._counts.pulse(len(left) + waiting, self._memory())  # the rest may end before the next one
            half = (len(left) + 1) // 2
            if no_memory:
                self._batch_size = min(self._batch_size, half)
                torch.cuda.empty_cache()
            groups += [left[half:], left[:half]]

    def _give_up_on(self, row: RowState) -> Completion:
        """Fail a row for lack of memory. If the one before failed too, no row is at fault: raises OutOfDeviceMemory."""
        if self._gave_up:
            raise OutOfDeviceMemory(
                f"The device had no free memory for {_PATIENCE_SECONDS:,.0f} s, not even for one row.",
                where="engine.slots, engine.memory_limit",
                next_step="free memory, then run the same command again",
            )
        self._gave_up = True
        return _failed(row, "the device had no memory for a prompt of this length")

    def _watch(self, batch: Batch, stop: StopRequest, counts: _Counts, waiting: int) -> Iterator[Completion | Pulse]:
        """Pass on the rows of a running batch as they end, until it ends or must be abandoned."""
        self._running = batch
        future: Future[None] = self._worker.submit(batch.run, self._loaded, self._sampling)
        said = time.monotonic()
        before = counts.tokens
        try:
            while True:
                over = future.done()  # checked first, so that what a batch passes on at its very end is not missed
                counts.tokens = before + batch.tokens
                while (row := _next(batch, 0 if over else _LOOK_SECONDS)) is not None:
                    yield self._completed(row)
                    said = time.monotonic()
                now = time.monotonic()
                if over or stop.must_return(now):
                    break
                if now - said >= _PULSE_SECONDS:
                    said = now
                    yield counts.pulse(len(batch.unfinished) + waiting, self._memory())
        finally:
            batch.abandoned.set()  # also if the consumer of the stream went away
        if over:
            future.result()  # nothing should be raised here; anything that is, is a bug and surfaces

    def _refusal(self, row: RowState) -> str | None:
        count, longest = len(row.token_ids), self._max_seq_length - row.prompt.max_new_tokens
        if count > longest:
            return (
                f"the prompt is too long: {count} tokens, and model.max_seq_length - sampling.max_new_tokens "
                f"leaves room for {longest}"
            )
        if self._form and row.prompt.max_new_tokens < self._form.least_tokens:
            return f"the form needs at least {self._form.least_tokens} tokens"
        return None if count else "the prompt has no tokens"

    def _completed(self, row: RowState) -> Completion:
        if row.end == "overflow":
            return _failed(row, _OVERFLOW)
        answer = row.new_ids[:-1] if row.new_ids[-1] in self._loaded.end_ids else row.new_ids
        text = str(self._tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        text = text.rstrip() if row.form else text
        if row.prompt.on_text is not None and text:
            row.prompt.on_text(text)
        generating = row.ended_at - row.began_at
        return Completion(
            key=row.prompt.key,
            text=text,
            finish_reason=row.end or "length",
            error=None,
            prompt_tokens=len(row.token_ids),
            new_tokens=len(row.new_ids),
            seconds_queued=row.began_at - row.taken_at,
            seconds_to_first_token=row.first_token_at - row.began_at,
            seconds_generating=generating,
            seconds_share=row.share,
            rows_in_batch=row.rows_in_steps / row.steps,
            started_at_ms=row.began_at_ms,
            finished_at_ms=row.began_at_ms + round(generating * 1000),
            cut_sections=row.form.cut if row.form else (),
        )

    def _memory(self) -> int:
        return torch.cuda.memory_allocated(self._loaded.model.device) if self.info.device.startswith("cuda") else 0

    def _auto_slots(self, memory: MemoryBudget) -> int:
        place = self._loaded.model.device
        if place.type != "cuda" and memory.size_limit is None:
            return _CPU_SLOTS
        device = memory.at(place)
        element = 4 if self._loaded.placement.dtype == "float32" else 2
        most = _MOST_SLOTS if place.type == "cuda" else _CPU_SLOTS
        budget = memory.size_limit if device.name == "cpu" and memory.size_limit else memory.free(device)
        return rows_that_fit(row_bytes(self._loaded.config, self._max_seq_length, element, windowed=True), budget, most)


class _Counts:
    """What pulses count since the session was opened."""

    def __init__(self) -> None:
        self.tokens = 0
        self.splits = 0

    def pulse(self, rows: int, memory: int) -> Pulse:
        return Pulse(self.tokens, rows, memory, self.splits)


def _next(batch: Batch, timeout: float) -> RowState | None:
    try:
        return batch.ended.get(timeout=timeout) if timeout else batch.ended.get_nowait()
    except queue.Empty:
        return None


def _failed(row: RowState, error: str) -> Completion:
    """Return the completion of a failed row. Its times are those of its last attempt, if it had one."""
    started = bool(row.began_at)
    now, now_ms = time.monotonic(), int(time.time() * 1000)
    return Completion(
        key=row.prompt.key,
        text="",
        finish_reason="error",
        error=error,
        prompt_tokens=len(row.token_ids),
        new_tokens=0,
        seconds_queued=row.began_at - row.taken_at if started else 0.0,
        seconds_to_first_token=None,
        seconds_generating=(row.ended_at or now) - row.began_at if started else 0.0,
        seconds_share=row.share,
        rows_in_batch=row.rows_in_steps / row.steps if row.steps else 1.0 if started else 0.0,
        started_at_ms=row.began_at_ms if started else now_ms,
        finished_at_ms=now_ms,
    )
