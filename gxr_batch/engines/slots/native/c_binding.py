"""Declares the kernels' structures and functions for ctypes."""

from __future__ import annotations

import ctypes

POINTER = ctypes.c_void_p
NOT_FINITE, TOO_MANY = -1, -2  # what gxr_candidates writes instead of a row's count
_BAD_NUMBER, _NO_MEMORY = -1, -2  # what functions return, 0 for success


class Shape(ctypes.Structure):
    """The sizes of a model and of its cache."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("hidden", "heads", "kv_heads", "head_dim", "inner", "layers", "vocab")),
        *((name, ctypes.c_int) for name in ("slots", "capacity", "most_tokens", "gelu")),
        *((name, ctypes.c_float) for name in ("eps", "scale", "embed_scale")),
    ]


class Layer(ctypes.Structure):
    """One layer: packed weights, float32 norms, cosines and sines, its cache, its window (below 1: none)."""

    _fields_ = [
        *((name, POINTER) for name in ("qkv", "out", "gate_up", "down")),
        *((name, POINTER) for name in ("before_attn", "after_attn", "before_mlp", "after_mlp")),
        *((name, POINTER) for name in ("query_norm", "key_norm", "rope", "keys", "values")),
        ("window", ctypes.c_int),
    ]


class Model(ctypes.Structure):
    """All layers, the head, and the scratch memory of one call."""

    _fields_ = [
        ("shape", Shape),
        ("layers", ctypes.POINTER(Layer)),
        *((name, POINTER) for name in ("head", "embedding", "final_norm")),
        *((name, POINTER) for name in ("residual", "normed", "qkv", "mixed", "projected", "gate_up", "inner")),
    ]


def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the functions of forward.c and candidates.c."""
    integer, size = ctypes.c_int, ctypes.c_size_t
    library.gxr_allocate.restype, library.gxr_allocate.argtypes = POINTER, [size, integer]
    library.gxr_free.argtypes = [POINTER, size]
    library.gxr_pack.argtypes = [POINTER, POINTER, integer, integer]
    library.gxr_sound.argtypes = [ctypes.POINTER(Shape)]
    library.gxr_forward.argtypes = [POINTER, integer, POINTER, POINTER, POINTER]
    library.gxr_logits.argtypes = [POINTER, integer, POINTER, POINTER, POINTER, size]
    library.gxr_candidates.argtypes = [
        *(POINTER, size, integer, integer, integer, POINTER, POINTER, integer),
        *(ctypes.c_float, integer, POINTER, POINTER, POINTER),
    ]
    library.gxr_forbid.argtypes = [POINTER, size, integer, integer, POINTER, integer]
    for function in (library.gxr_forward, library.gxr_logits, library.gxr_candidates, library.gxr_forbid):
        function.restype = _succeeded
    return library


def _succeeded(status: int) -> None:
    """Raise MemoryError if a kernel got no memory, and ValueError if a number is out of range: that is a bug."""
    if status == _NO_MEMORY:
        raise MemoryError("the kernels got no memory for one step")
    if status == _BAD_NUMBER:
        raise ValueError("a number is outside of what the kernels can compute with")
