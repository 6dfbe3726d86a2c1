"""Draws the next token of every row, each by its own seed: penalty, top-k, temperature, top-p, Gumbel noise.

The same distribution as transformers' processors in their order, computed on a few candidates instead of the whole
vocabulary: the repetition penalty touches seen ids only, top-k comes first and is exact (ties at the k-th value all
stay, as there), top-p works inside it. A draw depends on (row seed, step, token id) alone, never on neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from gxr_batch.models.noise import gumbel
from gxr_batch.settings import Sampling

# The vocabulary is scanned in blocks: the k best tokens lie in the k blocks with the best maxima.
_BLOCK = 512
# Candidates kept beyond k: bfloat16 logits tie often, and every tie at the k-th value counts.
_MARGIN = 64


class Candidates(NamedTuple):
    """The tokens that top-k leaves of each row: penalised logits, falling, and their ids; both [rows, candidates].

    A row with fewer candidates is filled with -inf.
    """

    values: torch.Tensor
    ids: torch.Tensor


def top_candidates(logits: torch.Tensor, seen: Sequence[torch.Tensor], sampling: Sampling) -> Candidates:
    """Return the candidates of every row.

    `logits` is [rows, vocab] in any float type; `seen` holds for each row the ids of its prompt and answer (int64, on
    the logits' device, repeats allowed). Greedy sampling has one candidate.
    """
    scores = logits.float()
    if scores.data_ptr() == logits.data_ptr():
        scores = scores.clone()
    if sampling.repetition_penalty != 1:
        for row, ids in zip(scores, seen, strict=True):
            row[ids] = penalised(row[ids], sampling.repetition_penalty)
    if sampling.greedy:
        best = scores.argmax(dim=-1, keepdim=True)
        return Candidates(scores.gather(1, best), best)
    if sampling.top_k == 0:
        values, ids = scores.sort(dim=-1, descending=True, stable=True)
        return Candidates(values, ids)
    return _top_k(scores, min(sampling.top_k, scores.shape[1]))


def penalised(values: torch.Tensor, penalty: float) -> torch.Tensor:
    """Return logits of seen ids: divided by the penalty where positive, multiplied where negative."""
    return torch.where(values > 0, values / penalty, values * penalty)


def _top_k(scores: torch.Tensor, k: int) -> Candidates:
    rows, vocab = scores.shape
    wanted = min(k + _MARGIN, vocab)
    blocks = -(-vocab // _BLOCK)
    padded = torch.nn.functional.pad(scores, (0, blocks * _BLOCK - vocab), value=-torch.inf)
    chosen = padded.view(rows, blocks, _BLOCK).amax(dim=-1).topk(min(wanted, blocks), dim=-1).indices
    chosen = chosen.sort(dim=-1).values  # rising ids, so that equal values keep the order of their ids
    ids = (chosen[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=scores.device)).view(rows, -1)
    values, order = padded.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    values, ids = values[:, :wanted], ids.gather(1, order[:, :wanted])
    floor = values[:, k - 1 : k]
    if wanted < vocab and bool((values[:, -1:] == floor).any()):
        # More ties at the k-th value than the margin holds: rare enough to sort everything.
        values, ids = scores.sort(dim=-1, descending=True, stable=True)
    return Candidates(values.masked_fill(values < floor, -torch.inf), ids)


def draw(candidates: Candidates, seeds: torch.Tensor, steps: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return one token id for each row, [rows] int64.

    `seeds` and `steps` are [rows] int64: the row's seed, and how many tokens it has so far.
    """
    values, ids = candidates
    if sampling.greedy:
        return ids[:, 0]
    scores = values.double() / sampling.temperature
    if sampling.top_p < 1:
        scores = scores.masked_fill(~nucleus(scores, sampling.top_p), -torch.inf)
    return ids.gather(1, (scores + gumbel(seeds, steps, ids)).argmax(dim=-1, keepdim=True))[:, 0]


def nucleus(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return which of the falling `scores` [rows, n] top-p keeps: all but the least likely whose sum is <= 1 - p."""
    rising = scores.flip(-1).softmax(dim=-1).cumsum(dim=-1)
    kept = (rising > 1 - top_p).flip(-1)
    kept[:, 0] = True
    return kept
