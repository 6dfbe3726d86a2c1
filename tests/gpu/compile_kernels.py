"""Compile every GPU kernel for real models and GPUs; needs Triton, but no GPU.

Prints registers, spilled bytes and shared memory of each, and exits with 1 if a kernel spills registers or needs more
shared memory than the GPU has: `python tests/gpu/compile_kernels.py --model 1b --target 90`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from gxr_batch.engines.slots.gpu.kernels.activation import gated, gated_in_range
from gxr_batch.engines.slots.gpu.kernels.attention import decode, prefill
from gxr_batch.engines.slots.gpu.kernels.norms import add_norms, embed
from gxr_batch.engines.slots.gpu.kernels.products import product
from gxr_batch.engines.slots.gpu.kernels.rotation import rotate_and_store
from gxr_batch.engines.slots.gpu.kernels.sampling import blocks, capacity, draw, forbid
from gxr_batch.engines.slots.gpu.launch import Launcher


class Shape(NamedTuple):
    """The sizes of a model that kernels are compiled for, and whether it is a Llama."""

    hidden: int
    queries: int
    keys: int
    head: int
    inner: int
    vocabulary: int
    llama: bool = False


# Gemma 3 and Llama 3.2.
MODELS = {
    "270m": Shape(640, 4, 1, 256, 2048, 262144),
    "1b": Shape(1152, 4, 1, 256, 6912, 262144),
    "4b": Shape(2560, 8, 4, 256, 10240, 262208),
    "llama-1b": Shape(2048, 32, 8, 64, 8192, 128256, llama=True),
    "llama-3b": Shape(3072, 24, 8, 128, 8192, 128256, llama=True),
}
# Shared memory that a block can have, by compute capability: T4, A100, L4, H100, B200, RTX 5090.
TARGETS = {75: 65536, 80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SLOTS, ROWS, PAGES, PAGE, COLUMNS, SPLIT, SPLITS = 128, 96, 4096, 32, 64, 512, 4


class _NoDriver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device):
        return 0


class Compiler(Launcher):
    """Compiles what it is asked to launch, and collects the figures."""

    def __init__(self, capability: int) -> None:
        super().__init__(capability)
        driver.set_active(_NoDriver(capability))
        self.figures: list[tuple[str, int, int, int]] = []

    def _start(self, kernel, grid, arguments, options):
        compiled = kernel.warmup(**arguments, grid=grid, **options)
        registers, stack = resources(compiled.asm["cubin"])
        self.figures.append((kernel.__name__, registers, stack, compiled.metadata.shared))


def resources(cubin: bytes) -> tuple[int, int]:
    """Return a kernel's registers, and bytes of its stack, where spilled ones go."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


# What the draws know of every slot, besides the seen ids.
_SLOT_TENSORS = {"tokens": torch.int32, "positions": torch.int32, "seeds": torch.int64, "steps": torch.int64}


def compile_all(launch: Launcher, model: Shape, dtype: torch.dtype) -> None:
    """Launch every kernel on tensors without memory."""

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    f32, i32 = torch.float32, torch.int32
    hidden, queries, keys, head, inner, vocabulary, llama = model
    half = dtype == torch.float16  # its residual is wider
    rows, out = tensor(ROWS, dtype=i32), tensor(ROWS, hidden)
    residual = tensor(ROWS, hidden, dtype=f32 if half else dtype)
    weight, norm = tensor(hidden, dtype=f32), None if llama else tensor(head, dtype=f32)
    tokens, table = tensor(SLOTS, dtype=i32), tensor(vocabulary, hidden)
    embed(launch, tokens, rows, table, 25.3, weight, 1e-6, residual, out, round_first=llama)
    after = None if llama else weight
    for factors in [None, tensor(ROWS, dtype=f32)] if half else [None]:
        add_norms(
            launch, tensor(ROWS, hidden), residual, after, weight, 1e-6, out, factors=factors, round_first=llama
        )  # fmt: skip
    pages, table = tensor(PAGES, 2, keys, PAGE, head), tensor(SLOTS, COLUMNS, dtype=i32)
    heads, mixed = tensor(ROWS, queries, head), tensor(ROWS, queries * head)
    qkv, angles = tensor(ROWS, (queries + 2 * keys) * head), tensor(PAGE * COLUMNS, head, dtype=f32)
    rotate_and_store(launch, qkv, norm, norm, 1e-6, angles, rows, rows, table, pages, heads)
    for splits in (1, SPLITS):
        partial, sums = (tensor(ROWS, queries, splits, width, dtype=f32) for width in (head, 2))
        decode(launch, heads, pages, table, rows, rows, 512, 0.0625, SPLIT, partial, sums, mixed)
    starts, firsts = tensor(4, dtype=i32), tensor(3, dtype=i32)
    prefill(launch, heads, pages, table, starts, firsts, firsts, 40, 512, 0.0625, mixed)
    gate_up, kind = tensor(ROWS, 2 * inner), "silu" if llama else "gelu"
    if half:
        gated_in_range(launch, gate_up, kind, tensor(ROWS, inner), tensor(ROWS, dtype=f32), factor=2.0, most=64.0)
    else:
        gated(launch, gate_up, kind, tensor(ROWS, inner))
    product(launch, out, tensor(inner, hidden), tensor(ROWS, inner))
    known = {name: tensor(SLOTS, dtype=kind) for name, kind in _SLOT_TENSORS.items()}
    seen = tensor(SLOTS, -(-vocabulary // 32), dtype=i32)
    forbid(launch, tensor(ROWS, vocabulary), tensor(ROWS, -(-vocabulary // 32), dtype=i32))
    maxima, results = tensor(ROWS, blocks(vocabulary), dtype=f32), tensor(ROWS, dtype=i32)
    for top_k in (0, 50, 256):
        candidates = tensor(ROWS, capacity(top_k), dtype=torch.int64) if top_k else None
        draw(
            launch, tensor(ROWS, vocabulary), rows, **known, seen=seen, penalty=1.1, temperature=0.7, top_k=top_k,
            top_p=0.9, greedy=not top_k, maxima=maxima, candidates=candidates, results=results,
        )  # fmt: skip


def main() -> int:
    """Print the figures; return 1 if a kernel would be slow or could not run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--target", nargs="+", type=int, choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--type", nargs="+", choices=TYPES, default=list(TYPES))
    options = parser.parse_args()
    print(f"Triton {triton.__version__}\n{'GPU':6} {'type':9} {'model':8} {'kernel':16} registers spilled shared")
    bad = 0
    for target in options.target:
        for name in options.type:
            if target < 80 and name != "float16":
                continue  # Turing has no bfloat16, and too few registers for float32
            for model in options.model:
                launch = Compiler(target)
                compile_all(launch, MODELS[model], TYPES[name])
                for kernel, registers, stack, shared in launch.figures:
                    wrong = stack > 0 or shared > TARGETS[target]
                    bad += wrong
                    figures = f"{registers:9} {stack:7} {shared:6}{' <--' if wrong else ''}"
                    print(f"sm_{target:<3} {name:9} {model:8} {kernel:16} {figures}", flush=True)
    print(f"{bad} kernels spill registers or do not fit" if bad else "no spills")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
