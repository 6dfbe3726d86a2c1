"""Ways to generate text, all behind one protocol (`base`). `create` picks the one that a job names."""

from __future__ import annotations

from gxr_batch.engines.base import Engine, Say, silent
from gxr_batch.job import Job


def resolve_kind(job: Job) -> str:
    """Return the engine that the job means: what it names, or for "auto" the fastest one that can drive its model.

    Raises ModelUnavailable where the model's configuration cannot be read.
    """
    return _drives_the_model(job) if job.engine.kind == "auto" else job.engine.kind


def resolve_worker(job: Job) -> str:
    """Return the engine that the workers of a Ray cluster hold, in the same way."""
    return _drives_the_model(job) if job.ray.worker == "auto" else job.ray.worker


def _drives_the_model(job: Job) -> str:
    from gxr_batch.engines.slots import why_not_drivable
    from gxr_batch.models.load_weights import load_config

    return "generate" if why_not_drivable(load_config(job.model).get_text_config()) else "transformers"


def create(job: Job, say: Say = silent) -> Engine:
    """Return the engine that a job with a settled kind asks for; nothing heavy is imported or loaded yet.

    `say` gets sentences for the user while the engine opens, which may take long where it waits for memory.
    """
    if job.engine.kind == "echo":
        from gxr_batch.engines.echo import EchoEngine

        return EchoEngine(job)
    if job.engine.kind == "api":
        from gxr_batch.engines.api import ApiEngine

        return ApiEngine(job, say)
    if job.engine.kind == "vllm":
        from gxr_batch.engines.vllm import VllmEngine

        return VllmEngine(job, say)
    if job.engine.kind == "ray":
        from gxr_batch.engines.ray import RayEngine

        return RayEngine(job, say, create)
    if job.engine.kind == "generate":
        from gxr_batch.engines.generate import GenerateEngine

        return GenerateEngine(job, say)
    from gxr_batch.engines.slots import TransformersEngine

    return TransformersEngine(job, say)
