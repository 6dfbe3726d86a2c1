"""Triton's interpreter, which runs kernels on the CPU, without its faults.

It keeps bfloat16 as 16-bit integers: it truncates where a GPU rounds to nearest even, and a dot multiplies the
integers. And in Triton 3.6, a loop's bounds cannot be converted to integers with NumPy 2.4.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def correct_interpreter():
    """Change the interpreter of this process; call it once."""
    builder = interpreter.InterpreterBuilder
    builder.cast_impl, builder.create_dot, interpreter._patch_lang_tensor = _cast, _dot, _patch_tensor


_BEFORE = {
    "cast": interpreter.InterpreterBuilder.cast_impl,
    "dot": interpreter.InterpreterBuilder.create_dot,
    "tensor": interpreter._patch_lang_tensor,
}


def _patch_tensor(tensor, scope):
    _BEFORE["tensor"](tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _cast(self, source, target_type):
    types = source.dtype.scalar, target_type.scalar
    if types == (tl.bfloat16, tl.float32):
        return interpreter.TensorHandle(_widened(source.data), tl.float32)
    if types == (tl.float32, tl.bfloat16):
        bits = source.data.astype(np.float32).view(np.uint32)
        rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = np.where(np.isnan(source.data), (bits >> 16) | 0x40, rounded)
        return interpreter.TensorHandle(quiet.astype(np.uint16), tl.bfloat16)
    return _BEFORE["cast"](self, source, target_type)


def _dot(self, a, b, *rest):
    a, b = (
        interpreter.TensorHandle(_widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
    )
    return _BEFORE["dot"](self, a, b, *rest)


def _widened(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)
