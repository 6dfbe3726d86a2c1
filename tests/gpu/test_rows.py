"""Norms, rotation, activation and products against torch written plainly."""

from __future__ import annotations

import math

import pytest
import torch
from gpu_checks import TYPES, indices, near, randoms

from gxr_batch.engines.slots.gpu.kernels.activation import gated, gated_in_range
from gxr_batch.engines.slots.gpu.kernels.norms import add_norms, embed
from gxr_batch.engines.slots.gpu.kernels.products import product
from gxr_batch.engines.slots.gpu.kernels.rotation import rotate_and_store

EPS = 1e-6
F32 = torch.float32
# Activations and residual.
PAIRS = [*((dtype, dtype) for dtype in TYPES), (torch.float16, F32)]


def rms(x, weight, dtype, round_first=False):
    x = x.float()
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return ((normed.to(dtype).float() if round_first else normed) * weight).to(dtype)


@pytest.mark.parametrize("round_first", [False, True])
@pytest.mark.parametrize(("dtype", "kept"), PAIRS)
@pytest.mark.parametrize("width", [48, 128, 640])
def test_embedded_tokens_are_scaled_and_normed_as_in_transformers(launch, device, width, dtype, kept, round_first):
    random = randoms(device)
    table, weight = random(11, width, dtype=dtype), random(width) + 1
    tokens, rows = indices([3, 10, 0, 7], device), indices([2, 0, 1, 0, 3], device)
    residual, out = torch.empty(5, width, dtype=kept, device=device), torch.empty(5, width, dtype=dtype, device=device)

    embed(launch, tokens, rows, table, 25.3, weight, EPS, residual, out, round_first=round_first)

    embedded = table[tokens[rows.long()].long()] * torch.tensor(25.3).to(dtype)
    assert torch.equal(residual, embedded.to(kept))
    near(out, rms(embedded, weight, dtype, round_first), ulps=8 if dtype == F32 else 1)


def test_padding_rows_and_unknown_tokens_are_embedded_as_zeros_and_stay_zeros(launch, device):
    random = randoms(device)
    table, weight = random(5, 48), random(48)
    tokens, rows = indices([1, 5, -7, 2**31 - 1], device), indices([-1, 1, 2, 3, 0], device)
    residual, out = torch.full((5, 48), math.nan, device=device), torch.full((5, 48), math.nan, device=device)

    embed(launch, tokens, rows, table, 1.0, weight, EPS, residual, out)
    assert not residual[:4].any()
    assert not out[:4].any()
    assert torch.equal(residual[4], table[1])

    add_norms(launch, torch.zeros(5, 48, device=device), residual, weight, weight, EPS, out)
    assert not residual[:4].any()
    assert not out[:4].any()


@pytest.mark.parametrize("round_first", [False, True])
@pytest.mark.parametrize("has_after", [False, True])
@pytest.mark.parametrize(("dtype", "kept"), PAIRS)
def test_added_rows_are_normed_as_in_transformers(launch, device, dtype, kept, has_after, round_first):
    random = randoms(device)
    projected, residual = random(3, 200, dtype=dtype), random(3, 200, dtype=kept, scale=30)
    after, before = (random(200) + 1 if has_after else None), random(200) + 1
    added = projected if after is None else rms(projected, after, kept, round_first)
    sums = (residual.float() + added.float()).to(kept)
    out = torch.empty(3, 200, dtype=dtype, device=device)

    add_norms(launch, projected, residual, after, before, EPS, out, round_first=round_first)

    near(residual, sums, ulps=8 if kept == F32 else 2, floor=1)
    near(out, rms(residual, before, dtype, round_first), ulps=8 if dtype == F32 else 1)


