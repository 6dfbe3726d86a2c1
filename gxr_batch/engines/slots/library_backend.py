"""Runs any Hugging Face causal model's forward pass over the slotted cache, on any device.

A row is prefilled alone and decoding runs with at least eight rows, because only then do its bits not depend on the
other rows (measured: bfloat16 products of fewer rows, and prefills of several rows, change them). The masks are
ready-made, so the library's padding and window logic never runs.

On CPUs without the C kernels the weights of linear layers are packed once for oneDNN: same bits, faster products. The
operators are private to torch: if this torch lacks them, or they refuse a weight, that weight stays as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from gxr_batch.engines.slots.backend import PREFIX_SLOTS
from gxr_batch.engines.slots.cuda_graphs import Record, StepGraphs
from gxr_batch.engines.slots.kv_cache import SlotCache, attended
from gxr_batch.engines.slots.slot_schedule import bucket
from gxr_batch.engines.slots.token_sampling import Candidates, Seen, top_candidates
from gxr_batch.job.sampling import Sampling
from gxr_batch.models.form_tokens import Masks, forbid

LEAST_ROWS = 8


class LibraryModel:
    """A transformers model behind a slotted cache. Implements `backend.Backend`."""

    def __init__(
        self, model: Any, *, slots: int, capacity: int, reproducible: bool = True, record: Record | None = None
    ) -> None:
        """Take a loaded causal language model, in eval mode, whose layers may be on several devices.

        `record` turns decode steps into recordings (see `cuda_graphs`).
        """
        config = model.config.get_text_config()
        self.name = "the library's own forward"
        # A reproducible decode computes at least eight rows, so there are that many slots; extra ones stay idle.
        self.slots = max(slots, LEAST_ROWS) if reproducible else slots
        self.least_rows = LEAST_ROWS if reproducible else 1
        self.capacity, self.vocab = capacity, config.vocab_size
        self._model, self._reproducible = model, reproducible
        self.device = model.get_input_embeddings().weight.device
        self._dtype = model.dtype
        self._windows = _windows(config)
        self._cache = SlotCache(config.num_hidden_layers, self.slots + PREFIX_SLOTS, capacity)
        self._extra = _extra_arguments(model)
        self._graphs = None
        if record:
            logits = torch.empty(self.slots, self.vocab, dtype=self._dtype, device=self.device)
            self._graphs = StepGraphs(self._step, record, logits)
        if pack_linears(model):
            self.name += ", packed products"

    @torch.inference_mode()
    def prefill(self, rows: Sequence[tuple[int, Sequence[int], int]]) -> torch.Tensor:
        """Run prompts through the model, each alone. Returns the last logits, [rows, vocab]."""
        return torch.cat([self._prefill(slot, ids, first) for slot, ids, first in rows])

    def _prefill(self, slot: int, ids: Sequence[int], first: int) -> torch.Tensor:
        tokens = torch.tensor([list(ids)], device=self.device)
        positions = torch.arange(first, first + len(ids), device=self.device)[None]
        length = attended(first + len(ids), self.capacity)
        rows = torch.tensor([[slot]], device=self.device)
        self._cache.aim(rows, positions, (slot, slot + 1, length))
        return self._forward(tokens, positions, length)

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Run one token of each row through the model. Returns the logits [rows, vocab] in the order of `slots`."""
        first, rows = self._span(slots)
        tokens = torch.zeros(rows, 1, dtype=torch.long)
        columns = torch.full((rows, 1), self.capacity - 1)  # idle slots write where no row has a token yet
        at = torch.tensor(slots) - first
        tokens[at, 0], columns[at, 0] = torch.tensor(ids), torch.tensor(positions)
        length = attended(max(positions) + 1, self.capacity)
        step = self._graphs.run if self._graphs else self._step
        return step(tokens.to(self.device), columns.to(self.device), first, length)[at.to(self.device)]

    def _step(self, tokens: torch.Tensor, columns: torch.Tensor, first: int, length: int) -> torch.Tensor:
        """Run one token for each of the slots from `first`. Everything here stays on the device."""
        rows = len(tokens)
        numbers = torch.arange(first, first + rows, device=self.device)[:, None]
        self._cache.aim(numbers, columns, (first, first + rows, length))
        return self._forward(tokens, columns.clamp(max=length - 1), length)

    def _span(self, slots: Sequence[int]) -> tuple[int, int]:
        """Return the first slot of a step and how many it computes: a bucket around the active ones."""
        lowest, most = min(slots), max(slots) + 1
        if not self._reproducible and not self._graphs:
            return lowest, most - lowest
        if self._graphs:  # every shape is recorded once, so keep the number of shapes small
            lowest -= lowest % LEAST_ROWS
        first = max(min(lowest, self.slots - LEAST_ROWS), 0)
        return first, max(bucket(most - first, self.slots - first), self.least_rows)

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
        done = self._model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=self._masks(positions, length),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            **self._extra,
        )
        logits: torch.Tensor = done.logits[:, -1]
        return logits

    def _masks(self, positions: torch.Tensor, length: int) -> Any:
        """Return the additive masks [rows, 1, tokens, length]: a dict by kind of layer if windows differ."""
        masks = {kind: self._mask(positions, length, window) for kind, window in self._windows.items()}
        return masks if len(masks) > 1 or None not in self._windows else masks[None]

    def _mask(self, positions: torch.Tensor, length: int, window: int) -> torch.Tensor:
        columns = torch.arange(length, device=positions.device)
        seen = columns <= positions[:, :, None]
        if window:
            seen &= columns > positions[:, :, None] - window
        mask = torch.zeros(seen.shape, dtype=self._dtype, device=positions.device)
        return mask.masked_fill_(~seen, torch.finfo(self._dtype).min)[:, None]

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of one slot to another."""
        self._cache.copy(source, target, length)

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Reset a slot that holds NaN or infinity."""
        self._cache.clear(slot)

    def forbid(self, logits: torch.Tensor, masks: Masks) -> None:
        """Set the logits of ids that are not in the masks to -inf."""
        forbid(logits, masks)

    def candidates(self, logits: torch.Tensor, seen: Seen, sampling: Sampling) -> Candidates:
        """Return what top-k keeps of each row. With several devices the logits are on the last one."""
        return top_candidates(logits, seen, sampling)

    def close(self) -> None:
        """Release model, cache and recordings."""
        self._graphs = None
        if cache := vars(self).pop("_cache", None):
            cache.release()
        vars(self).pop("_model", None)


