"""The one mutable thing of the engine: a row between its prompt and its completion."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gxr_batch.engines.vllm.wire import Answer
from gxr_batch.records import Completion, FinishReason, Prompt

_FINISHES: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


@dataclass(eq=False)
class RowState:
    """One row. `sent` says whether the host has it now, `deaths` how many hosts died while they had it."""

    prompt: Prompt
    taken_at: float
    sent: bool = False
    deaths: int = 0
    ids: list[int] = field(default_factory=list)
    shown: str = ""

    def take(self, ids: Sequence[int], tokenizer: Any) -> None:
        """Show the text that new tokens make; half a character waits for its other half."""
        self.ids += ids
        text = str(tokenizer.decode(self.ids, skip_special_tokens=True))
        if not text.endswith("\ufffd"):
            self.show(text)

    def show(self, text: str) -> None:
        """Hand a person what is new in the text so far."""
        if self.prompt.on_text is not None and len(text) > len(self.shown):
            self.prompt.on_text(text[len(self.shown) :])
            self.shown = text


def completed(row: RowState, answer: Answer, tokenizer: Any) -> Completion:
    """Return what the runner gets of a row that the host answered."""
    finish = _FINISHES.get(answer.finish)
    if finish is None:
        return failed(row, answer.error or f"vLLM ended this row for a reason of its own ({answer.finish})")
    ids = answer.token_ids[:-1] if finish == "stop" else answer.token_ids
    generating = answer.ended_at - answer.scheduled_at
    ended_ms = (time.time() - (time.monotonic() - answer.ended_at)) * 1000
    return Completion(
        key=row.prompt.key,
        text=str(tokenizer.decode(ids, skip_special_tokens=True)),
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
    )


def failed(row: RowState, error: str) -> Completion:
    """Return the completion of a row that came to nothing: nothing was generated, so nothing is measured."""
    prompt, now_ms = row.prompt, round(time.time() * 1000)
    queued = time.monotonic() - row.taken_at
    return Completion(
        prompt.key, "", "error", error, prompt.encoded.length, 0, queued, None, 0.0, 0.0, 0.0, now_ms, now_ms
    )
