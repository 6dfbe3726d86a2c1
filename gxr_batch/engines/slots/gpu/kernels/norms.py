"""Embeddings, residual additions and RMS norms, fused so that a row is read and written once.

Rounds where transformers rounds. One program has one row, so a row's bits never depend on other rows. The padding rows
of a step (token row -1) become zeros, and stay zeros through `add_norms`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gxr_batch.engines.slots.gpu.launch import ACTIVATIONS, INDICES, WEIGHTS, Launcher, Operand


@triton.jit
def _norm(values, weight, eps, dtype: tl.constexpr, WIDTH: tl.constexpr, ROUND_FIRST: tl.constexpr):
    """Return the float32 `values` of a row, zero beyond WIDTH, as an RMS norm times `weight`, rounded to `dtype`."""
    normed = values * tl.rsqrt(tl.sum(values * values, axis=0) / WIDTH + eps)
    if ROUND_FIRST:
        normed = normed.to(dtype).to(tl.float32)
    return (normed * weight).to(dtype)


@triton.jit(do_not_specialize=["vocabulary"])
def embed_rows(
    tokens,
    rows,
    table,
    weight,
    residual,
    out,
    scale,
    eps,
    vocabulary,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(rows + row)
    token = tl.load(tokens + source, mask=source >= 0, other=-1)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    dtype = table.dtype.element_ty
    known = (token >= 0) & (token < vocabulary)  # never reads outside the table, whatever the token is
    embedding = tl.load(table + token.to(tl.int64) * WIDTH + columns, mask=inside & known, other=0.0)
    factor = tl.full((1,), scale, tl.float32).to(dtype).to(tl.float32)
    scaled = (embedding.to(tl.float32) * factor).to(dtype)
    kept = scaled.to(residual.dtype.element_ty)
    tl.store(residual + row * WIDTH + columns, kept, mask=inside)
    weights = tl.load(weight + columns, mask=inside, other=0.0)
    tl.store(
        out + row * WIDTH + columns,
        _norm(kept.to(tl.float32), weights, eps, dtype, WIDTH, ROUND_FIRST),
        mask=inside,
    )


@triton.jit
def add_and_norm(
    projected,
    factors,
    residual,
    after,
    before,
    out,
    factor,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    HAS_AFTER: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    dtype = out.dtype.element_ty
    added = tl.load(projected + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32) * factor
    if HAS_FACTORS:
        added = added * tl.load(factors + row)
    sums = residual.dtype.element_ty
    if HAS_AFTER:
        weights = tl.load(after + columns, mask=inside, other=0.0)
        added = _norm(added, weights, eps, sums, WIDTH, ROUND_FIRST).to(tl.float32)
    before_it = tl.load(residual + row * WIDTH + columns, mask=inside, other=0.0)
    kept = (before_it.to(tl.float32) + added).to(sums)
    tl.store(residual + row * WIDTH + columns, kept, mask=inside)
    weights = tl.load(before + columns, mask=inside, other=0.0)
    tl.store(
        out + row * WIDTH + columns,
        _norm(kept.to(tl.float32), weights, eps, dtype, WIDTH, ROUND_FIRST),
        mask=inside,
    )


def embed(
    launch: Launcher,
    tokens: torch.Tensor,
    rows: torch.Tensor,
    table: torch.Tensor,
    scale: float,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor,
    out: torch.Tensor,
    *,
    round_first: bool = False,
) -> None:
    """Embed tokens and apply the first layer's norm.

    Row n of `residual` [N, H] becomes `table[tokens[rows[n]]] * scale`, rounded to the table's type, and row n of `out`
    [N, H] its RMS norm times `weight` [H] float32. `tokens` and `rows` [N] are int32, `table` is [vocabulary, H]. With
    -1 in `rows`, or a token outside the table, both rows are zero. `round_first` rounds before the multiplication by
    the weight, as Llama does.
    """
    count, width = residual.shape
    launch(
        embed_rows,
        (count,),
        {
            "tokens": Operand(tokens, (len(tokens),), INDICES),
            "rows": Operand(rows, (count,), INDICES),
            "table": Operand(table, (len(table), width), ACTIVATIONS, wide=True),
            "weight": Operand(weight, (width,), WEIGHTS),
            "residual": Operand(residual, (count, width), ACTIVATIONS, wide=True),
            "out": Operand(out, (count, width), (table.dtype,), wide=True),
        },
        {"scale": scale, "eps": eps, "vocabulary": len(table)},
        {"WIDTH": width, "BLOCK": triton.next_power_of_2(width), "ROUND_FIRST": round_first},
        warps=_warps(width, residual, out),
    )


def add_norms(
    launch: Launcher,
    projected: torch.Tensor,
    residual: torch.Tensor,
    after: torch.Tensor | None,
    before: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    *,
    factor: float = 1.0,
    factors: torch.Tensor | None = None,
    round_first: bool = False,
) -> None:
    """Add a block's output to the residual, and apply the next block's norm.

    `projected` [N, H], times `factor` and, if they are given, its row's of `factors` [N] float32, then normed with
    `after` if that is given, is added to `residual` [N, H] in place, and rounded to its type; `out` [N, H] becomes the
    residual's RMS norm times `before`. Weights are [H] float32. `round_first` as in `embed`.
    """
    count, width = residual.shape
    launch(
        add_and_norm,
        (count,),
        {
            "projected": Operand(projected, (count, width), ACTIVATIONS, wide=True),
            "factors": None if factors is None else Operand(factors, (count,), WEIGHTS),
            "residual": Operand(residual, (count, width), ACTIVATIONS, wide=True),
            "after": None if after is None else Operand(after, (width,), WEIGHTS),
            "before": Operand(before, (width,), WEIGHTS),
            "out": Operand(out, (count, width), (projected.dtype,), wide=True),
        },
        {"factor": factor, "eps": eps},
        {
            "WIDTH": width,
            "BLOCK": triton.next_power_of_2(width),
            "HAS_FACTORS": factors is not None,
            "HAS_AFTER": after is not None,
            "ROUND_FIRST": round_first,
        },
        warps=_warps(width, residual, out),
    )


def _warps(width: int, residual: torch.Tensor, out: torch.Tensor) -> int:
    # With a residual of another type, 8 warps spill registers for wide rows on compute capability 8.0 (Triton 3.9).
    return 8 if width > 1024 and (residual.dtype == out.dtype or width <= 2048) else 4
