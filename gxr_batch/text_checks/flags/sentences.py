"""Splits a text into words and sentences, and leaves out general teaching sections."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gxr_batch.text_checks.flags.lexicon import WORDS

# Hyphens separate words, so that "left-sided" has a side and "65-year-old" a number. The third branch would also match
# what the first one does, but more slowly: most words are plain.
_WORD = re.compile(r"[a-z]++(?=[ \n.,;:-])|[.;:,!?()%<>|\n]|[^\W\d_]+(?:'[^\W\d_]+)?|\d+(?:[.,]\d+)*")
_ENDS = frozenset(".;!?\n")
# A longer sentence, such as that of a model in a loop, is cut: rules compare each finding with its whole sentence.
_MAX_WORDS = 150

_GENERAL_SECTIONS = WORDS["sections.general"]
_CASE_SECTIONS = WORDS["sections.case"]
_HEADING_WORDS = 6


def words_of(text: str) -> list[str]:
    """Return the words, numbers and marks of a text in lower case; typographic apostrophes become plain."""
    return _WORD.findall(text.lower().replace("\u2019", "'"))


def sentences_of(words: Sequence[str]) -> list[Sequence[str]]:
    """Return the words of each sentence, with the mark that ends it.

    Line ends and semicolons also end sentences. A sentence of more than _MAX_WORDS is several.
    """
    found = []
    start = 0
    for at in [place for place, word in enumerate(words) if word in _ENDS]:
        if at > start:
            found.append(words[start : at + 1])
        start = at + 1
    if start < len(words):
        found.append(words[start:])
    if max(map(len, found), default=0) <= _MAX_WORDS:
        return found
    return [sentence[at : at + _MAX_WORDS] for sentence in found for at in range(0, len(sentence), _MAX_WORDS)]


def case_sentences(sentences: list[Sequence[str]], vocabulary: frozenset[str]) -> list[Sequence[str]]:
    """Return the sentences without those under a heading such as "Differential diagnosis"."""
    if _GENERAL_SECTIONS.isdisjoint(vocabulary):
        return sentences
    kept = []
    general = False
    for sentence in sentences:
        heading = _heading(sentence)
        if heading and not _GENERAL_SECTIONS.isdisjoint(heading):
            general = True
        elif heading and not _CASE_SECTIONS.isdisjoint(heading):
            general = False
        if not general:
            kept.append(sentence)
    return kept


def _heading(sentence: Sequence[str]) -> Sequence[str]:
    """Return the words before an early colon, or all words of a short line without a full stop; else nothing."""
    label = sentence[: _HEADING_WORDS + 2]
    if ":" in label:
        return label[: label.index(":")]
    return sentence if len(sentence) <= _HEADING_WORDS + 1 and sentence[-1] not in ".;!?" else ()
