"""Keeps what the training libraries tell each other off stderr."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from gxr_batch.models.library_output import quiet_transformers


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
