"""The vllm engine's stream: prompts out to the host, completions back, and a new host if one died.

Rows of a dead host are generated again from scratch in the next one. A row in two hosts that died runs alone from then
on; if a third dies with it, the row is at fault and fails.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from gxr_batch.engines.base import EngineInfo, Pulse, Say, StopRequest
from gxr_batch.engines.suspects import Suspects
from gxr_batch.engines.vllm.host_messages import Answer, Ask, Count, Forget, Gone, Opened, Piece, Unopened
from gxr_batch.engines.vllm.host_process import HostProcess
from gxr_batch.errors import EngineFailed
from gxr_batch.forms import parts_of
from gxr_batch.records import Completion, FinishReason, Prompt

if TYPE_CHECKING:
    from gxr_batch.models.form_tokens import FormTokens

_PULSE_SECONDS = 0.5
_TICK_SECONDS = 0.05
# Rows run alone after this many hosts died with them: one more than in other engines, since a host has hundreds of
# rows, and running all of them one by one takes hours.
_ALONE_AFTER = 2


class Limits(NamedTuple):
    """What a prompt must fit: `vocab` ids, `capacity` tokens with its answer; how often a host may be replaced.

    `gpu_bytes` is the GPU memory that a host holds, 0 on a CPU.
    """

    vocab: int
    capacity: int
    max_restarts: int
    gpu_bytes: int = 0


@dataclass
class _Work:
    """The state of one stream: rows by number, those that ended at once, whether prompts are left."""

    flight: dict[int, RowState] = field(default_factory=dict)
    refused: list[Completion] = field(default_factory=list)
    exhausted: bool = False
    deaths: Suspects = field(
        default_factory=lambda: Suspects(alone_after=_ALONE_AFTER, condemned_after=1 + _ALONE_AFTER)
    )

    @property
    def suspects(self) -> bool:
        """Whether a row must run alone."""
        return any(self.deaths.is_suspect(row.prompt.key) for row in self.flight.values())


class VllmSession:
    """An opened vLLM, and how to open it again. One stream at a time."""

    def __init__(
        self,
        info: EngineInfo,
        host: HostProcess,
        start: Callable[[], HostProcess],
        tokenizer: Any,
        limits: Limits,
        *,
        say: Say,
        form: FormTokens | None = None,
    ) -> None:
        """`host` is already open, `start` starts another one; `say` reports hosts that died.

        `form` is what hosts hold every text to.
        """
        self.info, self._form = info, form
        self._start, self._host, self._tokenizer, self._limits, self._say = start, host, tokenizer, limits, say
        # Whether the host listens; whether it died and has no successor; whether it never will have one.
        self._ready, self._lost, self._given_up = True, False, False
        self._numbers = self._restarts = self._retries = 0
        self._counted = self._before = Count(0, 0)

    def close(self) -> None:
        """End the host. One that is still opening does not listen; the log of one that was given up is kept."""
        if self._ready:
            self._host.close()
        elif not self._given_up:
            self._host.discard()

    def stream(self, prompts: Iterator[Prompt], stop: StopRequest) -> Iterator[Completion | Pulse]:
        """Generate for every prompt. Raises EngineFailed if hosts keep dying."""
        work = _Work()
        pulsed = time.monotonic()
        try:
            while True:
                self._admit(prompts, work, stop)
                self._send(work)
                ended, work.refused = work.refused, []
                if stop.must_return(time.monotonic()) or not (work.flight or ended):
                    return
                yield from ended or self._next(work)
                if time.monotonic() - pulsed >= _PULSE_SECONDS:
                    pulsed = time.monotonic()
                    yield self._pulse(len(work.flight))
        finally:
            self._host.send(Forget(tuple(work.flight)))

    def _admit(self, prompts: Iterator[Prompt], work: _Work, stop: StopRequest) -> None:
        """Take prompts while there are free slots; those that the model cannot process end at once."""
        looked = time.monotonic()
        while not work.exhausted and len(work.flight) < self.info.slots and stop.admitting and not work.suspects:
            prompt = next(prompts, None)
            if prompt is None:
                work.exhausted = True
                return
            row = RowState(prompt, time.monotonic())
            if error := self._refusal(prompt):
                work.refused.append(failed(row, error))
                return
            self._numbers += 1
            work.flight[self._numbers] = row
            self._send(work)
            if time.monotonic() - looked > _PULSE_SECONDS:  # encoding many prompts may take a while
                return

    def _refusal(self, prompt: Prompt) -> str:
        """Return why the model cannot process a prompt, empty if it can."""
        ids, capacity = prompt.encoded.token_ids, self._limits.capacity
        if not ids:
            return "no prompt"
        if len(ids) + prompt.max_new_tokens > capacity:
            return f"prompt and answer need more than {capacity} tokens"
        if self._form is not None and prompt.max_new_tokens < self._form.least_tokens:
            return f"the form needs at least {self._form.least_tokens} tokens"
        if max(ids) >= self._limits.vocab:
            return "the prompt holds a token that the model does not have: its tokenizer belongs to another model"
        return ""

    def _send(self, work: _Work) -> None:
        """Send what the host does not have yet: all except suspects, which go one by one when it has nothing else."""
        if not self._ready:
            return
        waiting = {number: row for number, row in work.flight.items() if not row.sent}
        due = {number: row for number, row in waiting.items() if not work.deaths.is_suspect(row.prompt.key)}
        if not due and len(waiting) == len(work.flight):
            due = dict(list(waiting.items())[:1])
        for number, row in due.items():
            prompt, row.sent = row.prompt, True
            ids = prompt.encoded.token_ids or []
            self._host.send(Ask(number, ids, prompt.row_seed, prompt.max_new_tokens, prompt.on_text is not None))

    def _next(self, work: _Work) -> list[Completion]:
        """Process the host's messages within a tick, up to its next answer. Raises EngineFailed."""
        if self._lost:
            self._restart(len(work.flight))
        try:
            event = self._host.events.get(timeout=_TICK_SECONDS)
        except queue.Empty:
            return []
        if isinstance(event, Answer) and event.number in work.flight:
            row = work.flight.pop(event.number)
            completion = completed(row, event, self._tokenizer, self._form)
            row.show(completion.text)
            return [completion]
        if isinstance(event, Piece) and event.number in work.flight:
            work.flight[event.number].take(event.token_ids, self._tokenizer, held=self._form is not None)
        elif isinstance(event, Count):
            self._counted = event
        elif isinstance(event, Opened):
            self._ready = True
        elif isinstance(event, Gone | Unopened):
            return self._discard_dead_host(work)
        return []

    def _discard_dead_host(self, work: _Work) -> list[Completion]:
        """Discard a dead host; return the row that is at fault, if any. Its other rows are generated again."""
        self._host.kill()
        self._ready, self._lost = False, True
        had = [number for number, row in work.flight.items() if row.sent]
        work.deaths.died(work.flight[number].prompt.key for number in had)
        if len(had) == 1 and work.deaths.is_condemned(work.flight[had[0]].prompt.key):
            return [failed(work.flight.pop(had[0]), "vLLM's engine died over this row, again and again")]
        self._retries += len(had)
        for number in had:
            row = work.flight[number]
            row.sent, row.ids = False, []
        return []

    def _restart(self, rows: int) -> None:
        """Start another host after one died with this many rows left. Raises EngineFailed."""
        most = self._limits.max_restarts
        if self._restarts == most:
            self._given_up = True
            times = f"{most + 1} times" if most else "once"
            raise EngineFailed(
                f"vLLM's engine died {times} in this invocation.",
                where=f"vllm.max_restarts = {most}, vLLM's own log: {self._host.log}",
                next_step="run the same command again; if it happens again, lower engine.slots or engine.memory_limit",
            )
        self._restarts += 1
        self._say(
            f"vLLM's engine died and is being restarted ({self._restarts} of {most} times); {rows:,} rows are left."
        )
        self._host.discard()
        self._before = Count(*(old + new for old, new in zip(self._before, self._counted, strict=True)))
        self._counted, self._lost, self._host = Count(0, 0), False, self._start()

    def _pulse(self, rows: int) -> Pulse:
        tokens, preemptions = (old + new for old, new in zip(self._before, self._counted, strict=True))
        return Pulse(tokens, rows, self._limits.gpu_bytes, splits=preemptions, retries=self._retries)


