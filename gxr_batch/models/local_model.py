"""A model on this machine, as shared by the engines that run it: its identity, its tokenizer, its encoder."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from gxr_batch.forms.limits import refuse_short_limit
from gxr_batch.job import Job
from gxr_batch.records import Identity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gxr_batch.models.tokens import ChatEncoder


class LocalModel:
    """A job's model, resolved once and kept; nothing is loaded before it is asked for."""

    def __init__(self, job: Job, kind: str) -> None:
        self._asked, self._kind = job, kind
        self._identity: Identity | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @cached_property
    def job(self) -> Job:
        """The job with the commits of the first look, so that a push to the hub cannot mix two models.

        Raises ModelUnavailable, JobFileError.
        """
        from gxr_batch.models.source import find

        return self._asked.with_values(find(self._asked.model, weights=False).pins())

    def identity(self) -> Identity:
        """Return which weights would be loaded. Raises ModelUnavailable if they cannot be found."""
        from gxr_batch.models.load_weights import identity

        if self._identity is None:
            origin = identity(self.job.model)
            self._identity = Identity(kind=self._kind, **vars(origin))
        return self._identity

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer. Raises ModelUnavailable if it cannot be loaded."""
        from gxr_batch.models.load_weights import load_tokenizer

        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.job.model)
        return self._tokenizer

    def encoder(self) -> ChatEncoder:
        """Return the encoder of the model's tokenizer.

        Raises ModelUnavailable if it cannot be loaded, JobFileError if the job's answers are too short for its form.
        """
        from gxr_batch.models.tokens import ChatEncoder

        encoder = ChatEncoder(self.tokenizer(), format=self._asked.prompt.format)
        refuse_short_limit(self._asked, encoder.count)
        return encoder
