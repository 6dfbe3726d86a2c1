"""How the next token is chosen, as logits processors that transformers' own `generate` runs at every step.

The last of them draws the token itself, from numbers that depend on row seed, step and token id alone, and leaves
`generate` nothing but to take the likeliest. So a row's draws are its own: they are the same beside other rows, alone,
after a resume and in a retry of its batch, which one random stream for a whole batch could not give.
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

from gxr_batch.settings import Sampling

# The constants of splitmix64, a published mixing function, as signed 64-bit integers; its products wrap around.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
# More candidates than this are not worth picking out of the vocabulary before they get their numbers.
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
    """Draws one token a row from the scores and leaves that token alone as possible.

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
        noisy = values.double() - torch.log(-torch.log(uniform(self._seeds, step, ids)))
        drawn = ids.gather(1, noisy.argmax(-1, keepdim=True))
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


def uniform(seeds: torch.Tensor, step: int, ids: torch.Tensor) -> torch.Tensor:
    """Return numbers between 0 and 1, both excluded, for token ids (rows, n): a function of seed, step and id alone."""
    row = _mix(_mix(seeds * _STEP + 1) + step * _STEP)
    mixed = _mix(row[:, None] + ids * _STEP)
    # The upper 53 bits; half a unit more keeps zero out, and with it an infinite logarithm.
    return (((mixed >> 11) & (2**53 - 1)).double() + 0.5) * 2.0**-53


def _mix(state: torch.Tensor) -> torch.Tensor:
    """Spread every bit of 64 over all of them. The masks make torch's arithmetic shift a logical one."""
    state = (state ^ ((state >> 30) & (2**34 - 1))) * _MIX_1
    state = (state ^ ((state >> 27) & (2**37 - 1))) * _MIX_2
    return state ^ ((state >> 31) & (2**33 - 1))
