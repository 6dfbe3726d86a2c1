"""The input of the rules: one generated text with its row, split into words and sentences once.

This module has only what the rules share. Texts and cells are untrusted and can be of any length: no rule reads more
than MAX_CHARS of either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from gxr_batch.text_checks.flags.lexicon import HEADS
from gxr_batch.text_checks.flags.mentions import Mention, mentions_in
from gxr_batch.text_checks.flags.sentences import case_sentences, sentences_of, words_of

# A shorter prompt may be part of any answer by chance.
_LONG_PROMPT = 120
# Far above what a model writes or a prompt holds; it limits the work for one row.
MAX_CHARS = 20_000
_STORIES = ("comparison", "history", "presentation")


class Evidence(NamedTuple):
    """A generated text, its user turn, the row's cells by template field, and its finish reason.

    `cut` has the sections of a form that their token limit ended: the end of a flag's name, and the section's text.

    `values` has exactly the fields of the row's template; None is a missing cell. `identifiers` are the screening rules
    that hit the text, None if it has not been screened.
    """

    text: str
    prompt: str
    values: Mapping[str, Any]
    finish_reason: Literal["stop", "length"]
    identifiers: Sequence[str] | None = None
    cut: Mapping[str, str] = {}


class Reading:
    """An Evidence, prepared for the rules.

    `new` is the text without a copy of the whole prompt, since repeating the row cannot contradict it. `words`,
    `vocabulary`, `sentences` and `case` are from `new`; `case` leaves out general teaching sections, such as a list of
    differential diagnoses. Words are in lower case; punctuation marks are separate words.
    """

    __slots__ = (
        "_mentions",
        "case",
        "evidence",
        "new",
        "prompt",
        "says_prompt",
        "sentences",
        "text",
        "vocabulary",
        "words",
    )

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
        self._mentions: list[tuple[Sequence[str], bool, list[Mention]]] | None = None

    @property
    def mentions(self) -> list[tuple[Sequence[str], bool, list[Mention]]]:
        """The sentences that name findings, whether each is about the case, and its mentions."""
        if self._mentions is None:
            self._mentions = []
            if not HEADS.isdisjoint(self.vocabulary):
                case = set(map(id, self.case))
                self._mentions = [
                    (words, id(words) in case, mentions_in(words))
                    for words in self.sentences
                    if not HEADS.isdisjoint(words)
                ]
        return self._mentions

    @property
    def findings(self) -> str:
        """The findings cell, "" if the row has none or its template has no such field."""
        return self.cell("findings")

    @property
    def story(self) -> str:
        """Everything in the row besides its findings: comparison, history, presentation."""
        return "\n".join(filter(None, map(self.cell, _STORIES)))

    def cell(self, field: str) -> str:
        """Return a cell as text, "" if it is missing: null, blank or not a number."""
        value = self.evidence.values.get(field)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        return str(value)[:MAX_CHARS].strip()


def _is_said(prompt: str, text: str) -> bool:
    long = len(prompt) >= _LONG_PROMPT or len(prompt) * 2 >= len(text)
    return bool(prompt) and long and prompt in text
