"""How tokens are drawn: the sampling settings, their presets, and the ranges in the model's user guide.

Settings outside the ranges work, with a warning.
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
        """Whether every draw takes the most likely token."""
        return self.temperature == 0

    def replace(self, **changes: Any) -> Sampling:
        """Return a copy with some settings changed."""
        return dataclasses.replace(self, **changes)

    def differences(self, other: Sampling) -> set[str]:
        """Return the names of the settings in which the two differ."""
        return {name for name, value in dataclasses.asdict(self).items() if getattr(other, name) != value}

    def warnings(self) -> list[str]:
        """Return one sentence for each setting outside the guide's range; disabled settings have none."""
        return [
            f"sampling.{name} = {getattr(self, name)} is outside the guide's range {low} to {high}: {reason}"
            for name, low, high, off, reason in _RANGES
            if getattr(self, name) != off and not low <= getattr(self, name) <= high
        ]


# name, lowest, highest, the value that disables it, what happens outside
_RANGES: tuple[tuple[str, float, float, float | None, str], ...] = (
    (
        "max_new_tokens",
        64,
        512,
        None,
        "shorter answers are cut off, longer ones ramble and cost time and memory",
    ),
    ("temperature", 0.1, 1.5, 0, "below it answers hardly vary, above it they become incoherent"),
    ("top_p", 0.5, 1.0, None, "a smaller nucleus leaves the model few words to choose from"),
    ("top_k", 10, 100, 0, "below it wording becomes rigid, above it unlikely words appear"),
    (
        "repetition_penalty",
        1.0,
        1.2,
        None,
        "it then pushes the model away from medical terms that it must repeat",
    ),
)

PRESETS = {
    "default": Sampling(),
    "deterministic": Sampling(temperature=0.4),
    "creative": Sampling(temperature=0.9),
    "detailed": Sampling(max_new_tokens=384),
    "concise": Sampling(max_new_tokens=160),
}