_FINISHES: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


@dataclass(eq=False)
class RowState:
    """One row. `sent` is True while the host has it."""

    prompt: Prompt
    taken_at: float
    sent: bool = False
    ids: list[int] = field(default_factory=list)
    shown: str = ""

    def take(self, ids: Sequence[int], tokenizer: Any, *, held: bool = False) -> None:
        """Show the text of new tokens; an incomplete character waits for the rest, and so do blanks in a form."""
        self.ids += ids
        text = str(tokenizer.decode(self.ids, skip_special_tokens=True))
        text = text.rstrip() if held else text
        if not text.endswith("\ufffd"):
            self.show(text)

    def show(self, text: str) -> None:
        """Pass on what is new in the text so far."""
        if self.prompt.on_text is not None and len(text) > len(self.shown):
            self.prompt.on_text(text[len(self.shown) :])
            self.shown = text


def completed(row: RowState, answer: Answer, tokenizer: Any, form: FormTokens | None = None) -> Completion:
    """Return the completion of a row that the host answered, held to a form if there is one."""
    finish = _FINISHES.get(answer.finish)
    if finish is None:
        return failed(row, answer.error or f"vLLM ended this row for a reason of its own ({answer.finish})")
    ids = answer.token_ids[:-1] if finish == "stop" else answer.token_ids
    cut: tuple[int, ...] = ()
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    if form is not None:
        text = text.rstrip()
        if finish != "stop" or parts_of(form.form, text) is None:
            return failed(row, "vLLM did not hold this row to its form")
        finish, cut = _ended(form, row.prompt.max_new_tokens, ids)
    generating = answer.ended_at - answer.scheduled_at
    ended_ms = (time.time() - (time.monotonic() - answer.ended_at)) * 1000
    return Completion(
        key=row.prompt.key,
        text=text,
        finish_reason=finish,
        error=None,
        prompt_tokens=len(row.prompt.encoded.token_ids or ()),
        new_tokens=len(answer.token_ids),
        seconds_queued=max(0.0, answer.scheduled_at - row.taken_at),
        seconds_to_first_token=answer.first_token_at - answer.scheduled_at,
        seconds_generating=generating,
        seconds_share=answer.share,
        rows_in_batch=answer.rows,
        started_at_ms=round(ended_ms - generating * 1000),
        finished_at_ms=round(ended_ms),
        cut_sections=cut,
    )


def _ended(form: FormTokens, max_new_tokens: int, ids: Sequence[int]) -> tuple[FinishReason, tuple[int, ...]]:
    """Return how a text with a form ended and which sections a limit cut, by drawing its ids (no end token) again."""
    row = form.row(max_new_tokens, opened=False)
    for id in ids:
        row.take(id)
    return row.finish, row.cut


def failed(row: RowState, error: str) -> Completion:
    """Return the completion of a failed row: nothing was generated, so nothing is measured."""
    prompt, now_ms = row.prompt, round(time.time() * 1000)
    queued = time.monotonic() - row.taken_at
    return Completion(
        prompt.key, "", "error", error, prompt.encoded.length, 0, queued, None, 0.0, 0.0, 0.0, now_ms, now_ms
    )
