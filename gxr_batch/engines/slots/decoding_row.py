"""The only mutable object of the engine: a row between its prompt and its completion."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from gxr_batch.models.form_tokens import FormRow
from gxr_batch.records import Completion, FinishReason, Prompt


@dataclass(eq=False)
class RowState:
    """One row between prompt and completion. `ids` are the answer's tokens so far; seconds as in `Completion`.

    With a form, an answer begins with its first heading.
    """

    prompt: Prompt
    taken_at: float
    slot: int = -1
    form: FormRow | None = None
    ids: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    error: str | None = None
    started_at: float = 0.0
    started_at_ms: int = 0
    first_token_at: float | None = None
    ended_at: float | None = None
    share: float = 0.0
    row_steps: int = 0
    steps: int = 0
    shown: str = ""

    @property
    def known_ids(self) -> list[int]:
        """The prompt and the answer so far: what a prefill computes, also of a row that continues with other steps."""
        return [*(self.prompt.encoded.token_ids or ()), *self.ids]

    @property
    def position(self) -> int:
        """The column of the newest token, the input of the next decode step."""
        return len(self.prompt.encoded.token_ids or ()) + len(self.ids) - 1


def charge(rows: Sequence[RowState], seconds: float, active: int) -> None:
    """Divide a step's time among the rows that it computed."""
    for row in rows:
        row.share += seconds / len(rows)
        row.row_steps += active
        row.steps += 1


def completion(row: RowState, text: str) -> Completion:
    """Return the completion of a row that ended."""
    ended = row.ended_at or time.monotonic()
    began = row.started_at or ended
    started_at_ms = row.started_at_ms or int(time.time() * 1000)
    return Completion(
        key=row.prompt.key,
        text="" if row.error else text,
        finish_reason=row.finish or "error",
        error=row.error,
        prompt_tokens=len(row.prompt.encoded.token_ids or ()),
        new_tokens=len(row.ids),
        seconds_queued=began - row.taken_at,
        seconds_to_first_token=row.first_token_at - began if row.first_token_at else None,
        seconds_generating=ended - began,
        seconds_share=row.share,
        rows_in_batch=row.row_steps / row.steps if row.steps else 0.0,
        started_at_ms=started_at_ms,
        finished_at_ms=started_at_ms + round((ended - began) * 1000),
        cut_sections=row.form.cut if row.form else (),
    )
