"""Compares what a text and its row say about chest findings: present or absent, left or right, everything normal."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gxr_batch.text_checks.flags.evidence import Reading
from gxr_batch.text_checks.flags.facts import Facts, facts_of
from gxr_batch.text_checks.flags.lexicon import DEVICES, KIN, WORDS, Spot
from gxr_batch.text_checks.flags.mentions import Mention

# Words that state a finding in this case, rather than in general.
_ANCHORS = WORDS["case.anchors"]
_PRESUMES = WORDS["case.presumes"]
_STATES = WORDS["case.states"]
_SEEN = WORDS["case.seen"]
_PLACES = WORDS["case.places"] | {"\n"}
_NOT_SEEN = WORDS["case.not_seen"]
_BEFORE, _BEHIND = 6, 10
_PLURAL = re.compile(r".*[^siu]s").fullmatch
_STATED = ("present", "likely")
_NAMED = (*_STATED, "open")
_FIRST_WORDS = 4  # a sentence without a verb that begins with a finding states it

# "Normal chest X-ray" denies only what the text does not name anyway.
_NO_ABNORMALITY = re.compile(
    r"\b(?:no (?:radiographic |visible )?abnormality to discuss|without any abnormality|"
    r"(?:no|without) (?:radiographic |visible )?abnormalit(?:y|ies) (?:is|are|was|were|[.,:;]))"
)
_NORMAL_FILM = re.compile(r"\bnormal (?:\w+ )?(?:chest|film|x ray|xray|radiograph|study|examination)\b")
_BLANKET_CUES = WORDS["case.blanket_cues"]
_NOT_BLANKET = WORDS["case.not_blanket"]


def finding_flags(reading: Reading, kept: Sequence[str], lost: Sequence[str]) -> set[str]:
    """Return which flags that compare findings apply to a text; `kept` and `lost` are those of `kept_and_lost`."""
    facts = facts_of(reading.findings, reading.story)
    flags: set[str] = set()
    for sentence, of_the_case, mentions in reading.mentions:
        if of_the_case:
            flags.update(flag for mention in mentions if (flag := _contradiction(sentence, mention, facts)))
    given = [*kept, *lost]
    if (not DEVICES.issuperset(given) and _says(reading, _NO_ABNORMALITY)) or (
        not DEVICES.issuperset(lost) and _says(reading, _NORMAL_FILM)
    ):
        flags.add("negates_given_finding")
    if not _denied(reading).issuperset(lost):
        flags.add("finding_lost")
    return flags


def kept_and_lost(reading: Reading) -> tuple[list[str], list[str]]:
    """Return the findings that a row has and the text names, in whatever way, and those that it does not name."""
    given = facts_of(reading.findings, reading.story).positives()
    named = {
        mention.finding
        for _, of_the_case, mentions in reading.mentions
        for mention in mentions
        if mention.status in (_NAMED if of_the_case else _STATED)
    }
    kept = [finding for finding in given if not named.isdisjoint(KIN[finding])]
    return kept, [finding for finding in given if finding not in kept]


def _denied(reading: Reading) -> set[str]:
    """Return the findings that a text denies: negates_given_finding tells of those that the row has."""
    case = (mentions for _, of_the_case, mentions in reading.mentions if of_the_case)
    return {mention.finding for mentions in case for mention in mentions if mention.status == "absent"}


def _says(reading: Reading, pattern: re.Pattern[str]) -> bool:
    """Return whether a sentence says by a pattern that all is normal, and does not speak of normal films in general."""
    return not _BLANKET_CUES.isdisjoint(reading.vocabulary) and any(
        _NOT_BLANKET.isdisjoint(words) and pattern.search(" ".join(words))
        for words in reading.sentences
        if not _BLANKET_CUES.isdisjoint(words)
    )


def _contradiction(sentence: Sequence[str], mention: Mention, facts: Facts) -> str:
    if mention.status == "absent":
        given = facts.present(mention.finding)
        # "no effusion on the right" contradicts only a row that has one on the right
        denies = given and (mention.side in {"", "both"} or given & {mention.side, "both"})
        if denies:
            return "negates_given_finding"
    presumed = _is_presumed(sentence, mention.spot)
    if presumed or _is_stated(sentence, mention):
        return _against(sentence, mention, presumed, facts)
    return ""


def _against(sentence: Sequence[str], mention: Mention, presumed: bool, facts: Facts) -> str:
    """Return the flag of a finding that a text states of this case, "" if the row has nothing against it."""
    finding, side, spot = mention.finding, mention.side, mention.spot
    present = presumed or mention.status == "present"
    if denied := facts.absent(finding):
        where = side or mention.guess
        same = denied & {where, "", "both"} or (spot.device and not where)
        return "asserts_negated_finding" if present and same else ""
    if present and not facts.narrowly_absent(finding).isdisjoint(sentence[max(spot.start - 2, 0) : spot.end]):
        return "asserts_negated_finding"
    if facts.lacks(KIN[finding]):
        return "finding_invented" if present and (presumed or _is_seen(sentence, spot)) else ""
    known = facts.only_side(finding)
    return "side_flipped" if side and known and side != known else ""


def _is_stated(sentence: Sequence[str], mention: Mention) -> bool:
    """Return whether a sentence states a finding of this case rather than in general."""
    if mention.status in ("absent", "open"):
        return False
    if not _ANCHORS.isdisjoint(sentence) or _is_seen(sentence, mention.spot):
        return True
    # "middle lobe consolidation erases ..." is about the case, "right-sided fractures endanger ..." is teaching
    return bool(mention.side) and not _PLURAL(sentence[mention.spot.end - 1])


def _is_seen(sentence: Sequence[str], spot: Spot) -> bool:
    """Return whether a sentence states no more than that a finding is there, and perhaps where."""
    before, rest = sentence[: spot.start], sentence[spot.end :]
    if not _STATES.isdisjoint(before):
        return True
    if spot.start > _BEFORE or not _NOT_SEEN.isdisjoint(before):
        return False
    return _comes_first(sentence, spot) or _PLACES.issuperset(rest) or not _SEEN.isdisjoint(rest[:_BEHIND])


def _is_presumed(sentence: Sequence[str], spot: Spot) -> bool:
    """Return whether a sentence takes a finding for given: "no cause for the effusion"."""
    before = sentence[max(spot.start - 3, 0) : spot.start]
    return "the" in before and not _PRESUMES.isdisjoint(before[: before.index("the")])


def _comes_first(sentence: Sequence[str], spot: Spot) -> bool:
    """Return whether a sentence, after a heading such as "Impression:", begins with a finding as its subject."""
    begin = sentence.index(":") + 1 if ":" in sentence[:2] else 0
    return spot.start - begin <= _FIRST_WORDS and ":" in sentence[spot.end : spot.end + _FIRST_WORDS]
