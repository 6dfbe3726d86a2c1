"""Triton kernels and the functions that launch them; only the modules in this folder import triton."""

from triton import __version__ as TRITON_VERSION

__all__ = ["TRITON_VERSION"]
