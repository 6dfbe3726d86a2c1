"""Compares what a text says of chest findings with what the row's findings say of them.

The row decides: a finding counts as given or as absent only where its findings cell says so without a hedge, and only
one way. What other cells mention (an earlier effusion, a history of pneumonia) excuses the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from gxr_batch.checks.flags.evidence import Reading
from gxr_batch.checks.flags.lexicon import HEADS
from gxr_batch.checks.flags.mentions import SIDE_WORDS, Mention, Status, mentions_in, only_side, side_of
from gxr_batch.checks.flags.words import sentences_of, word_set, words_of

# What says of the case, rather than of the finding in general, that it is there.
_ANCHORS = word_set(
    "there shows show showing seen visible present noted identified evident observed demonstrates demonstrated "
    "reveals small large moderate mild severe this with has contains contain film is are"
)
_PLURAL = re.compile(r".*[^siu]s").fullmatch
# Words for what fills airspaces: one film's opacity is another's consolidation.
_SAME_PLACE = dict.fromkeys(("consolidation", "opacity", "pneumonia", "air_bronchograms"), "airspace")


@dataclass
class _Fact:
    """What a row says of one finding, with the sides that it gives ("" = none given)."""

    present: set[str] = field(default_factory=set)
    absent: set[str] = field(default_factory=set)
    open: bool = False


class _Facts:
    """What the cells of one row say."""

    def __init__(self, findings: str, story: str) -> None:
        self.facts: dict[str, _Fact] = {}
        self.sides: dict[str, set[str]] = {}
        for mention, side in _said(findings):
            fact = self.facts.setdefault(mention.finding, _Fact())
            if mention.status == "open":
                fact.open = True
            else:
                (fact.absent if mention.status == "absent" else fact.present).add(side)
            if mention.status != "absent":
                self.sides.setdefault(_place(mention.finding), set()).add(side)
        self.elsewhere: set[str] = set()
        for mention, side in _said(story):
            self.elsewhere.add(mention.finding)
            self.sides.setdefault(_place(mention.finding), set()).add(side)

    def is_absent(self, finding: str) -> set[str] | None:
        """Return the sides on which the row says that a finding is absent; None where it does not say so for sure."""
        fact = self.facts.get(finding)
        certain = fact and fact.absent and not fact.present and not fact.open and finding not in self.elsewhere
        return fact.absent if fact and certain else None

    def is_present(self, finding: str) -> set[str] | None:
        """Return the sides on which the row has a finding; None where it does not say so for sure."""
        fact = self.facts.get(finding)
        return fact.present if fact and fact.present and not fact.absent - {"left", "right"} else None


def _place(finding: str) -> str:
    return _SAME_PLACE.get(finding, finding)


def _said(cell: str) -> Iterator[tuple[Mention, str]]:
    """Yield what a cell says of findings, with the side of each ("" = none given)."""
    for sentence in sentences_of(words_of(cell)):
        if not HEADS.isdisjoint(sentence):
            spots, mentions = mentions_in(sentence)
            sided = bool(mentions) and not SIDE_WORDS.isdisjoint(sentence)
            for mention in mentions:
                side = side_of(sentence, mention, spots) if sided else None
                if sided and side is None and mention.status != "absent":
                    side = only_side(sentence)
                yield mention, side or ""


@lru_cache(maxsize=64)  # the samples of a row follow each other
def _facts_of(findings: str, story: str) -> _Facts:
    return _Facts(findings, story)


def finding_flags(reading: Reading) -> set[str]:
    """Return which of side_flipped, asserts_negated_finding and negates_given_finding a text deserves."""
    if HEADS.isdisjoint(reading.vocabulary) or not reading.findings:
        return set()
    facts = _facts_of(reading.findings, reading.story)
    if not facts.facts:
        return set()
    flags: set[str] = set()
    for sentence in reading.case:
        if HEADS.isdisjoint(sentence):
            continue
        spots, mentions = mentions_in(sentence)
        sided = not SIDE_WORDS.isdisjoint(sentence)
        anchored = not _ANCHORS.isdisjoint(sentence)
        for mention in mentions:
            # "middle lobe consolidation erases ..." is of the case, "right-sided fractures endanger ..." a lesson
            of_the_case = anchored or (sided and not _PLURAL(sentence[mention.end - 1]))
            if mention.status == "open" or (mention.status != "absent" and not of_the_case):
                continue
            side = side_of(sentence, mention, spots) or "" if sided else ""
            flag = _contradiction(facts, mention.finding, mention.status, side)
            if flag:
                flags.add(flag)
    return flags


def _contradiction(facts: _Facts, finding: str, status: Status, side: str) -> str:
    if status == "absent":
        given = facts.is_present(finding)
        if given is None:
            return ""
        # "no effusion on the right" contradicts only a row that has one there
        return "negates_given_finding" if not side or side == "both" or given & {side, "both"} else ""
    denied = facts.is_absent(finding) if status == "present" else None
    if denied is not None:
        return "asserts_negated_finding" if "" in denied or "both" in denied or not side or side in denied else ""
    return "side_flipped" if side and _elsewhere(facts.sides, finding, side) else ""


def _elsewhere(sides: Mapping[str, set[str]], finding: str, side: str) -> bool:
    """Say whether a row has a finding on one side only, and that is another one."""
    known = sides.get(_place(finding), set()) - {""}
    return len(known) == 1 and bool(known & {"left", "right"}) and side not in known
