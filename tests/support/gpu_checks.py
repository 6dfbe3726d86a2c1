"""What the tests of GPU kernels share: types, random operands, and comparison in units of a type's last digit."""

from __future__ import annotations

import torch

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def near(actual, expected, *, ulps=2.0, floor=0.0):
    """Assert equality but for some units in the last place of `actual`'s type; of values below `floor`, of that."""
    assert actual.shape == expected.shape
    a, b = actual.double().cpu(), expected.double().cpu()
    allowed = ulps * torch.finfo(actual.dtype).eps * b.abs().clamp(min=floor)
    worst = ((a - b).abs() - allowed).max().item() if a.numel() else 0
    assert worst <= 0, f"off by {(a - b).abs().max():.3g}, {worst:.3g} more than {ulps} ulps"


def randoms(device, seed=0):
    """Return a function that makes the same random tensors on every machine."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, dtype=torch.float32, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)

    return random


def indices(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)
