"""Packs the weights of linear layers once for oneDNN: equal bits, faster products. For CPUs without our own kernels.

The operators are private to torch: where this torch lacks them, or they refuse a weight, nothing changes.
"""

from __future__ import annotations

from typing import Any

import torch

# The number of rows that the packed layout is chosen for; other numbers work too.
_ROWS = 32


def pack_linears(model: Any) -> bool:
    """Replace the plain bfloat16 linear layers on the CPU by packed ones; return whether any was."""
    if not _available():
        return False
    packed = False
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and _packable(child.weight):
                setattr(module, name, PackedLinear(child))
                packed = True
    return packed


def _packable(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16


def _available() -> bool:
    operators = torch.ops.mkldnn
    return all(hasattr(operators, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))


class PackedLinear(torch.nn.Module):
    """A linear layer whose weight lies in oneDNN's own layout; `weight` is kept for who asks for its type or device."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ weight.T + bias."""
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return y
