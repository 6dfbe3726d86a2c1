"""From a layer's joint projection to rotated queries, and keys and values in the pages of their rows.

One program has one head of one row. Norms are rounded where transformers rounds; the rotation is computed in float32
and rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gxr_batch.engines.slots.gpu.launch import ACTIVATIONS, INDICES, WEIGHTS, Launcher, Operand


@triton.jit(do_not_specialize=["capacity", "page_count", "columns"])
def rotate_heads(
    qkv,
    qkv_stride,
    query_norm,
    key_norm,
    cos_sin,
    positions,
    slots,
    table,
    pages,
    queries,
    eps,
    capacity,
    page_count,
    columns,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    HALF: tl.constexpr = SIZE // 2
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)  # queries, then keys, then values
    position = tl.load(positions + row)
    slot = tl.load(slots + row)
    live = (position >= 0) & (position < capacity) & (slot >= 0)
    half = tl.arange(0, HALF)
    source = qkv + row * qkv_stride + head * SIZE
    dtype = qkv.dtype.element_ty
    # The two halves of the head, which the rotation mixes.
    left = tl.load(source + half, mask=live, other=0.0)
    right = tl.load(source + HALF + half, mask=live, other=0.0)
    if head < QUERIES + KEYS:
        x, y = left.to(tl.float32), right.to(tl.float32)
        if HAS_NORMS:
            weight = query_norm if head < QUERIES else key_norm
            factor = tl.rsqrt((tl.sum(x * x, axis=0) + tl.sum(y * y, axis=0)) / SIZE + eps)
            x, y = x * factor, y * factor
            if ROUND_FIRST:
                x, y = x.to(dtype).to(tl.float32), y.to(dtype).to(tl.float32)
            x = (x * tl.load(weight + half)).to(dtype).to(tl.float32)
            y = (y * tl.load(weight + HALF + half)).to(dtype).to(tl.float32)
        angles = cos_sin + position.to(tl.int64) * SIZE + half
        cosines = tl.load(angles, mask=live, other=0.0)
        sines = tl.load(angles + HALF, mask=live, other=0.0)
        left = (x * cosines - y * sines).to(dtype)
        right = (y * cosines + x * sines).to(dtype)
    if head < QUERIES:
        target = queries + (row * QUERIES + head) * SIZE + half
        tl.store(target, left)
        tl.store(target + HALF, right)
    else:
        page = tl.load(table + slot * columns + (position // PAGE) % columns, mask=live, other=-1).to(tl.int64)
        # 0 .. KEYS - 1 are the keys, KEYS .. 2 * KEYS - 1 the values: the order of a page.
        target = pages + ((page * 2 * KEYS + head - QUERIES) * PAGE + position % PAGE) * SIZE + half
        inside = live & (page >= 0) & (page < page_count)  # never writes outside the pages, whatever the table has
        tl.store(target, left, mask=inside)
        tl.store(target + HALF, right, mask=inside)


def rotate_and_store(
    launch: Launcher,
    qkv: torch.Tensor,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    table: torch.Tensor,
    pages: torch.Tensor,
    queries: torch.Tensor,
    *,
    round_first: bool = False,
) -> None:
    """Split `qkv` [N, (Q + 2 * K) * D] into `queries` [N, Q, D], and keys and values in `pages` [pages, 2, K, P, D].

    Queries and keys get an RMS norm per head, if `query_norm` and `key_norm` [D] float32 are given, and are rotated by
    the angles of their position: `cos_sin` [capacity, D] float32 has the cosines of half a head, then its sines.
    `positions` and `slots` are [N] int32, `table` [S, R] int32. A row whose position or slot is negative, or whose
    position is beyond the capacity, is idle: its queries are zero and it stores nothing. `round_first` as in `embed`.
    """
    count, heads, size = queries.shape
    page_count, _, keys, page, _ = pages.shape
    launch(
        rotate_heads,
        (count, heads + 2 * keys),
        {
            "qkv": Operand(qkv, (count, (heads + 2 * keys) * size), ACTIVATIONS, stride="qkv_stride", wide=True),
            "query_norm": None if query_norm is None else Operand(query_norm, (size,), WEIGHTS),
            "key_norm": None if key_norm is None else Operand(key_norm, (size,), WEIGHTS),
            "cos_sin": Operand(cos_sin, (len(cos_sin), size), WEIGHTS, wide=True),
            "positions": Operand(positions, (count,), INDICES),
            "slots": Operand(slots, (count,), INDICES),
            "table": Operand(table, tuple(table.shape), INDICES),
            "pages": Operand(pages, (page_count, 2, keys, page, size), (qkv.dtype,), wide=True),
            "queries": Operand(queries, (count, heads, size), (qkv.dtype,), wide=True),
        },
        {"eps": eps, "capacity": len(cos_sin), "page_count": page_count, "columns": table.shape[1]},
        {
            "QUERIES": heads,
            "KEYS": keys,
            "SIZE": size,
            "PAGE": page,
            "HAS_NORMS": query_norm is not None,
            "ROUND_FIRST": round_first,
        },
        warps=1,
    )
