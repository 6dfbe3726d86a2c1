"""The Ray engine: one actor per GPU, each running one of the other engines.

Ray starts the actors on as many hosts as there are and replaces those that are lost. `row_assignment` decides which
worker gets which row, `worker_messages` and `worker` are the exchange between driver and workers, and `session` is the
stream. Heavy imports happen when the pool is opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gxr_batch.engines.base import Create, Encoder, Identity, Say
from gxr_batch.forms import with_form_inline
from gxr_batch.job import Job

if TYPE_CHECKING:
    from gxr_batch.engines.ray.session import RaySession


class RayEngine:
    """Generates with a pool of workers. Their engine decides the texts, and so the identity and the encoder."""

    def __init__(self, job: Job, say: Say, create: Create) -> None:
        """`create` makes the workers' engine from a job, here and in each of them; `job.ray.worker` is resolved."""
        # A worker on another host may not have the form's file.
        self._job = with_form_inline(job).with_values({"engine.kind": job.ray.worker})
        self._say, self._create = say, create
        self._inner = create(self._job, say)

    def identity(self) -> Identity:
        """Return which weights the workers would load. Raises ModelUnavailable if they cannot be found."""
        return self._inner.identity()

    def encoder(self) -> Encoder:
        """Return the workers' encoder. Raises ModelUnavailable if the tokenizer cannot be loaded."""
        return self._inner.encoder()

    @contextmanager
    def open(self, until: float = float("inf")) -> Iterator[RaySession]:
        """Start the workers and wait until each is open. Raises ModelUnavailable if one cannot be opened, OutOfTime."""
        from gxr_batch.engines.ray.open_pool import open_session

        # Every worker loads what this host found, even if the hub has a newer version by then.
        job = self._job.with_values(self.identity().pins)
        with open_session(job, self._create, self._say, until) as session:
            yield session
