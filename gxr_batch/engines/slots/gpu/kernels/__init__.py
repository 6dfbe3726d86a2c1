"""Triton kernels and the functions that launch them; only the modules in this folder import triton."""
