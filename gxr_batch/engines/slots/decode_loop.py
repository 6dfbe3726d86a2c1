"""Admit, prefill, decode, sample, retire: the engine's loop over a backend.

Rows never wait for each other: each leaves when it ends and its slot is refilled. A row's text depends only on its
prompt, its seed, the model and the sampling.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gxr_batch.engines.base import EngineInfo, Pulse, StopRequest
from gxr_batch.engines.slots.backend import PREFIX_SLOTS, Backend
from gxr_batch.engines.slots.decoding_row import RowState, charge, completion
from gxr_batch.engines.slots.oom_retry import NoMemory, Splitter
from gxr_batch.engines.slots.slot_schedule import SlotPlan
from gxr_batch.engines.slots.token_sampling import Chooser
from gxr_batch.errors import OutOfRoom
from gxr_batch.job.sampling import Sampling
from gxr_batch.records import Completion, Prompt

_PULSE_SECONDS = 0.5
# How long a stream waits for memory that other processes took during the run; finished rows are safe by then.
_PATIENCE_SECONDS = 120.0
# Rows prefilled in one call: enough to fill a call of the kernels, few enough that decoding rows wait briefly.
_PREFILL_ROWS = 8
# A shared prefix shorter than this is recomputed faster than it is copied.
_LEAST_PREFIX = 16


@dataclass
class _Work:
    """The state of one stream: rows that decode, rows that wait for their prefill, since when memory has been short."""

    plan: SlotPlan
    rows: list[RowState] = field(default_factory=list)
    admitted: list[RowState] = field(default_factory=list)
    exhausted: bool = False
    short_since: float = float("inf")


class TransformersSession:
    """A loaded model that decodes rows side by side. Implements the protocol's Session."""

    def __init__(
        self, info: EngineInfo, backend: Backend, tokenizer: Any, end_ids: frozenset[int], sampling: Sampling
    ) -> None:
        self.info = info
        self._backend, self._tokenizer, self._end_ids = backend, tokenizer, end_ids
        self._prefixes: dict[tuple[int, ...], int] = {}
        self._splitter = Splitter(info.slots, backend.least_rows, backend.vocab, backend.device)
        self._prefills = Splitter(_PREFILL_ROWS, 1, backend.vocab, backend.device)
        self._chooser = Chooser(backend, sampling, self._splitter)
        self._gave_up = False
        self._tokens = 0

    @property
    def splits(self) -> int:
        """How often a call had to be made smaller for lack of memory."""
        return self._splitter.splits + self._prefills.splits

    def stream(self, prompts: Iterator[Prompt], stop: StopRequest) -> Iterator[Completion | Pulse]:
        """Generate for every prompt, each in a separate slot, until there are no more or `stop` ends the stream."""
        work = _Work(SlotPlan.of(self.info.slots))
        pulsed, splits = time.monotonic(), self.splits
        while True:
            if not work.admitted and not work.exhausted and stop.admitting:
                self._admit(prompts, work)
            ended = self._step(work, stop)
            if stop.must_return(time.monotonic()):
                return
            if work.exhausted or not stop.admitting:
                self._shrink(work.rows + work.admitted, work.plan)
            for row in ended:
                pulsed = time.monotonic()
                yield completion(row, self._text(row))
            if time.monotonic() - pulsed >= _PULSE_SECONDS or splits != self.splits:
                pulsed, splits = time.monotonic(), self.splits
                yield Pulse(self._tokens, len(work.rows), memory_in_use(self._backend.device), splits)
            if not work.rows and not work.admitted and (work.exhausted or not stop.admitting):
                return

    def _step(self, work: _Work, stop: StopRequest) -> list[RowState]:
        """Prefill the admitted rows and decode one token of every row; return the rows that ended."""
        ended = [row for row in work.admitted if row.finish]
        work.admitted = [row for row in work.admitted if not row.finish]
        for row in ended:
            if row.slot >= 0:
                work.plan.release(row.slot)
        try:
            if work.admitted and self._prefilled(work.admitted, work.rows):
                work.rows, work.admitted, self._gave_up = work.rows + work.admitted, [], False
            ended += self._retire(work.rows, work.plan)
            if not ended and work.rows and not stop.must_return(time.monotonic()):
                self._decode(work.rows)
                ended += self._retire(work.rows, work.plan)
            work.short_since = float("inf")
        except NoMemory:
            work.short_since = min(work.short_since, time.monotonic())
            if time.monotonic() - work.short_since < _PATIENCE_SECONDS:
                time.sleep(_PULSE_SECONDS)
            else:
                self._give_up_on(work.admitted if not work.rows else [])
                work.short_since = float("inf")
        return ended

    def _give_up_on(self, admitted: Sequence[RowState]) -> None:
        """Fail the longest new row for lack of memory; if the one before failed too, no row is at fault.

        Raises OutOfRoom.
        """
        if not admitted or self._gave_up:
            raise OutOfRoom(
                f"The device had no free memory for {_PATIENCE_SECONDS:,.0f} s, not even for a few rows.",
                where="engine.slots, engine.memory_limit",
                next_step="free memory or lower engine.slots, then run the same command again",
            )
        self._gave_up = True
        row = max(admitted, key=lambda row: row.prompt.encoded.length or 0)
        row.finish, row.error = "error", "the device had no memory for a prompt of this length"

    def _admit(self, prompts: Iterator[Prompt], work: _Work) -> None:
        """Take as many prompts as there are slots to fill now; those that the model cannot process end at once."""
        for _ in range(min(work.plan.to_admit(), _PREFILL_ROWS)):
            prompt = next(prompts, None)
            if prompt is None:
                work.exhausted = True
                return
            row = RowState(prompt, time.monotonic())
            work.admitted.append(row)
            if error := self._refusal(prompt):
                row.finish, row.error = "error", error
            else:
                row.slot = work.plan.take()

    def _refusal(self, prompt: Prompt) -> str:
        """Return why the model cannot process a prompt, empty if it can."""
        ids = prompt.encoded.token_ids
        if not ids:
            return "no prompt"
        if len(ids) + prompt.max_new_tokens > self._backend.capacity:
            return f"prompt and answer need more than {self._backend.capacity} tokens"
        if max(ids) >= self._backend.vocab:
            return "the prompt holds a token that the model does not have: its tokenizer belongs to another model"
        return ""

    def _prefilled(self, admitted: Sequence[RowState], rows: Sequence[RowState]) -> bool:
        """Prefill new rows; return False if there is no memory for it now but the other rows can still decode."""
        try:
            self._prefill(admitted, len(rows))
        except NoMemory:
            if not rows:
                raise
            return False
        return True

    def _prefill(self, rows: Sequence[RowState], decoding: int) -> None:
        """Run the prompts of new rows through the model and draw their first tokens."""
        if not rows:
            return
        began, now_ms = time.monotonic(), int(time.time() * 1000)
        calls = []
        for row in rows:
            ids = row.prompt.encoded.token_ids or []
            row.started_at, row.started_at_ms = began, now_ms
            calls.append((row.slot, *self._after_prefix(row, ids)))
            self._chooser.seen.start(row.slot, ids)
        logits, faults = self._prefills.run(calls, self._backend.prefill)
        ended = self._sample(rows, logits, faults)
        charge(rows, ended - began, len(rows) + decoding)

    def _after_prefix(self, row: RowState, ids: list[int]) -> tuple[list[int], int]:
        """Copy the template's shared prefix into the row's slot; return the remaining ids and where they start."""
        length = min(row.prompt.encoded.shared_tokens, len(ids) - 1)
        if length < _LEAST_PREFIX:
            return ids, 0
        prefix = tuple(ids[:length])
        if prefix not in self._prefixes:
            # If all prefix slots are taken, make the same two calls in the row's own slot: its bits must not depend on
            # which templates came first.
            full = len(self._prefixes) == PREFIX_SLOTS
            slot = row.slot if full else self._backend.slots + len(self._prefixes)
            _, faults = self._prefills.run([(slot, prefix, 0)], self._backend.prefill)
            if faults:  # a half-written prefix must not be copied into any row
                self._backend.clear(slot)
                return ids, 0
            if full:
                return ids[length:], length
            self._prefixes[prefix] = slot
        self._backend.copy(self._prefixes[prefix], row.slot, length)
        return ids[length:], length

    def _decode(self, rows: Sequence[RowState]) -> None:
        """Feed each row's newest token and draw its next one."""
        began = time.monotonic()
        rows = sorted(rows, key=lambda row: row.slot)  # adjacent rows of the cache are computed in one piece
        inputs = [(row.slot, row.ids[-1], row.position) for row in rows]
        logits, faults = self._splitter.run(inputs, self._decode_call)
        charge(rows, self._sample(rows, logits, faults) - began, len(rows))

    def _decode_call(self, inputs: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        slots, ids, positions = zip(*inputs, strict=True)
        return self._backend.decode(slots, ids, positions)

    def _sample(self, rows: Sequence[RowState], logits: torch.Tensor, faults: Mapping[int, str]) -> float:
        """Draw one token per row and return the time; a row whose logits are not finite fails alone."""
        tokens, finite = self._chooser.choose(rows, logits)
        now = time.monotonic()
        for index, (row, token, good) in enumerate(zip(rows, tokens, finite, strict=True)):
            if good:
                row.first_token_at = row.first_token_at or now
                self._take(row, token)
            else:
                row.finish, row.error = "error", faults.get(index, "the model's logits are not finite numbers")
                self._backend.clear(row.slot)
            row.ended_at = now
        return now

    def _take(self, row: RowState, token: int) -> None:
        row.ids.append(token)
        self._tokens += 1
        if token in self._end_ids:
            row.finish = "stop"
        elif len(row.ids) == row.prompt.max_new_tokens:
            row.finish = "length"
        if row.prompt.on_text is not None:
            self._show(row)

    def _show(self, row: RowState) -> None:
        """Pass new text to the reader; an incomplete character waits for the rest."""
        text = self._text(row)
        if row.prompt.on_text is not None and not text.endswith("\ufffd") and len(text) > len(row.shown):
            row.prompt.on_text(text[len(row.shown) :])
            row.shown = text

    def _retire(self, rows: list[RowState], plan: SlotPlan) -> list[RowState]:
        """Remove rows that ended from their slots and return them."""
        ended = [row for row in rows if row.finish]
        for row in ended:
            plan.release(row.slot)
            rows.remove(row)
        return ended

    def _shrink(self, rows: Sequence[RowState], plan: SlotPlan) -> None:
        """Move the last rows closer together, so that a step computes only as many slots as their bucket."""
        by_slot = {row.slot: row for row in rows}
        for source, target in plan.moves():
            row = by_slot[source]
            self._backend.copy(source, target, row.position)
            self._chooser.seen.move(source, target)
            row.slot = target

    def _text(self, row: RowState) -> str:
        ids = row.ids[:-1] if row.finish == "stop" else row.ids
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def memory_in_use(device: torch.device) -> int:
    """Return the bytes that torch holds on a GPU, 0 on any other device."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
