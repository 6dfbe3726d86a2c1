"""The messages between the engine and its host process, over a pipe. Times are time.monotonic seconds.

time.monotonic is the machine's clock, so a time means the same in both processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Setup(NamedTuple):
    """The first message to a host: what vLLM is opened with.

    `arguments` are those of AsyncEngineArgs, `sampling` those of SamplingParams that all rows share. `adapter` is an
    adapter's folder, or None. `probe` is a prompt's token ids, to try before the first row.
    """

    arguments: Mapping[str, Any]
    sampling: Mapping[str, Any]
    adapter: str | None
    probe: list[int]


class Ask(NamedTuple):
    """One row to generate. `number` identifies it in every message; with `streams` its tokens are sent as drawn."""

    number: int
    token_ids: list[int]
    seed: int
    max_new_tokens: int
    streams: bool


class Forget(NamedTuple):
    """Rows that are no longer wanted."""

    numbers: tuple[int, ...]


class Close(NamedTuple):
    """Nothing more will be asked."""


class Opened(NamedTuple):
    """The model is loaded and answered the probe. `version` is vLLM's."""

    version: str


class Unopened(NamedTuple):
    """vLLM could not be opened, and why, as far as the host knows. No prompt had been sent."""

    reason: str
    about_adapter: bool = False


class Piece(NamedTuple):
    """New tokens of a row that is shown while it is generated; the last ones come with its answer."""

    number: int
    token_ids: list[int]


class Answer(NamedTuple):
    """A row that ended; `token_ids` includes its end token.

    `finish` is vLLM's finish reason, "error" for a row that it refused, with `error`. `scheduled_at`, `first_token_at`
    and `ended_at` are times; `share` is the row's part of its steps, in seconds, `rows` the mean number of rows in
    them.
    """

    number: int
    token_ids: list[int]
    finish: str
    error: str | None = None
    scheduled_at: float = 0.0
    first_token_at: float = 0.0
    ended_at: float = 0.0
    share: float = 0.0
    rows: float = 0.0


class Count(NamedTuple):
    """New tokens since the host began, and how often a row lost its cache and was started again."""

    new_tokens: int
    preemptions: int


class Gone(NamedTuple):
    """The host has ended; reported by the reader of the pipe."""
