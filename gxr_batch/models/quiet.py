"""Keeps transformers' own chatter off stderr while we call it, and puts its settings back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Let transformers log errors only and draw no bars inside the block; nothing is changed at import or for good."""
    from transformers.utils import logging

    settings: Any = logging  # its switches carry no types
    verbosity, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        settings.set_verbosity(verbosity)
        if bars:
            settings.enable_progress_bar()
