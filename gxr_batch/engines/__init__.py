"""Ways to generate text, all behind one protocol (`base`).

`ENGINES` maps each kind that a job may name to its factory, and `create` calls it. Factories import their engine when
they are called, so an engine that is not used loads nothing heavy.
"""

from __future__ import annotations

from gxr_batch.engines.base import Create, Engine, Say, silent
from gxr_batch.job import Job


def resolve_kind(job: Job) -> str:
    """Return the engine that the job means: the one it names, or for "auto" the fastest that can run its model.

    Raises ModelUnavailable if the model's configuration cannot be read.
    """
    return _drives_the_model(job) if job.engine.kind == "auto" else job.engine.kind


def resolve_worker(job: Job) -> str:
    """Return the kind of engine that Ray workers run, resolved the same way."""
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

    # The factory itself is sent to the workers: kinds registered in this process are unknown there.
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
    """Register a factory for a kind of engine, in this process and in the Ray workers that it starts.

    Ray pickles the factory, so it must be picklable and its module importable on the workers' hosts.
    """
    ENGINES[kind] = factory


def create(job: Job, say: Say = silent) -> Engine:
    """Return the engine for a job whose kind is resolved; nothing heavy is imported or loaded yet.

    `say` gets sentences for the user while the engine opens, which may take long if it waits for memory.
    """
    return ENGINES[job.engine.kind](job, say)
