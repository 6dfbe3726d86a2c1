"""What a row says about chest findings: present or absent, left or right.

A finding counts as present or absent only if the findings cell says so without a hedge, and in only one way. If other
cells say otherwise (an earlier effusion, a history of pneumonia), there is no contradiction: a text may mention them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from gxr_batch.text_checks.flags.lexicon import HEADS, NO, TABLES, WORDS
from gxr_batch.text_checks.flags.mentions import Mention, mentions_in
from gxr_batch.text_checks.flags.sentences import sentences_of, words_of
from gxr_batch.text_checks.word_lists import names_by_word

_NORMAL_ROW = WORDS["case.normal_row"] | {"\n"}
_SAYS_NORMAL = NO | {"normal", "unremarkable"}
_SAME_PLACE = names_by_word(TABLES["findings"]["same_place"])


@dataclass
class _Fact:
    """What a row says about one finding, with its sides ("" = no side given)."""

    present: set[str] = field(default_factory=set)
    absent: set[str] = field(default_factory=set)
    open: bool = False
    narrowly_absent: set[str] = field(default_factory=set)


class Facts:
    """The facts in the cells of one row; `story` is everything besides its findings."""

    def __init__(self, findings: str, story: str) -> None:
        sentences = sentences_of(words_of(findings))
        self._normal = _is_normal(sentences)
        self._facts: dict[str, _Fact] = {}
        self._sides: dict[str, set[str]] = {}
        for mention, side in _said(sentences):
            fact = self._facts.setdefault(mention.finding, _Fact())
            if mention.status == "open":
                fact.open = True
                fact.narrowly_absent |= mention.restricted
            else:
                (fact.absent if mention.status == "absent" else fact.present).add(side)
            if mention.status != "absent":
                self._sides.setdefault(_place(mention.finding), set()).add(side)
        self._named: set[str] = set()
        self._had: set[str] = set()
        self._lacked: set[str] = set()
        for mention, side in _said(sentences_of(words_of(story))):
            self._named.add(mention.finding)
            if mention.status in ("absent", "present"):
                (self._lacked if mention.status == "absent" else self._had).add(mention.finding)
            self._sides.setdefault(_place(mention.finding), set()).add(side)

    def absent(self, finding: str) -> set[str]:
        """Return the sides on which the row clearly says that a finding is absent; empty if none."""
        fact = self._facts.get(finding)
        if fact is None or fact.present or fact.open or finding in self._had:
            return set()
        return fact.absent

    def present(self, finding: str) -> set[str]:
        """Return the sides on which the row clearly has a finding; empty if none."""
        fact = self._facts.get(finding)
        if fact is None or fact.absent - {"left", "right"} or finding in self._lacked:
            return set()
        return fact.present

    def positives(self) -> list[str]:
        """Return what the row has, also where another sentence of it denies a part: "No other opacity"."""
        return [name for name, fact in self._facts.items() if fact.present]

    def lacks(self, findings: Collection[str]) -> bool:
        """Return whether no cell names one of these findings, although the row names others or only says it is normal.

        Any other row that names none may be in words that the lexicon lacks.
        """
        return (bool(self._facts) or self._normal) and (self._facts.keys() | self._named).isdisjoint(findings)

    def narrowly_absent(self, finding: str) -> set[str]:
        """Return the words of "no large effusion" that say which kind of a finding the row denies; mostly empty."""
        fact = self._facts.get(finding)
        return set() if fact is None or fact.present or finding in self._had else fact.narrowly_absent

    def only_side(self, finding: str) -> str:
        """Return "left" or "right" if the row has a finding, by any name, on that side only; else ""."""
        known = self._sides.get(_place(finding), set()) - {""}
        return next(iter(known)) if len(known) == 1 and known <= {"left", "right"} else ""


def _place(finding: str) -> str:
    return _SAME_PLACE.get(finding, finding)


def _is_normal(sentences: Sequence[Sequence[str]]) -> bool:
    """Return whether a cell says no more than that the film is normal: "No acute cardiopulmonary disease"."""
    return bool(sentences) and all(
        _NORMAL_ROW.issuperset(words) and not _SAYS_NORMAL.isdisjoint(words) for words in sentences
    )


def _said(sentences: Sequence[Sequence[str]]) -> Iterator[tuple[Mention, str]]:
    """Yield the mentions of findings in a cell, with the side of each ("" = no side given)."""
    for sentence in sentences:
        if not HEADS.isdisjoint(sentence):
            for mention in mentions_in(sentence):
                yield mention, mention.side if mention.status == "absent" else mention.guess


@lru_cache(maxsize=64)  # the samples of a row are adjacent
def facts_of(findings: str, story: str) -> Facts:
    """Return the facts of a row."""
    return Facts(findings, story)