@pytest.mark.parametrize("has_after", [False, True])
def test_added_rows_beyond_float16_are_kept_in_float32(launch, device, has_after):
    random = randoms(device)
    projected, residual = random(4, 200, dtype=torch.float16, scale=1000), random(4, 200, scale=1e6)
    factors = torch.tensor([1.0, 2.0**-20, 2.0**30, 0.5], device=device)
    after, before = (random(200) * 1e5 if has_after else None), random(200) + 1
    product = projected.float() * 4 * factors[:, None]
    sums = residual + (product if after is None else rms(product, after, F32))
    out = torch.empty(4, 200, dtype=torch.float16, device=device)

    add_norms(launch, projected, residual, after, before, EPS, out, factor=4.0, factors=factors)

    near(residual, sums, ulps=8, floor=1e5)
    near(out, rms(residual, before, torch.float16))


@pytest.mark.parametrize("kind", ["gelu", "silu"])
@pytest.mark.parametrize("width", [8, 100, 5000])
def test_scaled_gates_fill_the_range_that_they_get(launch, device, width, kind):
    """Rows whose numbers are beyond float16, below it, all zero, and not finite."""
    gate_up = randoms(device)(6, 2 * width, dtype=torch.float16, scale=3)
    gate_up[0] *= 3e3
    gate_up[1] *= 1e-4
    gate_up[2] = 0
    gate_up[3, 0] = math.inf
    gate_up[4, width] = math.nan
    out = torch.empty(6, width, dtype=torch.float16, device=device)
    factors = torch.empty(6, device=device)

    gated_in_range(launch, gate_up, kind, out, factors, factor=4.0, most=100.0)

    gate, up = (4 * gate_up.double()).chunk(2, dim=-1)
    activate = torch.nn.functional.gelu if kind == "gelu" else torch.nn.functional.silu
    exact = (activate(gate, approximate="tanh") if kind == "gelu" else activate(gate)) * up
    good = [0, 1, 2, 5]
    scales = factors[good, None].double()
    off = (out[good].double() * scales - exact[good]).abs()
    assert (off <= 2.0**-11 * exact[good].abs() + 2.0**-24 * scales + 1e-6 * exact[good].abs()).all()
    assert torch.equal(torch.frexp(factors).mantissa, torch.full((6,), 0.5, device=device))
    largest = out[[0, 1, 5]].abs().amax(dim=1)
    assert ((largest > 49) & (largest <= 100)).all()
    assert not out[2].any()
    assert not out[3].isfinite().all()
    assert not out[4].isfinite().all()


@pytest.mark.parametrize("kind", ["gelu", "silu"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [8, 1024, 1100])
def test_gates_are_rounded_before_they_are_multiplied(launch, device, width, dtype, kind):
    gate_up = randoms(device)(3, 2 * width, dtype=dtype, scale=3)
    gate_up[0, :4] = torch.tensor([0.0, -60.0, 60.0, -5.5])
    out = torch.empty(3, width, dtype=dtype, device=device)

    gated(launch, gate_up, kind, out)

    gate, up = gate_up.double().chunk(2, dim=-1)
    exact = torch.nn.functional.gelu(gate, approximate="tanh") if kind == "gelu" else torch.nn.functional.silu(gate)
    near(out, exact.to(dtype).double() * up, ulps=20 if dtype == F32 else 2, floor=1e-4)


def test_an_unknown_activation_is_a_bug(launch, device):
    with pytest.raises(ValueError, match="unknown activation: relu"):
        gated(launch, torch.zeros(1, 4, device=device), "relu", torch.zeros(1, 2, device=device))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("count", "inner", "outer"), [(1, 64, 64), (3, 96, 40), (70, 130, 65)])
def test_products_are_summed_in_float32(launch, device, count, inner, outer, dtype):
    random = randoms(device)
    wide, weight = random(count, inner + 7, dtype=dtype), random(outer, inner, dtype=dtype)
    x, out = wide[:, :inner], torch.empty(count, outer, dtype=dtype, device=device)

    product(launch, x, weight, out)

    near(out, (x.double() @ weight.double().T).to(dtype), ulps=16 if dtype == F32 else 1, floor=8)


