"""What a training shows: how far it is and what the user should know, and nothing of the libraries' own chatter."""

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
    """Optimizer steps done, and all. Losses are None before they are known; seconds are of this start alone."""

    step: int
    steps: int
    loss: float | None
    held_out_loss: float | None
    seconds_a_step: float | None


Show = Callable[[TrainingProgress], None]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' chatter off stderr inside the block: what the user should know we say ourselves."""
    loggers = [logging.getLogger(name) for name in ("accelerate", "bitsandbytes", "datasets", "peft", "trl")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with quiet_transformers(), warnings.catch_warnings():
            # How the libraries use each other's old names is not the user's business.
            for kind in (FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", kind)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
