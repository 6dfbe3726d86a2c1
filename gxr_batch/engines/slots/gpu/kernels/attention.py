"""Attention over paged keys and values: one query per row (`decode`), or whole prompts packed together (`prefill`).

A row's keys are read in tiles that begin at multiples of the tile, and a long row is cut into splits at multiples of
the split, wherever the row ends and whatever else is in the batch. So a row has the same bits alone and in any batch.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from gxr_batch.engines.slots.gpu.launch import ACTIVATIONS, INDICES, WEIGHTS, Launcher, Operand

# The matrix unit multiplies at least 16 rows: the query heads of a key head are padded to that.
_LEAST_HEADS = 16
# GPUs by compute capability whose blocks can have more than 160 KiB of shared memory; others have about 99.
_LARGE = (80, 87, 90, 100, 103)


@triton.jit
def _attend(
    query,
    pages,
    slot_pages,
    columns,
    head,
    first,
    last,
    lowest,
    highest,
    scale,
    best,
    total,
    mixed,
    start,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add the keys and values of the positions start .. start + TILE - 1 to a running softmax.

    Row i of `query` sees the positions from `lowest[i]` to `highest[i]`; nothing is read outside `first` .. `last`.
    Returns the new maximum (of logits in base 2), sum and weighted values.
    """
    position = start + tl.arange(0, TILE)
    size = tl.arange(0, SIZE)
    there = (position >= first) & (position <= last)
    page = tl.load(slot_pages + (position // PAGE) % columns, mask=there, other=0).to(tl.int64)
    rows = pages + ((page * 2 * KEYS + head) * PAGE + position % PAGE) * SIZE
    key = tl.load(rows[:, None] + size[None, :], mask=there[:, None], other=0.0)
    logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    seen = (position[None, :] >= lowest[:, None]) & (position[None, :] <= highest[:, None])
    logits = tl.where(seen, logits, float("-inf"))
    # `best` is finite from the beginning, so that a tile of which a row sees nothing adds zeros, not NaN.
    higher = tl.maximum(best, tl.max(logits, axis=1))
    weights = tl.exp2(logits - higher[:, None])
    shrink = tl.exp2(best - higher)
    value = tl.load(rows[:, None] + KEYS * PAGE * SIZE + size[None, :], mask=there[:, None], other=0.0)
    mixed = tl.dot(weights.to(value.dtype), value, mixed * shrink[:, None], input_precision="ieee")
    return higher, total * shrink + tl.sum(weights, axis=1), mixed


@triton.jit(do_not_specialize=["window", "columns", "splits"])
def decode_splits(
    queries,
    pages,
    table,
    slots,
    positions,
    partial,
    sums,
    out,
    scale,
    window,
    columns,
    splits,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    HEADS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    GROUP: tl.constexpr = QUERIES // KEYS
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(positions + row)
    slot = tl.load(slots + row)
    live = (position >= 0) & (slot >= 0)
    first = tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)
    split = first // SPLIT + tl.program_id(2)
    start = tl.maximum(first, split * SPLIT)
    end = tl.where(live, tl.minimum(position + 1, (split + 1) * SPLIT), 0)
    group = tl.arange(0, HEADS)
    size = tl.arange(0, SIZE)
    heads = row * QUERIES + head * GROUP + group
    if WHOLE or start < end:
        query = tl.load(
            queries + heads[:, None] * SIZE + size[None, :], mask=(group < GROUP)[:, None] & live, other=0.0
        )
        best = tl.full((HEADS,), -1.0e30, dtype=tl.float32)
        total = tl.zeros((HEADS,), dtype=tl.float32)
        mixed = tl.zeros((HEADS, SIZE), dtype=tl.float32)
        lowest = tl.zeros((HEADS,), dtype=tl.int32) + first
        highest = tl.zeros((HEADS,), dtype=tl.int32) + end - 1
        for tile in range(start // TILE * TILE, end, TILE):
            best, total, mixed = _attend(
                query,
                pages,
                table + slot * columns,
                columns,
                head,
                first,
                end - 1,
                lowest,
                highest,
                scale,
                best,
                total,
                mixed,
                tile,
                KEYS,
                SIZE,
                PAGE,
                TILE,
            )
        if WHOLE:
            result = tl.where(live, mixed / total[:, None], 0.0)
            tl.store(
                out + heads[:, None] * SIZE + size[None, :],
                result.to(out.dtype.element_ty),
                mask=(group < GROUP)[:, None],
            )
        else:
            part = heads * splits + tl.program_id(2)
            tl.store(partial + part[:, None] * SIZE + size[None, :], mixed, mask=(group < GROUP)[:, None])
            tl.store(sums + part * 2, best, mask=group < GROUP)
            tl.store(sums + part * 2 + 1, total, mask=group < GROUP)


@triton.jit(do_not_specialize=["window", "splits"])
def combine_splits(
    slots,
    positions,
    partial,
    sums,
    out,
    window,
    splits,
    QUERIES: tl.constexpr,
    SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row)
    live = (position >= 0) & (tl.load(slots + row) >= 0)
    first = tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)
    # The splits of this row: no others were written.
    count = tl.where(live, position // SPLIT - first // SPLIT + 1, 0)
    size = tl.arange(0, SIZE)
    head = row * QUERIES + tl.program_id(1)
    best = -1.0e30
    total = 0.0
    mixed = tl.zeros((SIZE,), dtype=tl.float32)
    for split in range(0, count):
        part = head * splits + split
        own = tl.load(sums + part * 2)
        higher = tl.maximum(best, own)
        shrink, weight = tl.exp2(best - higher), tl.exp2(own - higher)
        mixed = mixed * shrink + tl.load(partial + part * SIZE + size) * weight
        total = total * shrink + tl.load(sums + part * 2 + 1) * weight
        best = higher
    result = tl.where(live, mixed / total, 0.0)
    tl.store(out + head * SIZE + size, result.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["window", "columns"])
def prefill_tiles(
    queries,
    pages,
    table,
    starts,
    slots,
    firsts,
    out,
    scale,
    window,
    columns,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    sequence = tl.program_id(2)
    begin = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - begin
    slot = tl.load(slots + sequence)
    if tl.program_id(0) * ROWS >= count or slot < 0:
        return
    head = tl.program_id(1)
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = index < count
    size = tl.arange(0, SIZE)
    heads = (begin + index).to(tl.int64) * QUERIES + head
    query = tl.load(queries + heads[:, None] * SIZE + size[None, :], mask=inside[:, None], other=0.0)
    # A row beyond the sequence sees what the last one sees.
    highest = tl.load(firsts + sequence) + tl.minimum(index, count - 1)
    lowest = tl.where(window > 0, tl.maximum(highest - window + 1, 0), 0)
    first, last = tl.min(lowest, axis=0), tl.max(highest, axis=0)
    best = tl.full((ROWS,), -1.0e30, dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    mixed = tl.zeros((ROWS, SIZE), dtype=tl.float32)
    for tile in range(first // TILE * TILE, last + 1, TILE):
        best, total, mixed = _attend(
            query,
            pages,
            table + slot * columns,
            columns,
            head // (QUERIES // KEYS),
            first,
            last,
            lowest,
            highest,
            scale,
            best,
            total,
            mixed,
            tile,
            KEYS,
            SIZE,
            PAGE,
            TILE,
        )
    result = mixed / total[:, None]
    tl.store(out + heads[:, None] * SIZE + size[None, :], result.to(out.dtype.element_ty), mask=inside[:, None])


def decode(
    launch: Launcher,
    queries: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    window: int,
    scale: float,
    split_tokens: int,
    partial: torch.Tensor,
    sums: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Let row n of `queries` [N, Q, D] attend to the positions of its slot up to `positions[n]`.

    With a `window`, to the last `window` of them; 0 means all. `pages` is [pages, 2, K, P, D], `table` [S, R] int32,
    `slots` and `positions` are [N] int32; `out` is [N, Q * D]. A row whose slot or position is negative becomes zero.

    `partial` [N, Q, splits, D] and `sums` [N, Q, splits, 2], both float32, are scratch memory: splits * split_tokens
    must exceed every position, or, with a window, reach (splits - 1) * split_tokens >= window. `split_tokens` is a
    multiple of 64. With one split the scratch memory is not used, and the result has the same bits.
    """
    count, heads, size = queries.shape
    page_count, _, keys, page, _ = pages.shape
    if split_tokens % 64:
        raise ValueError(f"split_tokens is {split_tokens}, not a multiple of 64")
    splits = partial.shape[2]
    reached = min(splits, -(-window // split_tokens) + 1) if window else splits
    rows = {"slots": Operand(slots, (count,), INDICES), "positions": Operand(positions, (count,), INDICES)}
    results = {
        "partial": Operand(partial, (count, heads, splits, size), WEIGHTS, wide=True),
        "sums": Operand(sums, (count, heads, splits, 2), WEIGHTS, wide=True),
        "out": Operand(out, (count, heads * size), (queries.dtype,), wide=True),
    }
    launch(
        decode_splits,
        (count, keys, reached),
        {
            "queries": Operand(queries, (count, heads, size), ACTIVATIONS, wide=True),
            "pages": Operand(pages, (page_count, 2, keys, page, size), (queries.dtype,), wide=True),
            "table": Operand(table, tuple(table.shape), INDICES),
            **rows,
            **results,
        },
        {"scale": scale * math.log2(math.e), "window": window, "columns": table.shape[1], "splits": splits},
        {
            "QUERIES": heads,
            "KEYS": keys,
            "SIZE": size,
            "PAGE": page,
            "TILE": 32 if launch.has_matrix_unit(queries) else 16,
            "SPLIT": split_tokens,
            "HEADS": max(_LEAST_HEADS, triton.next_power_of_2(heads // keys)),
            "WHOLE": splits == 1,
        },
    )
    if splits > 1:
        launch(
            combine_splits,
            (count, heads),
            {**rows, **results},
            {"window": window, "splits": splits},
            {"QUERIES": heads, "SIZE": size, "SPLIT": split_tokens},
            warps=1,
        )


def prefill(
    launch: Launcher,
    queries: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    starts: torch.Tensor,
    slots: torch.Tensor,
    firsts: torch.Tensor,
    longest: int,
    window: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Let the queries of B packed sequences attend to the positions of their slot up to their own.

    Sequence b has the rows `starts[b]` .. `starts[b + 1] - 1` of `queries` [T, Q, D] and of `out` [T, Q * D], at the
    positions from `firsts[b]` on; none has more than `longest` rows. `starts` [B + 1], `slots` [B] and `firsts` [B] are
    int32. Keys and values, those of the queries' own positions too, are in the pages. `pages`, `table` and `window` are
    as in `decode`. Nothing is written for a sequence whose slot is negative.
    """
    count, heads, size = queries.shape
    page_count, _, keys, page, _ = pages.shape
    sequences = len(slots)
    # Tiles that fit in registers and shared memory: tests/gpu/compile_kernels.py.
    if not launch.has_matrix_unit(queries):
        rows, tile, warps, stages = 32, 16, 8 if size >= 256 else 4, 2
    elif launch.capability(queries) in _LARGE:
        rows, tile, warps, stages = 64, 64, 8, 2
    else:
        rows, tile, warps, stages = (64, 32, 8, 2) if size >= 256 else (64, 64, 8, 3)
    launch(
        prefill_tiles,
        (triton.cdiv(longest, rows), heads, sequences),
        {
            "queries": Operand(queries, (count, heads, size), ACTIVATIONS, wide=True),
            "pages": Operand(pages, (page_count, 2, keys, page, size), (queries.dtype,), wide=True),
            "table": Operand(table, tuple(table.shape), INDICES),
            "starts": Operand(starts, (sequences + 1,), INDICES),
            "slots": Operand(slots, (sequences,), INDICES),
            "firsts": Operand(firsts, (sequences,), INDICES),
            "out": Operand(out, (count, heads * size), (queries.dtype,), wide=True),
        },
        {"scale": scale * math.log2(math.e), "window": window, "columns": table.shape[1]},
        {
            "QUERIES": heads,
            "KEYS": keys,
            "SIZE": size,
            "PAGE": page,
            "TILE": tile,
            "ROWS": rows,
        },
        warps=warps,
        stages=stages,
    )
