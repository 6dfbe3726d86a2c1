"""Silences the libraries' own output while we load with them, and restores their settings afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_PROGRESS_SHOWN = ContextVar("progress_shown", default=False)


@contextmanager
def progress_on_stderr() -> Iterator[None]:
    """Let one-time preparations, such as that of the demo model, show their progress on stderr inside the block."""
    token = _PROGRESS_SHOWN.set(True)
    try:
        yield
    finally:
        _PROGRESS_SHOWN.reset(token)


def progress_shown() -> bool:
    """Return whether progress may be shown; a program that uses the library gets none unless it asks."""
    return _PROGRESS_SHOWN.get()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Let transformers log only errors and draw no bars inside the block; the previous settings are restored."""
    import logging  # here: `--help` imports this module

    from transformers.utils import logging as transformers_logging

    settings: Any = transformers_logging  # its switches have no type hints
    # On the CPU it reports in every invocation that it does without a kernel from the hub.
    chatty = logging.getLogger("bitsandbytes")
    before = chatty.level
    chatty.setLevel(logging.ERROR)
    verbosity, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        chatty.setLevel(before)
        settings.set_verbosity(verbosity)
        if bars:
            settings.enable_progress_bar()
