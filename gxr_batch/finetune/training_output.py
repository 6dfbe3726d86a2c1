"""The output of a training: progress and notices, without the messages of the libraries."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gxr_batch.models.library_output import quiet_transformers

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """Optimizer steps done and in total. Losses are None until they are known; seconds are of this invocation."""

    step: int
    steps: int
    loss: float | None
    held_out_loss: float | None
    seconds_a_step: float | None


Show = Callable[[TrainingProgress], None]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence messages of the libraries inside the block; our own notices replace them."""
    loggers = [logging.getLogger(name) for name in ("accelerate", "bitsandbytes", "datasets", "peft", "trl")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with quiet_transformers(), warnings.catch_warnings():
            # Deprecated calls between the libraries do not concern the user.
            for kind in (FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", kind)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
