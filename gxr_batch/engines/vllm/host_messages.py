"""What the engine and its host process say to each other, over a pipe. Moments are time.monotonic seconds.

The clock of time.monotonic is the machine's, so that both processes mean the same moment by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Setup(NamedTuple):
    """The first message to a host: what vLLM is opened with.

    `arguments` are those of AsyncEngineArgs, `sampling` those of SamplingParams that all rows share. `adapter` is the
    folder of one, None without. `probe` are token ids of a prompt to try before the first row.
    """

    arguments: Mapping[str, Any]
    sampling: Mapping[str, Any]
    adapter: str | None
    probe: list[int]


class Ask(NamedTuple):
    """One row to generate. `number` names it in every message; with `streams` its tokens come as they are drawn."""

    number: int
    token_ids: list[int]
    seed: int
    max_new_tokens: int
    streams: bool


class Forget(NamedTuple):
    """Rows that nobody waits for any more."""

    numbers: tuple[int, ...]


class Close(NamedTuple):
    """Nothing will be asked any more."""


class Opened(NamedTuple):
    """The model is loaded and answered the probe. `version` is vLLM's."""

    version: str


class Unopened(NamedTuple):
    """vLLM could not be opened, and why, as far as the host saw it. No prompt was near."""

    reason: str
    about_adapter: bool = False


class Piece(NamedTuple):
    """New tokens of a row that a person watches; the last ones come with its answer."""

    number: int
    token_ids: list[int]


class Answer(NamedTuple):
    """A row that ended, its end token included in `token_ids`.

    `finish` is vLLM's word for it, "error" for a row that it refused, with `error`. `scheduled_at`, `first_token_at`
    and `ended_at` are moments; `share` is the row's part of the steps it was in, in seconds, `rows` their mean number.
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
    """New tokens since the host began, and how often a row had to give its cache back and begin anew."""

    new_tokens: int
    preemptions: int


class Gone(NamedTuple):
    """The host is no more; said by the reader of the pipe."""
