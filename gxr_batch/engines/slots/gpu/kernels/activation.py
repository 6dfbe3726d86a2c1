"""The gated activation between the two products of a feed-forward block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gxr_batch.engines.slots.gpu.launch import ACTIVATIONS, WEIGHTS, Launcher, Operand

_BLOCK = 1024
_LONG_BLOCK = 4096  # where one program has a whole row


@triton.jit
def _activated(x, GELU: tl.constexpr):
    # (1 + tanh(u)) / 2 is the sigmoid of 2u, which does not cancel where tanh is near -1.
    z = 1.5957691216057308 * (x + 0.044715 * x * x * x) if GELU else x  # 2 * sqrt(2 / pi)
    return x / (1.0 + tl.exp(-z))


@triton.jit
def gate(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    dtype = out.dtype.element_ty
    x = tl.load(gate_up + row * 2 * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    activated = _activated(x, GELU).to(dtype)
    tl.store(out + row * WIDTH + columns, (activated.to(tl.float32) * up).to(dtype), mask=inside)


@triton.jit
def _gated(source, start, factor, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    columns = start + tl.arange(0, BLOCK)
    x = tl.load(source + columns, mask=columns < WIDTH, other=0.0).to(tl.float32) * factor
    up = tl.load(source + WIDTH + columns, mask=columns < WIDTH, other=0.0).to(tl.float32) * factor
    return _activated(x, GELU) * up


@triton.jit
def gate_in_range(gate_up, out, factors, factor, most, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    source = gate_up + row * 2 * WIDTH
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, WIDTH, BLOCK):
        largest = tl.maximum(largest, tl.abs(_gated(source, start, factor, WIDTH, BLOCK, GELU)))
    ratio = most / tl.maximum(tl.max(largest, axis=0), 1e-20)
    exponent = ratio.to(tl.int32, bitcast=True) & 0x7F800000  # that of the power of two at or below it
    scale = exponent.to(tl.float32, bitcast=True)
    tl.store(factors + row, (0x7F000000 - exponent).to(tl.float32, bitcast=True))  # its inverse
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = _gated(source, start, factor, WIDTH, BLOCK, GELU) * scale
        tl.store(out + row * WIDTH + columns, values.to(out.dtype.element_ty), mask=columns < WIDTH)


def gated(launch: Launcher, gate_up: torch.Tensor, kind: str, out: torch.Tensor) -> None:
    """Write the activation of the first half of `gate_up` [N, 2 * I] times its second half to `out` [N, I].

    `kind` is "gelu" (in its tanh approximation) or "silu". The activation is rounded before the multiplication, as
    transformers does.
    """
    if kind not in ("gelu", "silu"):
        raise ValueError(f"unknown activation: {kind}")
    count, width = out.shape
    launch(
        gate,
        (count, triton.cdiv(width, _BLOCK)),
        {
            "gate_up": Operand(gate_up, (count, 2 * width), ACTIVATIONS, wide=True),
            "out": Operand(out, (count, width), (gate_up.dtype,), wide=True),
        },
        {},
        {"WIDTH": width, "BLOCK": _BLOCK, "GELU": kind == "gelu"},
    )


def gated_in_range(
    launch: Launcher,
    gate_up: torch.Tensor,
    kind: str,
    out: torch.Tensor,
    factors: torch.Tensor,
    *,
    factor: float,
    most: float,
) -> None:
    """As `gated`, of `gate_up` times `factor`, with each row of `out` scaled so that its numbers are at most `most`.

    The scale is a power of two, the largest that does; `factors` [N] float32 becomes its inverse. All is computed in
    float32 and rounded once. A row with a number that is not finite gets numbers that are not.
    """
    if kind not in ("gelu", "silu"):
        raise ValueError(f"unknown activation: {kind}")
    count, width = out.shape
    launch(
        gate_in_range,
        (count,),
        {
            "gate_up": Operand(gate_up, (count, 2 * width), ACTIVATIONS, wide=True),
            "out": Operand(out, (count, width), (gate_up.dtype,), wide=True),
            "factors": Operand(factors, (count,), WEIGHTS),
        },
        {"factor": factor, "most": most},
        {"WIDTH": width, "BLOCK": min(_LONG_BLOCK, triton.next_power_of_2(width)), "GELU": kind == "gelu"},
        warps=8,
    )
