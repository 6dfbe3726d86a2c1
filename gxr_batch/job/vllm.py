"""The [vllm] section: what vLLM's engine is told beyond the keys that all engines share."""

from __future__ import annotations

from pydantic import Field

from gxr_batch.job.base import Section
from gxr_batch.settings import Sampling

_HOTTEST, _COOLEST = 2.0, 0.01


class VllmSection(Section):
    """The vllm engine's own keys.

    `max_restarts` bounds how often in one start an engine that died is started again; `eager` goes without vLLM's
    compiled kernels, which begins sooner and generates more slowly.
    """

    max_restarts: int = Field(default=3, ge=0, le=1000)
    eager: bool = False


def refusal(sampling: Sampling) -> str | None:
    """Return why vLLM cannot draw in this way, None where it can."""
    if sampling.temperature > _HOTTEST:
        return f"sampling.temperature must be at most {_HOTTEST:g} with the vllm engine"
    return None


def untaken(sampling: Sampling, *, cuda_graphs: bool) -> list[str]:
    """Return one sentence for each setting that vLLM takes for another or not at all."""
    found = []
    if 0 < sampling.temperature < _COOLEST:
        found.append(
            f"sampling.temperature = {sampling.temperature:g} is {_COOLEST:g} to vLLM, the least it draws with"
        )
    if cuda_graphs:
        found.append("engine.cuda_graphs has no effect with the vllm engine: vLLM records graphs unless vllm.eager")
    return found
