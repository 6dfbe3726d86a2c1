"""Launches Triton kernels: the only place that does, so that every operand of every kernel is checked first.

A kernel reads and writes addresses and checks nothing: a wrong shape or stride would read other rows' memory. Whatever
is wrong here is a bug of the caller, hence ValueError with the argument's name and both shapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from torch._subclasses import FakeTensor

# What operands can be: activations and products, norm weights and angles, positions and other indices.
ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)
WEIGHTS = (torch.float32,)
INDICES = (torch.int32,)
_INT32_OFFSETS = 2**31
_GRID_LIMITS = (2**31 - 1, 65535, 65535)  # CUDA's limits on blocks in x, y and z


class Operand(NamedTuple):
    """A tensor, and what its kernel takes it for.

    `shape` is the exact shape and `dtypes` the allowed types. The tensor is contiguous unless `stride` names the kernel
    argument that gets its first stride, in elements; then only what is inside one row is contiguous. `wide` means that
    the kernel computes the offset of a row in 64 bits: without it, an offset of 2**31 elements or more is refused.
    """

    tensor: torch.Tensor
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    stride: str = ""
    wide: bool = False


class Launcher:
    """Checks operands, launches, and counts launches by the kernel's name in `launches`.

    Tensors without memory (fake ones, or on the meta device) are checked and counted, not launched. `capability` is for
    tensors that are not on a GPU.
    """

    def __init__(self, capability: int = 80) -> None:
        self.launches: Counter[str] = Counter()
        self._capability = capability

    def capability(self, tensor: torch.Tensor) -> int:
        """Return the compute capability of the tensor's GPU, 80 for 8.0: the size of tiles depends on it."""
        if not tensor.is_cuda or not torch.cuda.is_available():
            return self._capability
        major, minor = torch.cuda.get_device_capability(tensor.device)
        return 10 * major + minor

    def has_matrix_unit(self, tensor: torch.Tensor) -> bool:
        """Return whether products of the tensor's type run on matrix units, which Triton uses since capability 8.0."""
        return tensor.dtype != torch.float32 and self.capability(tensor) >= 80

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        tensors: Mapping[str, Operand | None],
        numbers: Mapping[str, int | float],
        constants: Mapping[str, Any],
        *,
        warps: int = 4,
        stages: int = 2,
    ) -> None:
        """Launch `kernel` once for every index in `grid`; with an empty grid, do nothing.

        `tensors`, `numbers` and `constants` are the kernel's arguments by name; an operand of None is passed as None,
        for a kernel whose constants say that it is not read. `warps` and `stages` are num_warps and num_stages.
        Raises ValueError if an operand is not what the kernel takes it for.
        """
        name = kernel.__name__
        operands = {key: operand for key, operand in tensors.items() if operand is not None}
        for key, operand in operands.items():
            _check(f"{name}: {key}", operand)
        devices = {operand.tensor.device for operand in operands.values()}
        if len(devices) != 1:
            raise ValueError(f"{name}: operands on {len(devices)} devices: {', '.join(sorted(map(str, devices)))}")
        if any(blocks > limit for blocks, limit in zip(grid, _GRID_LIMITS, strict=False)) or len(grid) > 3:
            raise ValueError(f"{name}: a grid of {grid} is more than {_GRID_LIMITS}")
        if 0 in grid:
            return
        self.launches[name] += 1
        strides = {operand.stride: operand.tensor.stride(0) for operand in operands.values() if operand.stride}
        arguments = {key: operand and operand.tensor for key, operand in tensors.items()}
        # Products and sums are fused explicitly: Triton's default changes in 3.10, and results would change with it.
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        self._start(kernel, grid, {**arguments, **strides, **numbers, **constants}, options)

    def _start(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, Any]) -> None:
        tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
        if any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in tensors):
            return
        # Triton launches on the current device, wherever the tensors are. -1: not on a GPU, as for the interpreter.
        with torch.cuda.device(tensors[0].device if tensors[0].is_cuda else -1):
            kernel[grid](**arguments, **options)


def _check(name: str, operand: Operand) -> None:
    tensor, shape, dtypes, stride, wide = operand
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype} {tuple(shape)}, expected {', '.join(map(str, dtypes))}")
    row = tensor[0] if stride and shape and shape[0] else tensor
    if not row.is_contiguous():
        raise ValueError(f"{name} has shape {tuple(shape)} and strides {tensor.stride()}, expected contiguous memory")
    extent = (shape[0] - 1) * tensor.stride(0) + prod(shape[1:]) if stride and shape else prod(shape)
    if extent >= _INT32_OFFSETS and not wide:
        raise ValueError(f"{name} of shape {tuple(shape)} has {extent} elements, its kernel's offsets have 32 bits")
