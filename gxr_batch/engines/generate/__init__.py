"""The reference engine: padded batches through transformers' own `generate`, for every model that transformers drives.

It is plain rather than fast: a batch is full until its last row ends. Draws belong to the row (see `sampling`), but a
row's neighbours still decide the shape of the matrices, and with it the last bits of its logits. Heavy imports happen
when the model is opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gxr_batch.engines.base import Encoder, Identity
from gxr_batch.job import Job

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gxr_batch.engines.generate.session import GenerateSession

KIND = "generate"


class GenerateEngine:
    """Generates with the weights that `model.path` names."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._identity: Identity | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def identity(self) -> Identity:
        """Say which weights would be loaded. Raises ModelUnavailable where they cannot be found."""
        from gxr_batch.models.loading import identity

        if self._identity is None:
            origin = identity(self._job.model)
            self._identity = Identity(
                kind=KIND, model=origin.model, revision=origin.revision, weights_sha256=origin.weights_sha256
            )
        return self._identity

    def encoder(self) -> Encoder:
        """Return the encoder of the model's tokenizer. Raises ModelUnavailable where it cannot be loaded."""
        from gxr_batch.models.encoding import ChatEncoder

        return ChatEncoder(self._load_tokenizer(), format=self._job.prompt.format)

    @contextmanager
    def open(self) -> Iterator[GenerateSession]:
        """Load the model and keep it for the block. Raises ModelUnavailable where the machine cannot do it now."""
        from gxr_batch.engines.generate.session import open_session

        with open_session(self._job, self.identity(), self._load_tokenizer()) as session:
            yield session

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        from gxr_batch.models.loading import load_tokenizer

        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._job.model)
        return self._tokenizer
