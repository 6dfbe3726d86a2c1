"""Holds texts to the job's form inside vLLM: a logits processor, which vLLM imports and runs in its engine's process.

The only module here that imports vLLM at its top: no other module imports it, `engine_args` passes its name to vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

from gxr_batch.engines.vllm.engine_args import FORM
from gxr_batch.forms import form_of_run
from gxr_batch.models.form_tokens import FormRow, FormTokens, hold_rows

if TYPE_CHECKING:
    import torch


@dataclass
class _Row:
    """One row: `ids` are its new tokens, a list that vLLM appends to, of which `form` knows the first `taken`."""

    form: FormRow
    ids: list[int]
    end_id: int
    taken: int = 0

    def catch_up(self) -> FormRow:
        """Take the new tokens; a text that has ended may only draw an end token."""
        for id in self.ids[self.taken :]:
            self.taken += 1
            if self.form.take(id):
                self.form.forced = [self.end_id]
        return self.form


class FormProcessor(LogitsProcessor):  # type: ignore[misc]  # vLLM is not installed when types are checked
    """Lets each row draw only what its form allows next. Rows too short for the form, our probe's, draw freely."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        """Read the form from vLLM's `additional_config`, as `engine_args` passes it."""
        settings = vllm_config.additional_config[FORM]
        form = form_of_run({"form": settings["form"]})
        assert form is not None
        tokenizer = AutoTokenizer.from_pretrained(settings["tokenizer"], trust_remote_code=False)
        self._end_id = min(settings["end_ids"])
        self._tokens = FormTokens(form, tokenizer, frozenset(settings["end_ids"]), settings["vocab"])
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        """Return False: greedy rows have the form too."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the rows of vLLM's batch, by their places in it."""
        if batch_update is None:
            return
        for at in batch_update.removed:
            self._rows.pop(at, None)
        for at, params, _, ids in batch_update.added:
            self._rows.pop(at, None)
            if params.max_tokens >= self._tokens.least_tokens:
                self._rows[at] = _Row(self._tokens.row(params.max_tokens, opened=False), ids, self._end_id)
        for source, target, direction in batch_update.moved:
            moved, other = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if other is not None and direction is MoveDirectionality.SWAP:
                self._rows[source] = other

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Change the logits [rows, vocab]: -inf for whatever a row may not draw."""
        places = sorted(at for at in self._rows if at < len(logits))
        hold_rows([self._rows[at].catch_up() for at in places], logits, places)
        return logits
