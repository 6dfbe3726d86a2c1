"""The [ray] section: which engine the workers of a Ray cluster hold, how many there are, and where the cluster is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from gxr_batch.job.base import Section, spelled
from gxr_batch.settings import parse_duration

WorkerKind = Literal["auto", "transformers", "generate", "echo", "api", "vllm"]
_MOST_WORKERS = 4096


class RaySection(Section):
    """The ray engine's own keys.

    Each of `workers` processes holds an engine of kind `worker` with the job's settings and has a graphics card of its
    own where the cluster has any, else `cpus_per_worker` processors. Without an `address` Ray is started on this
    machine for the run. A worker that is lost is replaced up to `max_restarts` times, as is one that has rows and gives
    no sign of life for `hung_after`; without any living worker for `give_up_after` the run ends, to be resumed.
    """

    worker: WorkerKind = "auto"
    workers: Literal["auto"] | Annotated[int, Field(ge=1, le=_MOST_WORKERS)] = "auto"
    cpus_per_worker: Literal["auto"] | Annotated[int, Field(ge=1, le=_MOST_WORKERS)] = "auto"
    address: str = ""
    max_restarts: int = Field(default=3, ge=0, le=1000)
    hung_after: str = Field(default="5m", min_length=1)
    give_up_after: str = Field(default="10m", min_length=1)

    _duration = field_validator("hung_after", "give_up_after")(spelled(parse_duration))

    @field_validator("address")
    @classmethod
    def _place_of_a_cluster(cls, value: str) -> str:
        host, colon, port = value.rpartition(":")
        if value not in {"", "auto"} and not (colon and host and port.isdecimal() and "/" not in value):
            raise ValueError(
                'must be "HOST:PORT" of the cluster\'s head, or "auto" on one of its nodes; ray:// is not followed: '
                "start gxr-batch on a node of the cluster"
            )
        return value