def _windows(config: Any) -> dict[str | None, int]:
    """Return the sliding window of each kind of layer, 0 = none; the key is None if all layers are alike."""
    kinds = set(getattr(config, "layer_types", None) or ())
    window = int(getattr(config, "sliding_window", None) or 0)
    if "sliding_attention" in kinds:
        return {"full_attention": 0, "sliding_attention": window}
    return {None: 0 if kinds else window}


def _extra_arguments(model: Any) -> dict[str, Any]:
    """Multimodal Gemma 3 may require token types: mark all tokens as text."""
    return {"return_dict": True} if "return_dict" in inspect.signature(model.forward).parameters else {}


# The number of rows that the packed layout is optimised for; other numbers work too.
_ROWS = 32


def pack_linears(model: Any) -> bool:
    """Replace the plain bfloat16 linear layers on the CPU with packed ones; return whether any was replaced."""
    if not _available():
        return False
    packed = False
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and _packable(child.weight):
                setattr(module, name, PackedLinear(child))
                packed = True
    return packed


def _packable(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16


def _available() -> bool:
    operators = torch.ops.mkldnn
    return all(hasattr(operators, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))


class PackedLinear(torch.nn.Module):
    """A linear layer whose weight is in oneDNN's layout; `weight` is kept for callers that check its type or device."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ weight.T + bias."""
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return y
