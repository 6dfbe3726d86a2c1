"""What the device knows of every slot between two steps, so that a step needs nothing from the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from gxr_batch.engines.slots.gpu.kernels import sampling as kernel
from gxr_batch.engines.slots.gpu.launch import Launcher
from gxr_batch.engines.slots.token_sampling import Seen, draw, penalised, top_candidates
from gxr_batch.job.sampling import Sampling

# Rows whose vocabulary is sorted at a time: each takes about 60 bytes a token meanwhile.
_SORTED_ROWS = 8


class SlotState:
    """Newest token, its position, seed, step and seen ids of each slot; and the draws that advance them."""

    def __init__(self, slots: int, vocab: int, sampling: Sampling, launch: Launcher, device: torch.device) -> None:
        self._sampling, self._launch, self._vocab = sampling, launch, vocab
        self.tokens = torch.zeros(slots, dtype=torch.int32, device=device)
        self.positions = torch.full((slots,), -1, dtype=torch.int32, device=device)
        # Row n of a decode step is slot n, or -1 if that slot has no token to compute.
        self.active = torch.full((slots,), -1, dtype=torch.int32, device=device)
        self.seeds = torch.zeros(slots, dtype=torch.int64, device=device)
        self.steps = torch.zeros(slots, dtype=torch.int64, device=device)
        self.seen = torch.zeros(slots, -(-vocab // 32), dtype=torch.int32, device=device)
        self.results = torch.zeros(slots, dtype=torch.int32, device=device)
        self._every = torch.arange(slots, device=device)
        # The kernel holds so many candidates; other settings are drawn with torch's own operations.
        self.by_kernel = sampling.greedy or 1 <= sampling.top_k <= min(kernel.MOST_CANDIDATES, vocab)
        if self.by_kernel:
            most = kernel.capacity(sampling.top_k)
            self._maxima = torch.zeros(slots, kernel.blocks(vocab), device=device)
            self._candidates = None if sampling.greedy else torch.zeros(slots, most, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def draw(self, logits: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Draw a token for each row of the logits [rows, vocab] and advance its slot; return the results [rows].

        `slots` [rows] int32, -1 for an idle row. A result is the token, or NOT_FINITE or TOO_MANY_TIES, with which the
        slot stays as it is. The next call overwrites the results.
        """
        rows = len(slots)
        results = self.results[:rows]
        if not self.by_kernel:
            results.fill_(kernel.TOO_MANY_TIES)
            self.draw_ties(logits, slots)
            return results
        own = self._sampling
        kernel.draw(
            self._launch, logits, slots, self.tokens, self.positions, self.seeds, self.steps, self.seen,
            penalty=own.repetition_penalty, temperature=own.temperature, top_k=own.top_k, top_p=own.top_p,
            greedy=own.greedy, maxima=self._maxima[:rows],
            candidates=None if self._candidates is None else self._candidates[:rows], results=results,
        )  # fmt: skip
        return results

    @torch.inference_mode()
    def draw_ties(self, logits: torch.Tensor, slots: torch.Tensor) -> None:
        """Draw, from the whole sorted vocabulary, for those rows whose result is TOO_MANY_TIES."""
        for first in range(0, len(slots), _SORTED_ROWS):
            piece = slice(first, min(first + _SORTED_ROWS, len(slots)))
            self._draw_sorted(logits[piece], slots[piece], self.results[piece], self._every[piece])

    def _draw_sorted(
        self, logits: torch.Tensor, slots: torch.Tensor, results: torch.Tensor, every: torch.Tensor
    ) -> None:
        rows, at = len(slots), slots.long()
        wanted = (results == kernel.TOO_MANY_TIES) & (slots >= 0)
        own = at.clamp(min=0)
        scores = logits.float()
        if self._sampling.repetition_penalty != 1:
            scores = torch.where(self._known(own), penalised(scores, self._sampling.repetition_penalty), scores)
        nothing = Seen(
            torch.zeros(rows, 0, dtype=torch.long, device=logits.device), torch.zeros(rows, device=logits.device)
        )
        plain = self._sampling.replace(repetition_penalty=1.0)
        candidates = top_candidates(scores, nothing, plain, thorough=True)
        drawn = draw(candidates, self.seeds[own], self.steps[own], plain).int()
        finite = (scores < torch.inf).all(dim=-1) & (candidates.values[:, 0] > -torch.inf)  # as in the kernel
        results.copy_(torch.where(wanted, torch.where(finite, drawn, kernel.NOT_FINITE), results))
        good = wanted & finite
        # Rows without a draw write back to their slot what it holds.
        target = torch.where(slots >= 0, at, every)
        word, bit = (drawn // 32).long(), torch.ones_like(drawn) << (drawn % 32)
        for tensor, value in (
            (self.tokens, drawn),
            (self.positions, self.positions[target] + 1),
            (self.steps, self.steps[target] + 1),
        ):
            tensor[target] = torch.where(good, value.to(tensor.dtype), tensor[target])
        seen = self.seen[target, word]
        self.seen[target, word] = torch.where(good, seen | bit, seen)

    def _known(self, slots: torch.Tensor) -> torch.Tensor:
        """Return which ids the slots' rows have seen, [rows, vocab]."""
        bits = torch.arange(32, dtype=torch.int32, device=self.seen.device)
        known = ((self.seen[slots][:, :, None] >> bits) & 1).bool()
        return known.view(len(slots), -1)[:, : self._vocab]

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Copy all that is known of a slot to another one."""
        for tensor in self._known_of_slots():
            tensor[target].copy_(tensor[source])

    def enlarged(self, slots: int) -> SlotState:
        """Return a copy for more slots, none of which is active."""
        made = SlotState(slots, self._vocab, self._sampling, self._launch, self.tokens.device)
        for new, old in zip(made._known_of_slots(), self._known_of_slots(), strict=True):
            new[: len(old)].copy_(old)
        return made

    def _known_of_slots(self) -> tuple[torch.Tensor, ...]:
        return self.tokens, self.positions, self.seeds, self.steps, self.seen


def bitmap(ids: Sequence[int], vocab: int) -> npt.NDArray[np.int32]:
    """Return a bitmap of ids, [ceil(vocab / 32)]."""
    words = np.zeros(-(-vocab // 32), np.uint32)
    each = np.array(ids, np.int64)
    np.bitwise_or.at(words, each // 32, np.uint32(1) << (each % 32).astype(np.uint32))
    return words.view(np.int32)
