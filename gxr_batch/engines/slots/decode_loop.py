"""Admit, prefill, decode, retire: the engine's loop over `Steps`.

Rows never wait for each other: each leaves when it ends and its slot is refilled. A row's text depends only on its
prompt, its seed, the model and the sampling.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from gxr_batch.engines.base import EngineInfo, Pulse, StopRequest
from gxr_batch.engines.slots.decoding_row import RowState, completion
from gxr_batch.engines.slots.oom_retry import NoMemory
from gxr_batch.engines.slots.row_steps import KernelsFailed, Steps
from gxr_batch.engines.slots.slot_schedule import SlotPlan
from gxr_batch.errors import OutOfDeviceMemory
from gxr_batch.models.form_tokens import FormTokens
from gxr_batch.records import Completion, Prompt

_PULSE_SECONDS = 0.5
# How long a stream waits for memory that other processes took during the run; finished rows are safe by then.
_PATIENCE_SECONDS = 120.0


@dataclass
class _Work:
    """The state of one stream: rows that decode, rows that wait for their prefill, since when memory has been short."""

    plan: SlotPlan
    rows: list[RowState] = field(default_factory=list)
    admitted: list[RowState] = field(default_factory=list)
    waiting: list[RowState] = field(default_factory=list)  # taken, but without memory, steps or a turn so far
    exhausted: bool = False
    filling: bool = True  # until the slots are full for the first time: few rows decode, and they may wait
    refilling: bool = False  # the last admission was cut short
    short_since: float = float("inf")


class TransformersSession:
    """A loaded model that decodes rows side by side. Implements the protocol's Session."""

    def __init__(
        self,
        info: EngineInfo,
        steps: Steps,
        tokenizer: Any,
        end_ids: frozenset[int],
        fallback: Callable[[str], tuple[Steps, int, str]] | None = None,
        *,
        grow: Callable[[], tuple[int, list[str]]] | None = None,
        form: FormTokens | None = None,
    ) -> None:
        """`form` is what every answer must have.

        `fallback` gets why the steps failed, closes them, and returns others, their slots, and their name. `grow`
        enlarges the steps if it can and returns how many slots they have, and notices.
        """
        self.info = info
        self._fallback, self._grow, self._form = fallback, grow, form
        self._notices: list[str] = []
        self._splits_before = 0
        self._steps, self._tokenizer, self._end_ids = steps, tokenizer, end_ids
        self._gave_up = False
        self._tokens = 0

    def close(self) -> None:
        """Release the memory of the steps and of the model."""
        self._steps.close()
        self._fallback = self._grow = None

    @property
    def splits(self) -> int:
        """How often a call had to be made smaller for lack of memory."""
        return self._splits_before + self._steps.splits

    def stream(self, prompts: Iterator[Prompt], stop: StopRequest) -> Iterator[Completion | Pulse]:
        """Generate for every prompt, each in a separate slot, until there are no more or `stop` ends the stream."""
        work = _Work(SlotPlan.of(self.info.slots, self._steps.most_new))
        try:
            yield from self._stream(prompts, stop, work)
        finally:
            for row in work.rows + work.admitted:  # the stream was stopped
                row.finish = row.finish or "error"  # a token that is still on its way reaches nobody
                self._steps.release(row)

    def _stream(self, prompts: Iterator[Prompt], stop: StopRequest, work: _Work) -> Iterator[Completion | Pulse]:
        pulsed, splits = time.monotonic(), self.splits
        while True:
            if not work.admitted and (work.waiting or not work.exhausted) and stop.admitting:
                self._admit(prompts, work)
            ended = self._step(work, stop)
            if stop.must_return(time.monotonic()):
                return
            if (work.exhausted and not work.waiting) or not stop.admitting:
                self._shrink(work.rows + work.admitted, work.plan)
            for row in ended:
                pulsed = time.monotonic()
                yield completion(row, self._text(row))
            if time.monotonic() - pulsed >= _PULSE_SECONDS or splits != self.splits or self._notices:
                pulsed, splits = time.monotonic(), self.splits
                notices, self._notices = tuple(self._notices), []
                yield Pulse(self._tokens, len(work.rows), memory_in_use(self._steps.device), splits, notices=notices)
            if not work.rows and not work.admitted and ((work.exhausted and not work.waiting) or not stop.admitting):
                return

    def _step(self, work: _Work, stop: StopRequest) -> list[RowState]:
        """Prefill the admitted rows and decode one token of every row; return the rows that ended."""
        failed = ""
        ended = [row for row in work.admitted if row.finish]
        work.admitted = [row for row in work.admitted if not row.finish]
        for row in ended:
            if row.slot >= 0:
                self._steps.release(row)
                work.plan.release(row.slot)
        try:
            if not work.filling and (work.waiting or not work.exhausted) and stop.admitting:
                self._enlarge(work)
            if work.admitted and self._prefilled(work.admitted, work.rows):
                work.rows, work.admitted, self._gave_up = work.rows + work.admitted, [], False
                self._take_drawn()
            # Steps that run ahead are not asked before each decode: they would wait for the one on the device.
            ended += self._retire(work.rows, work.plan)
            if work.rows and (self._steps.runs_ahead or not ended) and not stop.must_return(time.monotonic()):
                self._steps.decode(work.rows)
                self._take_drawn()
                ended += self._retire(work.rows, work.plan)
            work.short_since = float("inf")
        except KernelsFailed as error:
            failed = str(error)
        except NoMemory:
            work.short_since = min(work.short_since, time.monotonic())
            if time.monotonic() - work.short_since < _PATIENCE_SECONDS:
                time.sleep(_PULSE_SECONDS)
            else:
                self._give_up_on(work.admitted if not work.rows else [])
                work.short_since = float("inf")
        if failed:  # outside the handler, so that the error no longer keeps the memory of the failed steps
            ended += self._fall_back(work, failed)
        return ended

    def _fall_back(self, work: _Work, why: str) -> list[RowState]:
        """Let all rows continue with other steps, which compute their prompts and answers so far; return ended ones.

        Raises KernelsFailed without other steps.
        """
        if self._fallback is None:
            raise KernelsFailed(why)
        rows, work.rows, work.admitted = work.rows + work.admitted, [], []
        ended = [row for row in rows if row.finish]
        going = [row for row in rows if not row.finish]
        for row in going:
            row.slot = -1
        work.waiting = going + work.waiting
        self._splits_before += self._steps.splits
        fallback, self._fallback, self._grow = self._fallback, None, None
        self._steps, slots, name = fallback(why)
        versions = {**self.info.versions, "forward": name}
        self.info = replace(self.info, slots=slots, reproducible=False, versions=versions)
        self._notices.append(
            f"The run continues with the forward pass of transformers instead of our GPU kernels, more slowly: {why}."
        )
        work.plan = SlotPlan.of(slots, self._steps.most_new)
        return ended

    def _enlarge(self, work: _Work) -> None:
        """Continue with more slots if the steps have become larger."""
        if self._grow is None:
            return
        slots, notices = self._grow()
        self._notices += notices
        if slots > work.plan.slots:
            self._notices.append(f"The GPU has more free memory: {slots} slots instead of {work.plan.slots}.")
            self.info = replace(self.info, slots=slots)
            work.plan = replace(SlotPlan.of(slots, self._steps.most_new), taken=work.plan.taken)

    def _give_up_on(self, admitted: Sequence[RowState]) -> None:
        """Fail the longest new row for lack of memory; if the one before failed too, no row is at fault.

        Raises OutOfDeviceMemory.
        """
        if not admitted or self._gave_up:
            raise OutOfDeviceMemory(
                f"The device had no free memory for {_PATIENCE_SECONDS:,.0f} s, not even for a few rows.",
                where="engine.slots, engine.memory_limit",
                next_step="free memory or lower engine.slots, then run the same command again",
            )
        self._gave_up = True
        row = max(admitted, key=lambda row: row.prompt.encoded.length or 0)
        row.finish, row.error = "error", "the device had no memory for a prompt of this length"

    def _admit(self, prompts: Iterator[Prompt], work: _Work) -> None:
        """Take as many prompts as there are slots to fill now; those that the model cannot process end at once.

        After the first fill, rows that decode wait for no more tokens at a time than a chunk, or for one longer prompt.
        """
        left = float("inf") if work.filling or not work.rows else self._steps.chunk
        count = work.plan.free if work.refilling else work.plan.to_admit()
        work.refilling = False
        for _ in range(min(count, self._steps.most_new)):
            row = work.waiting.pop(0) if work.waiting else self._next(prompts)
            if row is None:
                work.exhausted = True
                return
            if error := self._refusal(row):
                row.finish, row.error = "error", error
            else:
                tokens = len(row.known_ids)
                work.refilling = tokens > left and bool(work.admitted)
                row.slot = -1 if work.refilling else work.plan.take()
                if work.refilling or not self._reserved(row, work):
                    work.waiting.insert(0, row)
                    return
                left -= tokens
            work.admitted.append(row)
        work.filling &= work.plan.free >= work.plan.refill

    def _reserved(self, row: RowState, work: _Work) -> bool:
        """Reserve the row's memory; if there is none now, release its slot and return False."""
        if self._steps.reserve(row):
            return True
        work.plan.release(row.slot)
        row.slot, work.filling = -1, False
        return False

    def _next(self, prompts: Iterator[Prompt]) -> RowState | None:
        prompt = next(prompts, None)
        if prompt is None:
            return None
        row = RowState(prompt, time.monotonic())
        if self._form is not None and prompt.max_new_tokens >= self._form.least_tokens:
            row.form = self._form.row(prompt.max_new_tokens)
            row.ids = list(self._form.openings[0])
        return row

    def _refusal(self, row: RowState) -> str:
        """Return why the model cannot process a row's prompt, empty if it can."""
        prompt = row.prompt
        ids = prompt.encoded.token_ids
        if not ids:
            return "no prompt"
        if len(ids) + prompt.max_new_tokens > self._steps.capacity:
            return f"prompt and answer need more than {self._steps.capacity} tokens"
        if self._form is not None and row.form is None:
            return f"the form needs at least {self._form.least_tokens} tokens"
        if max(ids) >= self._steps.vocab:
            return "the prompt holds a token that the model does not have: its tokenizer belongs to another model"
        return ""

    def _prefilled(self, admitted: Sequence[RowState], rows: Sequence[RowState]) -> bool:
        """Prefill new rows; return False if there is no memory for it now but the other rows can still decode."""
        now, now_ms = time.monotonic(), int(time.time() * 1000)
        for row in admitted:
            if not row.started_at:
                row.started_at, row.started_at_ms = now, now_ms
        try:
            self._steps.prefill(admitted, len(rows))
        except NoMemory:
            if not rows:
                raise
            return False
        return True

    def _take_drawn(self) -> None:
        """Add the tokens that are known by now to their rows."""
        for row, token, at, fault in self._steps.drawn():
            if row.finish:  # a token after the end, drawn before the end was known
                continue
            row.ended_at = at
            if fault:
                row.finish, row.error = "error", fault
            else:
                row.first_token_at = row.first_token_at or at
                self._take(row, token)

    def _take(self, row: RowState, token: int) -> None:
        row.ids.append(token)
        self._tokens += 1
        if row.form is not None:
            if row.form.take(token):
                row.finish = row.form.finish
        elif token in self._end_ids:
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
            self._steps.release(row)
            plan.release(row.slot)
            rows.remove(row)
        return ended

    def _shrink(self, rows: Sequence[RowState], plan: SlotPlan) -> None:
        """Move the last rows closer together, so that a step computes only as many slots as their bucket."""
        by_slot = {row.slot: row for row in rows}
        for source, target in plan.moves():
            row = by_slot[source]
            self._steps.move(row, target)
            row.slot = target

    def _text(self, row: RowState) -> str:
        ids = row.ids[:-1] if row.finish and row.ids and row.ids[-1] in self._end_ids else row.ids
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text.rstrip() if row.form and row.finish else text


def memory_in_use(device: torch.device) -> int:
    """Return the bytes that torch holds on a GPU, 0 on any other device."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
