"""The engine's own kernels for NVIDIA GPUs, in Triton, which is optional: importing this package imports nothing."""