def test_a_row_of_a_product_has_the_same_bits_in_any_company(launch, device):
    random = randoms(device)
    x, weight = random(131, 192, dtype=torch.float16), random(72, 192, dtype=torch.float16)
    alone = torch.empty(1, 72, dtype=torch.float16, device=device)
    together = torch.empty(131, 72, dtype=torch.float16, device=device)
    product(launch, x, weight, together)
    for row in (0, 63, 64, 130):
        product(launch, x[row : row + 1], weight, alone)
        assert torch.equal(alone[0], together[row])


def rotated(x, cos_sin, positions, dtype):
    """Return heads [N, heads, D] rotated in float32."""
    cosines, sines = (half.repeat(1, 2)[:, None] for half in cos_sin[positions.long()].chunk(2, dim=-1))
    left, right = x.float().chunk(2, dim=-1)
    return (x.float() * cosines + torch.cat([-right, left], dim=-1) * sines).to(dtype)


@pytest.mark.parametrize("round_first", [False, True])
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("size", "page"), [(64, 16), (128, 32), (256, 64)])
def test_heads_are_normed_and_rotated_and_keys_and_values_reach_their_pages(
    launch, device, size, page, dtype, has_norms, round_first
):
    heads, keys, columns = 4, 2, 3
    random = randoms(device)
    # Page boundaries, a page beyond the ring's last column, an idle row, an idle slot, a position beyond the capacity.
    positions = indices([0, page - 1, page, columns * page + 1, -1, 5, 4 * page], device)
    slots = indices([0, 1, 1, 2, 0, -1, 2], device)
    live = [0, 1, 2, 3]
    table = indices([[4, 9, 1], [7, 2, 3], [5, 6, 8]], device)
    wide = random(7, (heads + 2 * keys) * size + 16, dtype=dtype)
    qkv = wide[:, : (heads + 2 * keys) * size]
    norms = (random(size) + 1, random(size) + 1) if has_norms else (None, None)
    angles = random(4 * page, size // 2)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    pages = random(10, 2, keys, page, size, dtype=dtype)
    queries = torch.full((7, heads, size), math.nan, dtype=dtype, device=device)
    expected = pages.clone()

    rotate_and_store(
        launch, qkv, *norms, EPS, cos_sin, positions, slots, table, pages, queries, round_first=round_first
    )

    q, k, v = qkv.reshape(7, -1, size)[live].split([heads, keys, keys], dim=1)
    if has_norms:
        q, k = rms(q, norms[0], dtype, round_first), rms(k, norms[1], dtype, round_first)
    tolerance = {"ulps": 8 if dtype == F32 else 2, "floor": 1}
    near(queries[live], rotated(q, cos_sin, positions[live], dtype), **tolerance)
    assert not queries[4:].any()
    k = rotated(k, cos_sin, positions[live], dtype)
    for row in live:
        position, slot = positions[row].item(), slots[row].item()
        target = expected[table[slot, position // page % columns].item(), :, :, position % page]
        target[0], target[1] = k[row], v[row]
    near(pages, expected, **tolerance)
    assert torch.equal(pages[:, 1], expected[:, 1])


def test_a_table_entry_that_is_no_page_stores_nothing(launch, device):
    pages = torch.zeros(3, 2, 1, 16, 64, device=device)
    queries, cos_sin = torch.empty(2, 1, 64, device=device), torch.ones(4, 64, device=device)
    rotate_and_store(
        launch,
        torch.ones(2, 3 * 64, device=device),
        None,
        None,
        EPS,
        cos_sin,
        indices([0, 1], device),
        indices([0, 1], device),
        indices([[-1], [3]], device),
        pages,
        queries,
    )
    assert not pages.any()


def test_rows_without_any_rows_launch_nothing(launch, device):
    empty = torch.empty(0, 48, device=device)
    none = indices([], device)
    embed(launch, none, none, torch.ones(2, 48, device=device), 1.0, torch.ones(48, device=device), EPS, empty, empty)
    gated(launch, torch.empty(0, 16, device=device), "gelu", torch.empty(0, 8, device=device))
    product(launch, empty, torch.ones(4, 48, device=device), torch.empty(0, 4, device=device))
    assert not launch.launches
