"""The gated activation between the two products of a feed-forward block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gxr_batch.engines.slots.gpu.launch import ACTIVATIONS, Launcher, Operand

_BLOCK = 1024


@triton.jit
def gate(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    dtype = out.dtype.element_ty
    x = tl.load(gate_up + row * 2 * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    # (1 + tanh(u)) / 2 is the sigmoid of 2u, which does not cancel where tanh is near -1.
    z = 1.5957691216057308 * (x + 0.044715 * x * x * x) if GELU else x  # 2 * sqrt(2 / pi)
    activated = (x / (1.0 + tl.exp(-z))).to(dtype)
    tl.store(out + row * WIDTH + columns, (activated.to(tl.float32) * up).to(dtype), mask=inside)


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
