"""Compares what a text says of chest findings with what its row says of them: present or absent, left or right.

A finding counts as given or as absent only where the findings cell says so without a hedge, and only one way. What the
other cells say otherwise (an earlier effusion, a history of pneumonia) is excused, since a text may speak of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from gxr_batch.text_checks.flags.evidence import Reading
from gxr_batch.text_checks.flags.lexicon import HEADS, TABLES, WORDS, Status
from gxr_batch.text_checks.flags.mentions import Mention, mentions_in
from gxr_batch.text_checks.flags.sentences import sentences_of, words_of
from gxr_batch.text_checks.word_lists import names_by_word

# Words for what fills airspaces: one film's opacity is another's consolidation. So with lines and generators.
_SAME_PLACE = names_by_word(TABLES["findings"]["same_place"])


@dataclass
class _Fact:
    """What a row says of one finding, with the sides that it gives ("" = none given)."""

    present: set[str] = field(default_factory=set)
    absent: set[str] = field(default_factory=set)
    open: bool = False


class Facts:
    """What the cells of one row say; `story` is what it tells besides its findings."""

    def __init__(self, findings: str, story: str) -> None:
        self._facts: dict[str, _Fact] = {}
        self._sides: dict[str, set[str]] = {}
        for mention, side in _said(findings):
            fact = self._facts.setdefault(mention.finding, _Fact())
            if mention.status == "open":
                fact.open = True
            else:
                (fact.absent if mention.status == "absent" else fact.present).add(side)
            if mention.status != "absent":
                self._sides.setdefault(_place(mention.finding), set()).add(side)
        self._had: set[str] = set()
        self._lacked: set[str] = set()
        for mention, side in _said(story):
            (self._lacked if mention.status == "absent" else self._had).add(mention.finding)
            self._sides.setdefault(_place(mention.finding), set()).add(side)

    def absent(self, finding: str) -> set[str]:
        """Return the sides on which the row says for sure that a finding is absent; none if it does not."""
        fact = self._facts.get(finding)
        if fact is None or fact.present or fact.open or finding in self._had:
            return set()
        return fact.absent

    def present(self, finding: str) -> set[str]:
        """Return the sides on which the row has a finding for sure; none if it does not say so."""
        fact = self._facts.get(finding)
        if fact is None or fact.absent - {"left", "right"} or finding in self._lacked:
            return set()
        return fact.present

    def only_side(self, finding: str) -> str:
        """Return "left" or "right" where the row has a finding, by whatever name, on that side only; else nothing."""
        known = self._sides.get(_place(finding), set()) - {""}
        return next(iter(known)) if len(known) == 1 and known <= {"left", "right"} else ""


def _place(finding: str) -> str:
    return _SAME_PLACE.get(finding, finding)


def _said(cell: str) -> Iterator[tuple[Mention, str]]:
    """Yield what a cell says of findings, with the side of each ("" = none given)."""
    for sentence in sentences_of(words_of(cell)):
        if not HEADS.isdisjoint(sentence):
            for mention in mentions_in(sentence):
                yield mention, mention.side if mention.status == "absent" else mention.guess


@lru_cache(maxsize=64)  # the samples of a row follow each other
def facts_of(findings: str, story: str) -> Facts:
    """Return what a row says."""
    return Facts(findings, story)


# What says of the case, rather than of the finding in general, that it is there.
_ANCHORS = WORDS["case.anchors"]
_PLURAL = re.compile(r".*[^siu]s").fullmatch


class _Claim(NamedTuple):
    """What a text says of a finding in the case; `side` is "" where it gives none."""

    finding: str
    status: Status
    side: str


def finding_flags(reading: Reading) -> set[str]:
    """Return which of side_flipped, asserts_negated_finding and negates_given_finding a text deserves."""
    if HEADS.isdisjoint(reading.vocabulary) or not reading.findings:
        return set()
    claims = set(_claims(reading.case))
    if not claims:
        return set()
    facts = facts_of(reading.findings, reading.story)
    return {flag for claim in claims if (flag := _contradiction(claim, facts))}


def _claims(sentences: Iterable[Sequence[str]]) -> Iterator[_Claim]:
    for sentence in sentences:
        if HEADS.isdisjoint(sentence):
            continue
        anchored = not _ANCHORS.isdisjoint(sentence)
        for finding, status, side, spot, _ in mentions_in(sentence):
            # "middle lobe consolidation erases ..." is of the case, "right-sided fractures endanger ..." a lesson
            of_the_case = anchored or (side and not _PLURAL(sentence[spot.end - 1]))
            if status == "absent" or (status != "open" and of_the_case):
                yield _Claim(finding, status, side)


def _contradiction(claim: _Claim, facts: Facts) -> str:
    finding, status, side = claim
    if status == "absent":
        given = facts.present(finding)
        # "no effusion on the right" contradicts only a row that has one there
        denies = given and (side in {"", "both"} or given & {side, "both"})
        return "negates_given_finding" if denies else ""
    denied = facts.absent(finding)
    if denied:
        asserts = status == "present" and (side == "" or denied & {side, "", "both"})
        return "asserts_negated_finding" if asserts else ""
    known = facts.only_side(finding)
    return "side_flipped" if side and known and side != known else ""
