"""The engine protocol: a stream that pulls prompts and yields completions. Every engine implements it.

An engine takes a prompt only when it has a free slot, yields exactly one `Completion` for each prompt that it took, in
any order, and yields something at least once a second. Threads, event loops, actors, retries and out-of-memory splits
live inside the engine and show only as counts in `Pulse`. A prompt that was taken but not yielded is still to do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from gxr_batch.errors import OutOfTime
from gxr_batch.job import Job
from gxr_batch.records import Completion, Encoded, Identity, Messages, Prompt

__all__ = [
    "Create",
    "Encoder",
    "Engine",
    "EngineInfo",
    "Identity",
    "Pulse",
    "Say",
    "Session",
    "StopRequest",
    "Workers",
    "require_time",
    "silent",
]

Say = Callable[[str], None]


def silent(_sentence: str) -> None:
    """Discard the sentence."""


def require_time(until: float) -> None:
    """Raise OutOfTime from `until` (time.monotonic seconds) on."""
    if time.monotonic() >= until:
        raise OutOfTime("The engine was not ready when the run had to stop.")


class Workers(NamedTuple):
    """The processes of an engine that has several: how many are alive, how many were lost, rows that each returned."""

    alive: int
    lost: int
    rows: tuple[int, ...]


class Pulse(NamedTuple):
    """A heartbeat, yielded when no row has ended for a while.

    `new_tokens`, `splits` and `retries` (requests sent again) count since the session was opened; `memory_bytes` is the
    device memory in use, 0 if unknown; `workers` is None for an engine with one process. With `notices`, new sentences
    for the user, `Session.info` may have changed.
    """

    new_tokens: int
    rows_in_flight: int
    memory_bytes: int = 0
    splits: int = 0
    retries: int = 0
    workers: Workers | None = None
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What an opened engine reports about itself; stored in the manifest.

    `reproducible` is a promise: a row's text depends only on its prompt, row seed, model and sampling. `notices` are
    sentences for the user, `adapter` describes how the adapter was applied, None without one.
    """

    identity: Identity
    device: str
    dtype: str | None
    quantization: str | None
    slots: int
    load_seconds: float
    reproducible: bool
    versions: Mapping[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    adapter: str | None = None


class StopRequest:
    """Tells a stream how to end: continue, take no more and finish by a deadline, or return now.

    Safe to set from a signal handler or another thread. A request can only become stricter.
    """

    def __init__(self) -> None:
        self._draining = threading.Event()
        self._now = threading.Event()
        self._deadline = float("inf")

    def drain(self, deadline: float) -> None:
        """Take no more prompts and return by `deadline` (time.monotonic seconds), whether or not rows are finished."""
        self._deadline = min(self._deadline, deadline)
        self._draining.set()

    def now(self) -> None:
        """Return at once; rows in flight are still to do."""
        self._draining.set()
        self._now.set()

    @property
    def admitting(self) -> bool:
        """True while the engine may take prompts."""
        return not self._draining.is_set()

    def must_return(self, monotonic_seconds: float) -> bool:
        """True once the stream must end."""
        return self._now.is_set() or (self._draining.is_set() and monotonic_seconds >= self._deadline)


class Encoder(Protocol):
    """Turns messages into what the engine counts. Needs no weights, so `check` can use it."""

    def encode(self, messages: Messages) -> Encoded:
        """Encode one prompt. Raises RowError if this row cannot be encoded."""
        ...


class Session(Protocol):
    """An engine whose model is loaded."""

    @property
    def info(self) -> EngineInfo:
        """What was loaded, where, and how."""
        ...

    def stream(self, prompts: Iterator[Prompt], stop: StopRequest) -> Iterator[Completion | Pulse]:
        """Generate for every prompt until there are no more or `stop` ends the stream.

        Raises EngineFailed only if the engine cannot continue; an error in a single row is a Completion.
        """
        ...


class Engine(Protocol):
    """A way to generate text. Constructing one is cheap and imports nothing heavy."""

    def identity(self) -> Identity:
        """Return which weights would be loaded. Raises ModelUnavailable if they cannot be found."""
        ...

    def encoder(self) -> Encoder:
        """Return the encoder. Raises ModelUnavailable if the tokenizer cannot be loaded."""
        ...

    def open(self, until: float = float("inf")) -> AbstractContextManager[Session]:
        """Load the model. Raises ModelUnavailable if the machine cannot do it now.

        What it waits for is not waited for beyond `until` (time.monotonic seconds): raises OutOfTime.
        """
        ...


Create = Callable[[Job, Say], Engine]
