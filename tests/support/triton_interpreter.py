"""Triton's interpreter, which runs kernels on the CPU, without its faults.

It keeps bfloat16 as 16-bit integers: it truncates where a GPU rounds to nearest even, and a dot multiplies the
integers. In Triton 3.6 the bounds of a loop cannot be converted to integers with NumPy 2.4. In Triton 3.9 a condition
that is broadcast becomes integers, which no mask may be. Half of its time is work that it repeats: it prepares Triton's
language again for every call of a function in a kernel, and builds a table of types for every operation.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def correct_interpreter():
    """Change the interpreter of this process; call it once."""
    _BUILDER.cast_impl, _BUILDER.create_dot = _cast, _dot
    _BUILDER.create_masked_load, _BUILDER.create_masked_store = _load, _store
    interpreter._patch_lang_tensor = _patch_tensor
    interpreter._patch_lang, interpreter._get_np_dtype = _patch_language, _numpy_type


_BUILDER = interpreter.InterpreterBuilder
_BEFORE = {
    "cast": _BUILDER.cast_impl,
    "dot": _BUILDER.create_dot,
    "load": _BUILDER.create_masked_load,
    "store": _BUILDER.create_masked_store,
    "tensor": interpreter._patch_lang_tensor,
    "language": interpreter._patch_lang,
    "type": interpreter._get_np_dtype,
}
_PATCHED: set[int] = set()  # ids of the global variables of modules with kernels
_TYPES: dict[str, np.dtype] = {}


def _patch_language(function):
    """Prepare the language that a module's kernels see, only once: the process runs kernels in no other way."""
    if id(function.__globals__) not in _PATCHED:
        _PATCHED.add(id(function.__globals__))
        _BEFORE["language"](function)
    return interpreter._LangPatchScope()


def _numpy_type(kind):
    name = kind.scalar.name
    if name not in _TYPES:
        _TYPES[name] = _BEFORE["type"](kind)
    return _TYPES[name]


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


def _load(self, pointers, mask, *rest):
    return _BEFORE["load"](self, pointers, _condition(mask), *rest)


def _store(self, pointers, value, mask, *rest):
    return _BEFORE["store"](self, pointers, value, _condition(mask), *rest)


def _condition(mask):
    return interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)


def _widened(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)
