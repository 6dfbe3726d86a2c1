"""Ways to generate text, all behind one protocol (`base`).

`ENGINES` has a factory for every kind that a job may name, and `create` calls it. A factory imports its engine when it
is called, so that nothing heavy is loaded for an engine that nobody asked for.
"""

from __future__ import annotations

from gxr_batch.engines.base import Create, Engine, Say, silent
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


def _generate(job: Job, say: Say) -> Engine:
    from gxr_batch.engines.generate import GenerateEngine

    return GenerateEngine(job, say)


def _transformers(job: Job, say: Say) -> Engine:
    from gxr_batch.engines.slots import TransformersEngine

    return TransformersEngine(job, say)


def _vllm(job: Job, say: Say) -> Engine:
    from gxr_batch.engines.vllm import VllmEngine

    return VllmEngine(job, say)


def _api(job: Job, say: Say) -> Engine:
    from gxr_batch.engines.api import ApiEngine

    return ApiEngine(job, say)


def _ray(job: Job, say: Say) -> Engine:
    from gxr_batch.engines.ray import RayEngine

    # The factory itself travels to the workers: what this process registered is not known there.
    return RayEngine(job, say, ENGINES[job.ray.worker])


def _echo(job: Job, _say: Say) -> Engine:
    from gxr_batch.engines.echo import EchoEngine

    return EchoEngine(job)


ENGINES: dict[str, Create] = {
    "generate": _generate,
    "transformers": _transformers,
    "vllm": _vllm,
    "api": _api,
    "ray": _ray,
    "echo": _echo,
}


def register(kind: str, factory: Create) -> None:
    """Let a factory make the engines of a kind from now on, in this process and in the Ray workers that it starts.

    Ray pickles the factory, so it has to be picklable and its module importable on the workers' hosts.
    """
    ENGINES[kind] = factory


def create(job: Job, say: Say = silent) -> Engine:
    """Return the engine that a job with a settled kind asks for; nothing heavy is imported or loaded yet.

    `say` gets sentences for the user while the engine opens, which may take long where it waits for memory.
    """
    return ENGINES[job.engine.kind](job, say)
