"""How far a training is, for those who show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Optimizer steps done, and all. Losses are None before they are known; seconds are of this start alone."""

    step: int
    steps: int
    loss: float | None
    held_out_loss: float | None
    seconds_a_step: float | None


Show = Callable[[Standing], None]
