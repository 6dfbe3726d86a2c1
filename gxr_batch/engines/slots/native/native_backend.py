"""Runs a Gemma 3 or Llama model of transformers with the C kernels. Tests compare it with the library."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from gxr_batch.engines.slots.native.c_binding import NOT_FINITE, TOO_MANY, declared
from gxr_batch.engines.slots.native.compile_kernels import NativeUnavailable, load, load_with
from gxr_batch.engines.slots.native.packed_weights import ROWS, Packed, why_not
from gxr_batch.engines.slots.token_sampling import Candidates, Seen, top_candidates
from gxr_batch.job.sampling import Sampling
from gxr_batch.models.form_tokens import Masks

_MOST_CANDIDATES = 2048  # per row; a row with more is sorted in full
_BLOCK = 512  # tokens that the candidate scan reads at a time
_PADDING = 64  # extra columns, so that rows of logits do not share cache sets


class NativeModel:
    """A packed model with `slots` rows of `capacity` tokens. Implements `backend.Backend`."""

    least_rows = 1

    def __init__(self, model: Any, *, slots: int, capacity: int, product: str = "") -> None:
        """Pack `model` (bfloat16, on the CPU), which is unusable afterwards. Raises NativeUnavailable.

        `product` is one of compile_kernels.PRODUCTS; without it, the fastest that this machine supports.
        """
        reason = why_not(model)
        if reason:
            raise NativeUnavailable(reason)
        kernels = load_with(product) if product else load()
        self.name = f"native bfloat16 kernels ({kernels.product})"
        self.why_slower, self.why_not_kept = kernels.why_slower, kernels.why_not_kept
        self._library = declared(kernels.library)
        self._library.gxr_threads(torch.get_num_threads())
        self.slots, self.capacity, self.device = slots, capacity, torch.device("cpu")
        config = model.config.get_text_config()
        self.vocab = config.vocab_size
        self._hidden = config.hidden_size
        self._packed = Packed(self._library, model, slots=slots, capacity=capacity)
        self._model = self._packed.model
        self._stride = -(-self.vocab // _BLOCK) * _BLOCK + _PADDING
        self._logits = torch.empty(0, self._stride, dtype=torch.bfloat16)
        self._gathered = torch.zeros(0, self._hidden, dtype=torch.bfloat16)

    # ------------------------------------------------------------------ Backend

    def prefill(self, rows: Sequence[tuple[int, Sequence[int], int]]) -> torch.Tensor:
        """Run prompts through the model: (slot, ids, first position) each. Returns the last logits [rows, vocab]."""
        logits = self._logits_buffer(len(rows))
        pending: list[tuple[int, int, int]] = []  # id, slot, position
        ends: list[tuple[int, int]] = []  # row, index in pending
        for row, (slot, ids, first) in enumerate(rows):
            for offset, token in enumerate(ids):
                pending.append((token, slot, first + offset))
                if offset + 1 == len(ids):
                    ends.append((row, len(pending) - 1))
                if len(pending) == ROWS:
                    self._flush(pending, ends, logits)
        if pending:
            self._flush(pending, ends, logits)
        return logits[:, : self.vocab]

    def decode(self, slots: Sequence[int], ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Run one token of each row through the model. Returns the logits [rows, vocab] in the order of `slots`."""
        logits = self._logits_buffer(len(slots))
        pending = list(zip(ids, slots, positions, strict=True))
        for start in range(0, len(pending), ROWS):
            piece = pending[start : start + ROWS]
            self._flush(piece, [(start + index, index) for index in range(len(piece))], logits)
        return logits[:, : self.vocab]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot's cache to another slot."""
        shape, slot_bytes = self._model.shape, self._packed.kv_bytes
        token_bytes = shape.head_dim * 2
        for layer in range(shape.layers):
            entry = self._model.layers[layer]
            for base in (entry.keys, entry.values):
                for head in range(shape.kv_heads):
                    begin = base + head * self.capacity * token_bytes
                    ctypes.memmove(begin + target * slot_bytes, begin + source * slot_bytes, length * token_bytes)

    def clear(self, slot: int) -> None:
        """Do nothing: attention reads no column beyond a row's position."""

    def forbid(self, logits: torch.Tensor, masks: Masks) -> None:
        """Set the logits of ids that are not in the masks to -inf."""
        rows, words = masks.shape
        self._library.gxr_forbid(logits.data_ptr(), logits.stride(0), rows, logits.shape[1], masks.ctypes.data, words)

    def candidates(self, logits: torch.Tensor, seen: Seen, sampling: Sampling) -> Candidates:
        """Return what top-k keeps of each row; [rows, n]. Rows whose logits are not finite come back as NaN."""
        rows, width = logits.shape[0], self._stride - _PADDING
        k = 1 if sampling.greedy else sampling.top_k
        # The scan is worthwhile only with more blocks than k, and needs rows of our buffer, which end in whole
        # blocks.
        foreign = logits.data_ptr() != self._logits.data_ptr()
        if foreign or k == 0 or k > _MOST_CANDIDATES // 2 or k >= width // _BLOCK:
            return top_candidates(logits, seen, sampling)
        seen_ids, lengths = seen.ids.int().contiguous(), seen.counts.int()
        values = torch.empty(rows, _MOST_CANDIDATES)
        ids = torch.zeros(rows, _MOST_CANDIDATES, dtype=torch.int32)
        counts = torch.empty(rows, dtype=torch.int32)
        self._library.gxr_candidates(
            logits.data_ptr(), logits.stride(0), rows, width, k,
            seen_ids.data_ptr(), lengths.data_ptr(), seen_ids.shape[1], sampling.repetition_penalty,
            _MOST_CANDIDATES, values.data_ptr(), ids.data_ptr(), counts.data_ptr(),
        )  # fmt: skip
        return _finish(values, ids, counts, k)

    def close(self) -> None:
        """Free the packed weights and the cache."""
        self._packed.close()

    # ------------------------------------------------------------------ calls

    def _logits_buffer(self, rows: int) -> torch.Tensor:
        padded = -(-rows // 32) * 32
        if len(self._logits) < padded:
            # The columns after the vocabulary stay -inf for the scan, which reads whole blocks.
            self._logits = torch.full((padded, self._stride), -torch.inf, dtype=torch.bfloat16)
            self._gathered = torch.zeros(padded, self._hidden, dtype=torch.bfloat16)
        return self._logits[:rows]

    def _flush(self, pending: list[tuple[int, int, int]], ends: list[tuple[int, int]], logits: torch.Tensor) -> None:
        """Run the pending tokens through all layers, and the head for those that end a row."""
        ids, slots, positions = (torch.tensor(column, dtype=torch.int32) for column in zip(*pending, strict=True))
        call = ctypes.byref(self._model)
        self._library.gxr_forward(call, len(pending), ids.data_ptr(), slots.data_ptr(), positions.data_ptr())
        if ends:
            which = torch.tensor([index for _, index in ends], dtype=torch.int32)
            self._library.gxr_logits(
                call,
                len(ends),
                which.data_ptr(),
                self._gathered.data_ptr(),
                logits[ends[0][0] :].data_ptr(),
                self._stride,
            )
        pending.clear()
        ends.clear()


def _finish(values: torch.Tensor, ids: torch.Tensor, counts: torch.Tensor, k: int) -> Candidates:
    """Sort what the kernel found as `top_candidates` does: descending, equal values by id, -inf below the k-th."""
    width = max(int(counts.max()), k)
    values, ids = values[:, :width], ids[:, :width].long()
    values = values.masked_fill(torch.arange(width) >= counts[:, None], -torch.inf)
    order = ids.sort(dim=-1, stable=True).indices
    values, ids = values.gather(1, order), ids.gather(1, order)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    values = values.masked_fill(values < values[:, k - 1 : k], -torch.inf)
    values = values.masked_fill((counts == NOT_FINITE)[:, None], torch.nan)
    return Candidates(values, ids.gather(1, order), counts != TOO_MANY)
