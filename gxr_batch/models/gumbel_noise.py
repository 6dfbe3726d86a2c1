"""The noise that tokens are drawn with: a function of (row seed, step, token id) only, the same in every engine.

The likeliest of (score + Gumbel noise) is an exact draw from the softmax of the scores. Since the noise belongs to the
row, so does the draw, whatever other rows are in the batch.
"""

from __future__ import annotations

import torch


def gumbel(seeds: torch.Tensor, steps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return Gumbel noise [rows, n] (float64) from a hash of (row seed, step, token id)."""
    keys = _mix(_mix(seeds + 0x632BE59BD9B4E019) ^ steps)
    bits = _mix(keys[:, None] ^ (ids * -0x61C8864680B583EB))
    uniform = ((bits >> 11) & (2**53 - 1)).double().add_(0.5).mul_(2.0**-53)
    return -(-uniform.log()).log()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Scramble 64-bit integers; the finaliser of the SplitMix64 generator, in wrapping arithmetic."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & (2**33 - 1))
