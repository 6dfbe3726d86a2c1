"""Makes a row's prompt and sees that it fits the model: rendered, encoded, and cut at a word where the job says so."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gxr_batch.engines.base import Encoder
from gxr_batch.errors import RowError
from gxr_batch.job import Job
from gxr_batch.prompts import Templates
from gxr_batch.prompts.render import messages_sha256, render, row_template
from gxr_batch.records import Encoded, Messages, Row

TRUNCATED = "findings_truncated"


class Fitted(NamedTuple):
    """A prompt that fits, the sha256 of its turns, and what the reviewer should know of how it was made."""

    messages: Messages
    encoded: Encoded
    sha256: str
    flags: tuple[str, ...] = ()

    def flagged(self, *flags: str) -> Fitted:
        """Return the same with more flags."""
        return self._replace(flags=self.flags + flags) if flags else self


class Fitter:
    """Fits the rows of one job. Raises RowError for a row that cannot become a prompt, and for nothing else."""

    def __init__(self, templates: Templates, job: Job, encoder: Encoder) -> None:
        self._templates, self._encoder = templates, encoder
        self._system, self._truncates = job.prompt.system, job.prompt.too_long == "truncate"
        self._room = job.model.max_seq_length - job.sampling.settings().max_new_tokens

    def fit(self, row: Row) -> Fitted:
        """Return the row's prompt. Raises RowError."""
        try:
            return self._fit(row)
        except RowError:
            raise
        except Exception as error:  # a bug, or a cell that nobody thought of: one row must not cost the night
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__}, {Path(place.filename).name} line {place.lineno}"
            raise RowError(f"the prompt could not be made ({where})") from None

    def _fit(self, row: Row) -> Fitted:
        messages, encoded = self._attempt(row, row.values)
        if self._too_long(encoded):
            if not self._truncates:
                raise RowError(
                    f"the prompt is too long: {encoded.length} tokens, and model.max_seq_length - "
                    f"sampling.max_new_tokens leaves room for {self._room}"
                )
            messages, encoded = self._cut(row)
            return Fitted(messages, encoded, messages_sha256(messages), (TRUNCATED,))
        return Fitted(messages, encoded, messages_sha256(messages))

    def _attempt(self, row: Row, values: Mapping[str, Any]) -> tuple[Messages, Encoded]:
        messages = render(row_template(self._templates, row.template), values, system=self._system)
        return messages, self._encoder.encode(messages)

    def _too_long(self, encoded: Encoded) -> bool:
        return encoded.length is not None and encoded.length > self._room

    def _cut(self, row: Row) -> tuple[Messages, Encoded]:
        """Return the prompt with as many words of its longest cell as fit."""
        texts = {name: value for name, value in row.values.items() if isinstance(value, str)}
        longest = max(texts, key=lambda name: len(texts[name]), default="")
        text = texts.get(longest, "").strip()
        ends = [gap.start() for gap in re.finditer(r"\s+", text)]
        fitting = None
        low, high = 0, len(ends)  # the first `low` ends are known to fit or not yet tried, those from `high` do not
        while low < high:
            middle = (low + high) // 2
            tried = self._attempt(row, {**row.values, longest: text[: ends[middle]]})
            if self._too_long(tried[1]):
                high = middle
            else:
                fitting, low = tried, middle + 1
        if fitting is None:
            raise RowError(f"the prompt is too long even with one word of {longest or 'its cells'}")
        return fitting
