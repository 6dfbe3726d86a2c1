"""Attention over pages against the softmax of the whole row, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from gpu_checks import TYPES, indices, near, randoms

from gxr_batch.engines.slots.gpu.kernels.attention import decode, prefill

ULPS = {torch.float32: 40, torch.bfloat16: 3, torch.float16: 5}


class Rows:
    """Keys and values of some slots, in shuffled pages; what no live query may read is NaN."""

    def __init__(self, random, lengths, *, keys, size, page, dtype, window=0, ring=False, seed=0):
        columns = -(-max(lengths) // page)
        if ring:
            columns = min(columns, -(-window // page) + 1)
        self.window, self.size = window, size
        order = torch.randperm(len(lengths) * columns + 1, generator=torch.Generator().manual_seed(seed))
        device = random(1).device
        self.table = order[:-1].reshape(len(lengths), columns).int().to(device)
        self.pages = torch.full((len(order), 2, keys, page, size), math.nan, dtype=dtype, device=device)
        self.kv = [random(2, keys, length, size, dtype=dtype) for length in lengths]
        for slot, kv in enumerate(self.kv):
            for position in range(kv.shape[2]):
                self.pages[self.table[slot, position // page % columns].item(), :, :, position % page] = kv[
                    :, :, position
                ]

    def attended(self, query, slot, position, scale):
        """Return what `query` [Q, D] gets at a position, flat, in float64."""
        first = max(0, position - self.window + 1) if self.window else 0
        key, value = self.kv[slot][:, :, first : position + 1].double()
        grouped = query.double().reshape(key.shape[0], -1, self.size)
        return ((grouped @ key.mT * scale).softmax(-1) @ value).flatten()


def decoded(launch, rows, queries, slots, positions, *, split, splits, scale=0.1):
    count, heads, size = queries.shape
    device = queries.device
    partial = torch.full((count, heads, splits, size), math.nan, device=device)
    sums = torch.full((count, heads, splits, 2), math.nan, device=device)
    out = torch.full((count, heads * size), math.nan, dtype=queries.dtype, device=device)
    slots, positions = indices(slots, device), indices(positions, device)
    decode(launch, queries, rows.pages, rows.table, slots, positions, rows.window, scale, split, partial, sums, out)
    return out


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("size", "page", "heads", "keys", "window"),
    [(64, 16, 2, 2, 0), (64, 64, 3, 1, 20), (64, 32, 1, 1, 70), (128, 32, 6, 2, 20), (256, 16, 4, 1, 0)],
)
def test_a_query_attends_to_its_rows_positions_only(launch, device, size, page, heads, keys, window, dtype):
    random = randoms(device)
    lengths = [1, page, page + 1, 63, 64, 65, 150]
    rows = Rows(random, lengths, keys=keys, size=size, page=page, dtype=dtype, window=window)
    queries = random(len(lengths) + 2, heads, size, dtype=dtype)
    slots = [3, 0, 6, 5, -1, 1, 2, 4, 0]  # in any order; two idle rows
    positions = [lengths[slot] - 1 for slot in slots]
    positions[-1] = -1

    out = decoded(launch, rows, queries, slots, positions, split=64, splits=3)

    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        if slot < 0 or position < 0:
            assert not out[row].any()
        else:
            near(out[row], rows.attended(queries[row], slot, position, 0.1), ulps=ULPS[dtype], floor=1)


@pytest.mark.parametrize("page", [16, 32, 64])
def test_a_ring_of_pages_holds_the_window(launch, device, page):
    random = randoms(device)
    lengths = [10, 40, 41, 130, 300]
    rows = Rows(random, lengths, keys=1, size=64, page=page, dtype=torch.float32, window=40, ring=True)
    queries = random(5, 2, 64)
    out = decoded(launch, rows, queries, range(5), [length - 1 for length in lengths], split=64, splits=2)
    for row, length in enumerate(lengths):
        near(out[row], rows.attended(queries[row], row, length - 1, 0.1), ulps=40, floor=1)


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_has_the_same_bits_in_any_company_and_with_any_scratch_memory(launch, device, dtype, window):
    random = randoms(device)
    lengths = [30, 64, 65, 128, 190, 7, 120]
    rows = Rows(random, lengths, keys=1, size=64, page=16, dtype=dtype, window=window)
    queries = random(17, 2, 64, dtype=dtype)
    slots = [row % 7 for row in range(17)]
    positions = [lengths[slot] - 1 for slot in slots]
    together = decoded(launch, rows, queries, slots, positions, split=64, splits=3)
    for row in (0, 3, 4, 16):
        alone = decoded(launch, rows, queries[row : row + 1], [slots[row]], [positions[row]], split=64, splits=5)
        assert torch.equal(alone[0], together[row])
    # Rows of one split: with and without the second kernel.
    short = [0, 1, 5]
    for splits in (1, 4):
        out = decoded(
            launch, rows, queries[short], short, [lengths[slot] - 1 for slot in short], split=64, splits=splits
        )
        assert torch.equal(out, together[short])
    assert launch.launches["combine_splits"] == launch.launches["decode_splits"] - 1


def prefilled(launch, rows, queries, counts, slots, firsts, scale=0.1):
    """Return the output of packed sequences of `counts` queries."""
    device = queries.device
    starts = indices([0, *torch.tensor(counts).cumsum(0).tolist()], device)
    out = torch.full((len(queries), queries[0].numel()), math.nan, dtype=queries.dtype, device=device)
    prefill(
        launch,
        queries,
        rows.pages,
        rows.table,
        starts,
        indices(slots, device),
        indices(firsts, device),
        max(counts),
        rows.window,
        scale,
        out,
    )
    return out


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("size", "page", "heads", "keys", "window"), [(64, 32, 4, 2, 0), (128, 16, 2, 2, 20), (256, 64, 2, 1, 20)]
)
def test_prompts_attend_causally(launch, device, size, page, heads, keys, window, dtype):
    random = randoms(device)
    counts, slots, firsts = [1, 70, 17, 5], [2, 0, 3, 1], [0, 0, 0, 60]  # the last continues its row
    lengths = [0] * 4
    for count, slot, first in zip(counts, slots, firsts, strict=True):
        lengths[slot] = first + count
    rows = Rows(random, lengths, keys=keys, size=size, page=page, dtype=dtype, window=window)
    queries = random(sum(counts), heads, size, dtype=dtype)

    out = prefilled(launch, rows, queries, counts, slots, firsts)

    row = 0
    for count, slot, first in zip(counts, slots, firsts, strict=True):
        for index in range(count):
            expected = rows.attended(queries[row], slot, first + index, 0.1)
            near(out[row], expected, ulps=ULPS[dtype], floor=1)
            row += 1


def test_a_prompt_has_the_same_bits_in_any_company_and_pieces(launch, device):
    random = randoms(device)
    rows = Rows(random, [5, 150, 80], keys=1, size=64, page=16, dtype=torch.float16, window=33)
    queries = random(235, 2, 64, dtype=torch.float16)
    together = prefilled(launch, rows, queries, [5, 150, 80], [0, 1, 2], [0, 0, 0])
    alone = prefilled(launch, rows, queries[5:155], [150], [1], [0])
    assert torch.equal(alone, together[5:155])
    pieces = [
        prefilled(launch, rows, queries[5:45], [40], [1], [0]),
        prefilled(launch, rows, queries[45:155], [110], [1], [40]),
    ]
    assert torch.equal(torch.cat(pieces), alone)


def test_a_prompts_last_piece_attends_to_a_ring_of_pages(launch, device):
    random = randoms(device)
    rows = Rows(random, [130], keys=1, size=64, page=16, dtype=torch.float32, window=40, ring=True)
    queries = random(9, 2, 64)
    out = prefilled(launch, rows, queries, [9], [0], [121])
    for row in range(9):
        near(out[row], rows.attended(queries[row], 0, 121 + row, 0.1), ulps=40, floor=1)


def test_a_prompt_in_an_idle_slot_writes_nothing(launch, device):
    random = randoms(device)
    rows = Rows(random, [5, 6], keys=1, size=64, page=16, dtype=torch.float32)
    out = prefilled(launch, rows, random(11, 2, 64), [5, 6], [-1, 1], [0, 0])
    assert out[:5].isnan().all()
    assert out[5:].isfinite().all()


def test_splits_are_whole_tiles(launch, device):
    random = randoms(device)
    rows = Rows(random, [5], keys=1, size=64, page=16, dtype=torch.float32)
    with pytest.raises(ValueError, match="split_tokens is 48"):
        decoded(launch, rows, random(1, 2, 64), [0], [4], split=48, splits=1)
