"""Ways to generate text, all behind one protocol (`base`). `create` picks the one that a job names."""

from __future__ import annotations

from gxr_batch.engines.base import Engine
from gxr_batch.job import Job


def resolve_kind(kind: str) -> str:
    """Return the engine that `engine.kind = "auto"` stands for, any other kind unchanged."""
    return "generate" if kind == "auto" else kind


def create(job: Job) -> Engine:
    """Return the engine that a job asks for; nothing heavy is imported or loaded yet."""
    if resolve_kind(job.engine.kind) == "echo":
        from gxr_batch.engines.echo import EchoEngine

        return EchoEngine(job)
    from gxr_batch.engines.generate import GenerateEngine

    return GenerateEngine(job)
