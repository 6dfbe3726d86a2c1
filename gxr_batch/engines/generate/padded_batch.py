"""One padded batch through transformers' own `generate`, timed at every step, in which each row ends separately.

Runs in the engine's worker thread and reports through a queue: a row is passed on in the step in which it ends, not
when the whole batch does. Rows that are unfinished when `generate` returns or raises are still to do.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from gxr_batch.engines.base import StopRequest
from gxr_batch.engines.generate.logits_processors import processors
from gxr_batch.job.sampling import Sampling
from gxr_batch.models.device_memory import out_of_memory
from gxr_batch.models.form_tokens import FormRow, FormTokens, hold_rows
from gxr_batch.models.library_output import quiet_transformers
from gxr_batch.models.load_weights import LoadedModel
from gxr_batch.records import Prompt

End = Literal["stop", "closed", "length", "overflow"]


@dataclass(kw_only=True, eq=False)
class RowState:
    """A prompt that the engine has taken. Seconds are on the monotonic clock; `token_ids` includes the end token.

    `share` outlives a failed attempt, because that time was spent too; the fields below it are reset.
    """

    prompt: Prompt
    token_ids: list[int]
    taken_at: float
    share: float = 0.0
    end: End | None = None
    new_ids: list[int] = field(default_factory=list)
    began_at: float = 0.0
    began_at_ms: int = 0
    first_token_at: float = 0.0
    ended_at: float = 0.0
    steps: int = 0
    rows_in_steps: int = 0
    form: FormRow | None = None

    def begin(self, now: float, now_ms: int, form: FormTokens | None) -> None:
        """Start an attempt; with a form, it begins with the first heading."""
        self.form = form.row(self.prompt.max_new_tokens, opened=False) if form else None
        self.began_at, self.began_at_ms = now, now_ms
        self.end, self.new_ids = None, []
        self.first_token_at = self.ended_at = 0.0
        self.steps = self.rows_in_steps = 0


class Batch:
    """Rows that are decoded side by side. `tokens` counts theirs so far; `broke` is the class of a fatal error.

    `no_memory` is True if that error was about memory.
    """

    def __init__(self, rows: Sequence[RowState], stop: StopRequest, form: FormTokens | None = None) -> None:
        self.rows = list(rows)
        self._form = form
        self.ended: queue.SimpleQueue[RowState] = queue.SimpleQueue()
        self.abandoned = threading.Event()
        self.tokens = 0
        self.broke: type[Exception] | None = None
        self.no_memory = False
        self.overflowed: set[int] = set()  # indices of rows whose logits are no longer finite
        self._stop = stop
        self._clock = 0.0

    @property
    def unfinished(self) -> list[RowState]:
        """The rows that have not ended yet."""
        return [row for row in self.rows if row.end is None]

    def run(self, loaded: LoadedModel, sampling: Sampling) -> None:
        """Generate until every row has ended, a stop is due, or an error occurs."""
        self._clock = time.monotonic()
        now_ms = int(time.time() * 1000)
        for row in self.rows:
            row.begin(self._clock, now_ms, self._form)
        try:
            self._generate(loaded, sampling)
        except Exception as error:  # whatever a row does to the model, the other rows get their chance without it
            # Only the class leaves this thread: messages may quote a prompt, and tracebacks keep tensors alive.
            self.broke, self.no_memory = type(error), out_of_memory(error)
            self._charge(time.monotonic())

    def _generate(self, loaded: LoadedModel, sampling: Sampling) -> None:
        model: Any = loaded.model  # the type hints of `generate` do not cover a loaded model
        width = max(len(row.token_ids) for row in self.rows)
        # Padding on the left repeats the row's own first id instead of a pad id: the mask hides it from attention, and
        # the repetition penalty, which ignores the mask, sees no id that is not in the prompt anyway.
        ids = [[row.token_ids[0]] * (width - len(row.token_ids)) + row.token_ids for row in self.rows]
        mask = [[0] * (width - len(row.token_ids)) + [1] * len(row.token_ids) for row in self.rows]
        chain = processors(sampling, [row.prompt.row_seed for row in self.rows], width, model.device)
        with torch.inference_mode(), quiet_transformers():
            # Sliding windows, masks and positions of left-padded rows are exact in transformers 5.23 with its default
            # cache, with "sdpa" and "eager" attention; the tests check it beyond Gemma's window of 512.
            model.generate(
                torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=_settings(max(row.prompt.max_new_tokens for row in self.rows)),
                logits_processor=LogitsProcessorList([_Overflow(self.overflowed), *self._held(), *chain]),
                stopping_criteria=StoppingCriteriaList([_EveryStep(self, width, frozenset(loaded.end_ids))]),
            )

    def _held(self) -> list[LogitsProcessor]:
        return [_FormOnly(self)] if self._form else []

    def step(self, tokens: Sequence[int], end_ids: frozenset[int]) -> list[bool]:
        """Record one token per row now, pass on the rows that end, and return which rows need no more."""
        now = time.monotonic()
        self._charge(now)
        active = self.unfinished
        for place, (row, token) in enumerate(zip(self.rows, tokens, strict=True)):
            if row.end is not None:
                continue
            row.new_ids.append(token)
            row.steps += 1
            row.rows_in_steps += len(active)
            row.first_token_at = row.first_token_at or now
            if place in self.overflowed:
                row.end = "overflow"
            elif row.form is not None:
                if row.form.take(token):
                    row.end = row.form.finish
            elif token in end_ids:
                row.end = "stop"
            elif len(row.new_ids) >= row.prompt.max_new_tokens:
                row.end = "length"
            if row.end is not None:
                row.ended_at = now
                self.ended.put(row)
        self.tokens += len(active)
        if self.abandoned.is_set() or self._stop.must_return(now):
            return [True] * len(self.rows)
        return [row.end is not None for row in self.rows]

    def _charge(self, now: float) -> None:
        """Divide the time since the last step among the rows that were active in it."""
        active = self.unfinished
        for row in active:
            row.share += (now - self._clock) / len(active)
        self._clock = now


def _settings(max_new_tokens: int) -> GenerationConfig:
    # No end ids: rows end in `Batch.step`. No sampling: the last processor draws.
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": 0}
    return GenerationConfig(**settings)  # type: ignore[no-untyped-call]


class _Overflow(LogitsProcessor):
    """Finds rows whose logits are NaN or infinite and gives them harmless ones, so that the other rows continue."""

    def __init__(self, found: set[int]) -> None:
        self._found = found

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        bad = ~torch.isfinite(scores.amax(-1))  # a NaN anywhere in a row is its maximum
        places = bad.nonzero().flatten().tolist()
        self._found.update(places)
        return scores.masked_fill(bad[:, None], 0.0) if places else scores


class _FormOnly(LogitsProcessor):
    """Leaves each row that has not ended only what its form allows next."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        rows = self._batch.rows
        places = [place for place, row in enumerate(rows) if row.end is None]
        hold_rows([form for place in places if (form := rows[place].form)], scores, places)  # `generate`'s own copy
        return scores


class _EveryStep(StoppingCriteria):
    """The hook in `generate`'s loop: called after every token, it updates the batch and returns which rows are done."""

    def __init__(self, batch: Batch, prompt_width: int, end_ids: frozenset[int]) -> None:
        self._batch, self._prompt_width, self._end_ids = batch, prompt_width, end_ids

    def __call__(self, input_ids: torch.LongTensor, scores: object, **kwargs: object) -> torch.BoolTensor:
        # Reading the ids waits for the device, so the time is taken when the step is really over.
        done = self._batch.step(input_ids[:, -1].tolist(), self._end_ids)
        return torch.tensor(done, device=input_ids.device)  # type: ignore[return-value]
