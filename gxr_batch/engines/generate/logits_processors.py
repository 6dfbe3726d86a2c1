"""Chooses the next token, in logits processors that transformers' own `generate` runs at every step.

The last of them draws the token itself, from numbers that depend only on row seed, step and token id, and leaves
`generate` to pick the likeliest. A row's draws are therefore the same next to other rows, alone, after a resume and in
a retry of its batch, which one random stream for a whole batch could not guarantee.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gxr_batch.job.sampling import Sampling
from gxr_batch.models.gumbel_noise import gumbel

# With more candidates than this, picking them out of the vocabulary before adding noise saves nothing.
_FEW = 1024


def processors(
    sampling: Sampling, seeds: Sequence[int], prompt_width: int, device: torch.device
) -> LogitsProcessorList:
    """Return the processors for one batch, in the order in which `generate` itself would apply these settings.

    `seeds` are the row seeds, `prompt_width` the padded length of the prompts.
    """
    found: list[LogitsProcessor] = []
    if sampling.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if not sampling.greedy:
        if sampling.temperature != 1:
            found.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            found.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            found.append(TopPLogitsWarper(sampling.top_p))
        found.append(SeededDraw(seeds, prompt_width, device))
    return LogitsProcessorList(found)


class SeededDraw(LogitsProcessor):
    """Draws one token per row from the scores and leaves only that token possible.

    The likeliest of (score + Gumbel noise) is an exact draw from the softmax of the scores.
    """

    def __init__(self, seeds: Sequence[int], prompt_width: int, device: torch.device) -> None:
        self._seeds = torch.tensor(seeds, dtype=torch.int64, device=device)
        self._prompt_width = prompt_width

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        """Return scores (rows, vocabulary) that are 0 at the drawn token and -inf elsewhere."""
        step = input_ids.shape[1] - self._prompt_width
        most = int((scores > -torch.inf).sum(-1).max())
        if most <= _FEW:
            values, ids = scores.topk(most)
        else:
            values, ids = scores, torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
        noisy = values.double() + gumbel(self._seeds, torch.full_like(self._seeds, step), ids)
        drawn = ids.gather(1, noisy.argmax(-1, keepdim=True))
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)
