"""The fast engine: rows decode side by side in slots, never wait for each other and never change each other.

One sentence: admit, prefill, decode, sample, retire (`loop`). Policy is in `schedule`, drawing in `sampler`; the model
call is a `driver`: our own kernels (`native`) where they can drive the model, else the library's forward (`library`).
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
    from gxr_batch.engines.transformers.loop import TransformersSession

KIND = "transformers"


class TransformersEngine:
    """Generates with the weights that `model.path` names."""

    def __init__(self, job: Job, say: Say = silent) -> None:
        """`say` gets sentences for the user while the model is opened."""
        self._job, self._say = job, say
        self._local = LocalModel(job, KIND)

    def identity(self) -> Identity:
        """Say which weights would be loaded. Raises ModelUnavailable where they cannot be found."""
        return self._local.identity()

    def encoder(self) -> Encoder:
        """Return the encoder of the model's tokenizer. Raises ModelUnavailable where it cannot be loaded."""
        return self._local.encoder()

    @contextmanager
    def open(self) -> Iterator[TransformersSession]:
        """Load the model and keep it for the block. Raises ModelUnavailable where the machine cannot do it now."""
        from gxr_batch.engines.transformers.opening import open_session
        from gxr_batch.models.device_memory import Room

        with open_session(self._job, self._local, Room(self._job.engine, self._say)) as session:
            yield session
