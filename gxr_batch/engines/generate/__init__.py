"""The reference engine: padded batches through transformers' own `generate`, for every model that transformers runs.

It is simple rather than fast: a batch runs until its last row ends. Draws belong to the row (see `logits_processors`),
but the other rows in the batch still decide the shape of the matrices, and with it the last bits of a row's logits.
Heavy imports happen when the model is opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gxr_batch.engines.base import Encoder, Identity, Say, silent
from gxr_batch.job import Job
from gxr_batch.models.local_model import LocalModel

if TYPE_CHECKING:
    from gxr_batch.engines.generate.session import GenerateSession

KIND = "generate"


class GenerateEngine:
    """Generates with the weights that `model.path` names."""

    def __init__(self, job: Job, say: Say = silent) -> None:
        """`say` gets sentences for the user while the model is opened."""
        self._job, self._say = job, say
        self._local = LocalModel(job, KIND)

    def identity(self) -> Identity:
        """Return which weights would be loaded. Raises ModelUnavailable if they cannot be found."""
        return self._local.identity()

    def encoder(self) -> Encoder:
        """Return the encoder of the model's tokenizer. Raises ModelUnavailable if it cannot be loaded."""
        return self._local.encoder()

    @contextmanager
    def open(self, until: float = float("inf")) -> Iterator[GenerateSession]:
        """Load the model and keep it for the block. Raises ModelUnavailable, OutOfTime."""
        from gxr_batch.engines.generate.session import open_session
        from gxr_batch.models.device_memory import MemoryBudget

        memory = MemoryBudget(self._job.engine, self._say, until)
        with open_session(self._local.job, self.identity(), self._local.tokenizer(), memory) as session:
            yield session
