"""What the rules look at: one generated text with its row, read into words and sentences once.

Only what the rules share stands here. Texts and cells are untrusted and can be of any length: no rule looks beyond
MAX_CHARS of either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from gxr_batch.text_checks.flags.sentences import case_sentences, sentences_of, words_of

# A shorter prompt may be words that any answer holds.
_LONG_PROMPT = 120
# Far above what a model writes or a prompt holds; a bound on the work for one row.
MAX_CHARS = 20_000
_STORIES = ("comparison", "history", "presentation")


class Evidence(NamedTuple):
    """A generated text, the user turn that asked for it, the row's cells by template field, and how it ended.

    `values` has exactly the fields of the row's template; None is a missing cell. `identifiers` are the screening rules
    that hit the text, None if nobody has screened it yet.
    """

    text: str
    prompt: str
    values: Mapping[str, Any]
    finish_reason: Literal["stop", "length"]
    identifiers: Sequence[str] | None = None


class Reading:
    """An Evidence as the rules read it.

    `new` is the text without a copy of the whole prompt: what repeats the row cannot contradict it. `words`,
    `vocabulary`, `sentences` and `case` are of `new`; `case` leaves out sections that teach in general, such as a list
    of differential diagnoses. Words are in lower case, marks between them are words of their own.
    """

    __slots__ = ("case", "evidence", "new", "prompt", "says_prompt", "sentences", "text", "vocabulary", "words")

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.text = evidence.text[:MAX_CHARS]
        self.prompt = evidence.prompt[:MAX_CHARS]
        self.says_prompt = _is_said(self.prompt, self.text)
        self.new = self.text.replace(self.prompt, " ") if self.says_prompt else self.text
        self.words = words_of(self.new)
        self.vocabulary = frozenset(self.words)
        self.sentences = sentences_of(self.words)
        self.case = case_sentences(self.sentences, self.vocabulary)

    @property
    def findings(self) -> str:
        """The findings cell, "" where the row has none or its template has no such field."""
        return self.cell("findings")

    @property
    def story(self) -> str:
        """What the row tells besides its findings: comparison, history, presentation."""
        return "\n".join(filter(None, map(self.cell, _STORIES)))

    def cell(self, field: str) -> str:
        """Return a cell as text, "" where it is missing: null, blank or not a number."""
        value = self.evidence.values.get(field)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        return str(value)[:MAX_CHARS].strip()


def _is_said(prompt: str, text: str) -> bool:
    long = len(prompt) >= _LONG_PROMPT or len(prompt) * 2 >= len(text)
    return bool(prompt) and long and prompt in text
