"""The forward pass for GPUs: about ten kernels a layer, over buffers and pages at fixed addresses.

A decode step computes the rows of slots 0 to n - 1, a prefill the tokens of several prompts one after the other; both
run the same layers and differ only in their attention. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from gxr_batch.engines.slots.gpu.fused_weights import Layer, Weights
from gxr_batch.engines.slots.gpu.kernels import activation, attention, norms, products, rotation
from gxr_batch.engines.slots.gpu.launch import Launcher
from gxr_batch.engines.slots.gpu.memory_plan import SPLIT_TOKENS
from gxr_batch.engines.slots.gpu.paged_cache import PagedCache

# Attention of one layer: (queries, pages, table, layer, out)
_Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Layer, torch.Tensor], None]


# Sends int32 arrays to the device.
Send = Callable[[Sequence[npt.NDArray[Any]]], list[torch.Tensor]]


class Piece(NamedTuple):
    """Tokens of one slot in a prefill call, from position `first`; `ends`: the prompt ends with them."""

    slot: int
    ids: Sequence[int]
    first: int
    ends: bool = True


def in_calls(prompts: Iterable[Piece], chunk: int) -> list[list[Piece]]:
    """Divide prompts, in their order, into calls of at most `chunk` tokens."""
    calls: list[list[Piece]] = [[]]
    left = chunk
    for prompt in prompts:
        done = 0
        while done < len(prompt.ids):
            part = prompt.ids[done : done + left]
            ends = done + len(part) == len(prompt.ids)
            calls[-1].append(Piece(prompt.slot, part, prompt.first + done, ends))
            done, left = done + len(part), left - len(part)
            if not left:
                calls.append([])
                left = chunk
    return [call for call in calls if call]


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The tokens of several prompts, all int32: ids, positions and slots [T], and by sequence starts [B + 1], slots and
    first positions [B]; the places `ends` of the prompts' last tokens and their slots. `longest` is the most tokens of
    one sequence.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor
    sequence_slots: torch.Tensor
    firsts: torch.Tensor
    ends: torch.Tensor
    end_slots: torch.Tensor
    longest: int

    @classmethod
    def of(cls, call: Sequence[Piece], send: Send) -> Packed:
        """Send the pieces of a call to the device, one after the other."""
        lengths = [len(piece.ids) for piece in call]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        slots = [piece.slot for piece in call]
        ending = [index for index, piece in enumerate(call) if piece.ends]
        ids, positions, token_slots, cuts, sequence_slots, firsts, ends, end_slots = send(
            [
                np.concatenate([np.asarray(piece.ids) for piece in call]),
                np.concatenate([np.arange(piece.first, piece.first + len(piece.ids)) for piece in call]),
                np.repeat(slots, lengths),
                starts,
                np.asarray(slots),
                np.asarray([piece.first for piece in call]),
                np.asarray([starts[index + 1] - 1 for index in ending], np.int64),
                np.asarray([slots[index] for index in ending], np.int64),
            ]
        )
        return cls(
            ids=ids,
            positions=positions,
            slots=token_slots,
            starts=cuts,
            sequence_slots=sequence_slots,
            firsts=firsts,
            ends=ends,
            end_slots=end_slots,
            longest=max(lengths),
        )


class Forward:
    """A model's layers over a paged cache. `launch` counts the launches of our kernels."""

    def __init__(
        self,
        weights: Weights,
        cache: PagedCache,
        *,
        chunk: int,
        reproducible: bool,
    ) -> None:
        """Reserve the buffers for `chunk` tokens in a prefill call, and for a decode step of all slots.

        `reproducible`: products sum in an order that does not depend on the number of rows, if the GPU is fast at it.
        """
        self.weights, self.cache = weights, cache
        self.launch = Launcher()
        # Before compute capability 8.0 Triton multiplies without matrix units, many times slower than cuBLAS.
        self._reproducible = reproducible and self.launch.capability(weights.head) >= 80
        self.chunk = chunk
        most_tokens = max(chunk, cache.slots)
        heads, size = weights.heads, weights.head_size
        queries = heads * size
        buffer = self._buffer
        wide = weights.dtype == torch.float16  # in which Gemma's residual overflows
        self._residual = buffer(most_tokens, weights.hidden, dtype=torch.float32 if wide else weights.dtype)
        self._factors = buffer(most_tokens if wide else 0, dtype=torch.float32)
        self._normed = buffer(most_tokens, weights.hidden)
        self._projected = buffer(most_tokens, weights.hidden)
        self._qkv = buffer(most_tokens, queries + 2 * weights.kv_heads * size)
        self._queries = buffer(most_tokens, heads, size)
        self._mixed = buffer(most_tokens, queries)
        self._gate_up = buffer(most_tokens, 2 * weights.inner)
        self._inner = buffer(most_tokens, weights.inner)
        self._every = torch.arange(most_tokens, dtype=torch.int32, device=weights.device)
        self.reserve(cache.slots)

    def reserve(self, slots: int) -> None:
        """Reserve the buffers for so many slots, at most a chunk after the first time; all of them or none."""
        weights, buffer = self.weights, self._buffer
        splits = -(-self.cache.capacity // SPLIT_TOKENS)
        self._partial, self._sums, self._ends, self._logits = (
            buffer(slots, weights.heads, splits, weights.head_size, dtype=torch.float32),
            buffer(slots, weights.heads, splits, 2, dtype=torch.float32),
            buffer(slots, weights.hidden),
            buffer(slots, weights.vocab),
        )

    def _buffer(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype or self.weights.dtype, device=self.weights.device)

    @torch.inference_mode()
    def decode(self, tokens: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Run the newest token of each slot [slots] through the model; return the logits [rows, vocab].

        Row n is that of `slots` [rows], -1 for an idle one, at its slot's position. The next call overwrites them.
        """
        rows = len(slots)
        at = positions[:rows]

        def attend(
            queries: torch.Tensor, pages: torch.Tensor, table: torch.Tensor, layer: Layer, out: torch.Tensor
        ) -> None:
            attention.decode(
                self.launch, queries, pages, table, slots, at, layer.window, layer.score_scale, SPLIT_TOKENS,
                self._partial[:rows], self._sums[:rows], out,
            )  # fmt: skip

        self._layers(tokens, slots, at, slots, attend)
        return self._head(self._normed[:rows])

    @torch.inference_mode()
    def prefill(self, packed: Packed) -> torch.Tensor | None:
        """Run packed prompts through the model; return the logits [ends, vocab], None if no prompt ends here."""

        def attend(
            queries: torch.Tensor, pages: torch.Tensor, table: torch.Tensor, layer: Layer, out: torch.Tensor
        ) -> None:
            attention.prefill(
                self.launch, queries, pages, table, packed.starts, packed.sequence_slots, packed.firsts,
                packed.longest, layer.window, layer.score_scale, out,
            )  # fmt: skip

        count = len(packed.ids)
        self._layers(packed.ids, self._every[:count], packed.positions, packed.slots, attend)
        ends = packed.ends
        if not len(ends):
            return None
        return self._head(torch.index_select(self._normed[:count], 0, ends, out=self._ends[: len(ends)]))

    def _layers(
        self, tokens: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, attend: _Attend
    ) -> None:
        """Leave the normed output of the last layer in `_normed`."""
        weights, launch, count = self.weights, self.launch, len(rows)
        residual, normed = self._residual[:count], self._normed[:count]
        qkv, queries, mixed = self._qkv[:count], self._queries[:count], self._mixed[:count]
        projected, gate_up, inner = self._projected[:count], self._gate_up[:count], self._inner[:count]
        factors = self._factors[:count] if len(self._factors) else None
        first = weights.layers[0].before_attention
        rounded = weights.round_first
        norms.embed(
            launch, tokens, rows, weights.embedding, weights.embed_scale, first, weights.eps, residual, normed,
            round_first=rounded,
        )  # fmt: skip
        for number, layer in enumerate(weights.layers):
            pages, table = self.cache.layer(number)
            self._product(normed, layer.qkv, qkv)
            rotation.rotate_and_store(
                launch, qkv, layer.query_norm, layer.key_norm, layer.head_eps, layer.angles, positions, slots, table,
                pages, queries, round_first=rounded,
            )  # fmt: skip
            attend(queries, pages, table, layer, mixed)
            self._product(mixed, layer.out, projected)
            norms.add_norms(
                launch, projected, residual, layer.after_attention, layer.before_mlp, weights.eps, normed,
                factor=layer.range.attention if layer.range else 1.0, round_first=rounded,
            )  # fmt: skip
            self._product(normed, layer.gate_up, gate_up)
            if layer.range is None or factors is None:
                activation.gated(launch, gate_up, weights.gate, inner)
            else:
                activation.gated_in_range(
                    launch, gate_up, weights.gate, inner, factors, factor=layer.range.mlp, most=layer.range.inner
                )
            self._product(inner, layer.down, projected)
            last = number + 1 == len(weights.layers)
            following = weights.last_norm if last else weights.layers[number + 1].before_attention
            norms.add_norms(
                launch, projected, residual, layer.after_mlp, following, weights.eps, normed, factors=factors,
                round_first=rounded,
            )  # fmt: skip

    def _head(self, normed: torch.Tensor) -> torch.Tensor:
        logits = self._logits[: len(normed)]
        self._product(normed, self.weights.head, logits)
        return logits

    def _product(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        if self._reproducible:
            products.product(self.launch, x, weight, out)
        else:
            torch.mm(x, weight.t(), out=out)
