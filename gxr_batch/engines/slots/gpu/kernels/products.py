"""A matrix product for the reproducible mode: a row's bits depend neither on how many rows there are nor on its place.

A library picks its tiles, and with them the order of its sums, by the shape of the whole product. Here tiles are fixed,
and each sum runs over the inner dimension from front to back. Otherwise torch.mm is faster.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gxr_batch.engines.slots.gpu.launch import ACTIVATIONS, Launcher, Operand


@triton.jit(do_not_specialize=["count"])
def multiply(
    x,
    x_stride,
    weight,
    out,
    count,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    depth = tl.arange(0, DEPTH)
    left = x + rows[:, None] * x_stride + depth[None, :]
    right = weight + columns[None, :] * INNER + depth[:, None]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, INNER, DEPTH):
        inside = start + depth < INNER
        a = tl.load(left + start, mask=(rows < count)[:, None] & inside[None, :], other=0.0)
        b = tl.load(right + start, mask=(columns < OUTER)[None, :] & inside[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    target = out + rows[:, None] * OUTER + columns[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(rows < count)[:, None] & (columns < OUTER)[None, :])


def product(launch: Launcher, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Write `x` [N, In] times the transpose of `weight` [Out, In] to `out` [N, Out], summed in float32."""
    (count, inner), outer = x.shape, len(weight)
    # The largest tiles that fit in registers: tests/gpu/compile_kernels.py.
    rows, stages = (64, 4) if launch.has_matrix_unit(x) else (32, 2)
    columns, depth = 64, 32
    launch(
        multiply,
        (triton.cdiv(count, rows), triton.cdiv(outer, columns)),
        {
            "x": Operand(x, (count, inner), ACTIVATIONS, stride="x_stride", wide=True),
            "weight": Operand(weight, (outer, inner), (x.dtype,), wide=True),
            "out": Operand(out, (count, outer), (x.dtype,), wide=True),
        },
        {"count": count},
        {"INNER": inner, "OUTER": outer, "ROWS": rows, "COLUMNS": columns, "DEPTH": depth},
        stages=stages,
    )
