"""Keeps the hub's library, and what is built on it, from asking the hub for anything but a model that the job names."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from gxr_batch.errors import ModelUnavailable


class _Setting(NamedTuple):
    """Two switches of the hub's library."""

    offline: bool
    no_telemetry: bool


_LOCK = threading.Lock()
_blocks = 0  # how many asked_only_by_fetch are entered
_users = _Setting(False, False)  # what was set before the first


@contextmanager
def asked_only_by_fetch() -> Iterator[None]:
    """Keep the hub's library offline and without telemetry inside the block, except in `hub.fetch`.

    Otherwise transformers, peft and trl send usage data, and look on the hub for files that a local folder lacks.
    """
    global _blocks, _users  # noqa: PLW0603  # the library's switches belong to the process as well
    try:
        from huggingface_hub import constants
    except ValueError:  # it reads HF_ENDPOINT
        raise bad_endpoint() from None

    with _LOCK:
        if not _blocks:
            _users = _Setting(constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY)
            constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY = True, True
        _blocks += 1
    try:
        yield
    finally:
        with _LOCK:
            _blocks -= 1
            if not _blocks:
                constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY = _users


def is_offline() -> bool:
    """Return whether the user chose offline mode."""
    from huggingface_hub import constants

    return _users.offline if _blocks else constants.is_offline_mode()


@contextmanager
def asked() -> Iterator[None]:
    """Let the hub be asked inside the block, still without telemetry, unless the user chose offline mode."""
    from huggingface_hub import constants

    with asked_only_by_fetch():
        constants.HF_HUB_OFFLINE = _users.offline
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE = True


def bad_endpoint() -> ModelUnavailable:
    """Return the error for an HF_ENDPOINT that is no web address."""
    return ModelUnavailable(
        "HF_ENDPOINT is not the address of a hub.",
        where="HF_ENDPOINT",
        next_step="unset HF_ENDPOINT, or set it to an address that begins with https:// or http://",
    )
