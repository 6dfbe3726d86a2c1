"""Compares what a text says of chest findings with what its row says of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from gxr_batch.text_checks.flags.evidence import Reading
from gxr_batch.text_checks.flags.facts import Facts, facts_of
from gxr_batch.text_checks.flags.lexicon import HEADS, Status
from gxr_batch.text_checks.flags.mentions import mentions_in
from gxr_batch.text_checks.flags.sentences import word_set

# What says of the case, rather than of the finding in general, that it is there.
_ANCHORS = word_set(
    "there shows show showing seen visible present noted identified evident observed demonstrates demonstrated "
    "reveals small large moderate mild severe this with has contains contain film is are"
)
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
