"""Keeps the products of a layer with float16 weights within float16, whose largest number is 65,504.

The residual is in float32, but a product's output is in float16, and Gemma's may exceed it. Powers of two, which change
no digit, keep every product of a layer below it, proven from the weights. The logits are not covered: a row
with one that is not finite fails.

- A row out of an RMS norm is at most sqrt(hidden) long before the norm's weights. A number of its product with a matrix
  is therefore at most sqrt(hidden) times the length of the matrix' row, each column times its weight (Cauchy-Schwarz);
  and attention mixes values with shares that sum to one. Where such a bound is too large, the norm's weights are
  divided by a power of two, and what follows is multiplied with it again in float32.
- Gate times up has no useful bound: each of its rows is scaled to the largest numbers that `down` can sum.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from gxr_batch.engines.slots.gpu.fused_weights import Layer

_MOST = 2.0**15  # half of float16's range, since operands are rounded
_CHUNK = 1024  # rows of a matrix that are in float32 at a time


class Range(NamedTuple):
    """The norms before attention and before the feed-forward block are divided by `attention` and `mlp`.

    `inner` is the largest number that may enter the last product.
    """

    attention: float
    mlp: float
    inner: float


def in_range(layer: Layer) -> Layer:
    """Return a float16 layer with its range, and its norms divided by it."""
    hidden = len(layer.before_attention)
    longest = math.sqrt(hidden)  # of a row out of a norm; also the most that one of its numbers can be
    projected = longest * _lengths(layer.qkv, layer.before_attention)
    head_size, mixed = layer.angles.shape[1], layer.out.shape[1]
    values = projected[len(projected) - (len(projected) - mixed) // 2 :].view(-1, head_size)
    values = values.repeat_interleave(mixed // values.numel(), dim=0).flatten()  # query heads share them
    attention = [projected.max(), longest * layer.before_attention.abs().max(), _sums(layer.out, values).max()]
    gates = longest * _lengths(layer.gate_up, layer.before_mlp)
    mlp = [gates.max(), longest * layer.before_mlp.abs().max()]
    summed = float(_sums(layer.down, torch.ones_like(layer.down[0], dtype=torch.float32)).max())
    found = Range(_divisor(attention), _divisor(mlp), _MOST / max(1.0, summed))
    squared = found.attention**2
    return replace(
        layer,
        # A norm undoes the division in queries and keys; without one it is in both.
        score_scale=layer.score_scale * (1.0 if layer.query_norm is not None else squared),
        head_eps=layer.head_eps / squared,
        before_attention=layer.before_attention / found.attention,
        before_mlp=layer.before_mlp / found.mlp,
        range=found,
    )


def _lengths(matrix: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the length of each row of a matrix whose columns are multiplied with `weight`, float32."""
    return torch.cat([(rows.float() * weight).norm(dim=1) for rows in torch.split(matrix, _CHUNK)])


def _sums(matrix: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """Return the most that the product of each row with numbers of at most `most` can be, float32."""
    return torch.cat([rows.float().abs() @ most for rows in torch.split(matrix, _CHUNK)])


def _divisor(bounds: list[torch.Tensor]) -> float:
    """Return the power of two that brings the bounds into range; 1 if they are not finite, and nothing can."""
    most = float(torch.stack(bounds).max())
    return 2.0 ** max(0, math.ceil(math.log2(most / _MOST))) if 0 < most < math.inf else 1.0
