"""How tokens are drawn: the sampling settings, their presets, and the ranges of the user's guide to the model.

Settings outside the ranges work and are named in a warning.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy, `top_k` 0 is off, `repetition_penalty` 1 is off."""

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50
    repetition_penalty: float = 1.1

    @property
    def greedy(self) -> bool:
        """True where every draw takes the likeliest token."""
        return self.temperature == 0

    def replace(self, **changes: Any) -> Sampling:
        """Return a copy with some settings changed."""
        return dataclasses.replace(self, **changes)

    def differences(self, other: Sampling) -> set[str]:
        """Return the names of the settings in which the two differ."""
        return {name for name, value in dataclasses.asdict(self).items() if getattr(other, name) != value}

    def warnings(self) -> list[str]:
        """Return one sentence for each setting outside the guide's range; a setting that is switched off has none."""
        return [
            f"sampling.{name} = {getattr(self, name)} is outside the guide's range {low} to {high}: {reason}"
            for name, low, high, off, reason in _RANGES
            if getattr(self, name) != off and not low <= getattr(self, name) <= high
        ]


# name, lowest, highest, the value that switches it off, what happens outside
_RANGES: tuple[tuple[str, float, float, float | None, str], ...] = (
    (
        "max_new_tokens",
        64,
        512,
        None,
        "shorter answers break off, longer ones ramble and cost time and memory",
    ),
    ("temperature", 0.1, 1.5, 0, "below it answers hardly vary, above it they stop making sense"),
    ("top_p", 0.5, 1.0, None, "so small a nucleus leaves the model few words to choose from"),
    ("top_k", 10, 100, 0, "below it wording turns rigid, above it unlikely words come in"),
    (
        "repetition_penalty",
        1.0,
        1.2,
        None,
        "it then pushes the model off the medical terms that it must repeat",
    ),
)

PRESETS = {
    "default": Sampling(),
    "deterministic": Sampling(temperature=0.4),
    "creative": Sampling(temperature=0.9),
    "detailed": Sampling(max_new_tokens=384),
    "concise": Sampling(max_new_tokens=160),
}
