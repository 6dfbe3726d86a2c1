"""What a sentence says about the findings and devices that it names: present, likely, absent or open.

Based on the idea of NegEx (Chapman and others, 2001): cue words before and after a finding, each with a reach that ends
at certain words. Hypothetical and general statements are open, and so are negations with a restriction ("no large
effusion", "no other nodule"): rules that compare ignore them. A finding that the text concludes ("consistent with
pneumonia") is likely. Devices are placed and removed: they can be removed, planned or needed, and the negation may be
about a property ("no kink of the line"); if the words leave a doubt, the device is open.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from gxr_batch.text_checks.flags.laterality import SIDE_WORDS, Sides
from gxr_batch.text_checks.flags.lexicon import NO, TABLES, WORDS, Spot, Status, spots_in
from gxr_batch.text_checks.word_lists import sets_by_word


class Mention(NamedTuple):
    """A finding named in a sentence. `side` is "" if its clause has none; `guess` is then the only one.

    `restricted`: the words of "no large effusion" with which only that kind is absent, and the status open.
    """

    finding: str
    status: Status
    side: str
    spot: Spot
    guess: str
    restricted: frozenset[str] = frozenset()


GENERAL = WORDS["status.general"]
_OF = sets_by_word(TABLES["status"]["followed_by"])
_NO_NEGATION_BEFORE = WORDS["status.not_negated"]
_RESTRICTED = WORDS["status.restricted"]
_HEDGES = WORDS["status.hedges"]
_CONCLUDES = WORDS["status.concludes"]
_TURNS = WORDS["status.turns"]
_CONNECTS = WORDS["status.connects"]
_FRESH_START = WORDS["status.fresh_start"]
_VERBS = WORDS["status.verbs"]
_BACK = 7  # words between a cue and its finding, counted again for each item of a list
_LIST = 16  # words after a finding in which its list may end

_JOINS = _CONNECTS | {"or"}
_BEFORE_CUES = NO | _HEDGES | _CONCLUDES | _TURNS | _CONNECTS | _VERBS | {"or"}

_BE = WORDS["status.be"]
_SEEN = WORDS["status.seen"]
_ACTS = WORDS["status.acts"]
_GONE = WORDS["status.gone"]
_AFTER_HEDGES = WORDS["status.hedges_after"]
_ARTICLES = WORDS["status.articles"]
_GENERAL_BEFORE = _ARTICLES | {"in", "on", "of", "than", "to"}  # an article here begins the sentence
_AFTER_STOPS = WORDS["status.stops_after"]
_FORWARD = 16
_AFTER_CUES = _AFTER_STOPS | _AFTER_HEDGES | _CONNECTS | _BE | _ACTS | NO | _GONE | {":", "ruled"}
_DENIALS = [[word] for word in sorted(_GONE | {"no"})]
_SHORT = 5  # words and marks with which such a denial ends a sentence
_EARLIER = WORDS["status.earlier"]
_COMPARED = WORDS["status.compared"]
_REST = WORDS["status.rest"]
_BORDERLINE = WORDS["status.borderline"]


def mentions_in(sentence: Sequence[str]) -> list[Mention]:
    """Return the mention of each finding that a sentence names."""
    spots = spots_in(sentence)
    if not spots:
        return []
    general = not GENERAL.isdisjoint(sentence)
    sides = None if SIDE_WORDS.isdisjoint(sentence) else Sides(sentence, spots)
    found = []
    for spot in spots:
        status = "open" if general and _is_general(sentence, spot) else _status(sentence, spot)
        if spot.device:
            status = device_status(sentence, spot, status)
        for finding in spot.findings:
            side = sides.of(finding, spot) if sides else ""
            # a line near a left effusion may be on the right: no guess
            guess = side or (sides.only if sides and not spot.device else "")
            found.append(Mention(finding, status, side, spot, guess, _restriction(sentence, spot, status)))
    return found


def _restriction(sentence: Sequence[str], spot: Spot, status: Status) -> frozenset[str]:
    """Return the words before an open finding that restrict its negation, if they are why it is open."""
    words = _RESTRICTED.intersection(sentence[max(spot.start - 2, 0) : spot.start]) if status == "open" else frozenset()
    return words if words and any(_negates(sentence, at) for at in range(spot.start)) else frozenset()


def _is_general(sentence: Sequence[str], spot: Spot) -> bool:
    """Return whether the part of a sentence, between turns, that names a finding has a general word."""
    turns = [at for at, word in enumerate(sentence) if word in _TURNS and word != "there"]
    start = max((at for at in turns if at < spot.start), default=0)
    end = min((at for at in turns if at >= spot.end), default=len(sentence))
    return not GENERAL.isdisjoint(sentence[start:end])


def _status(sentence: Sequence[str], spot: Spot) -> Status:
    before = _before(sentence, spot.start)
    if before == "open" or (spot.normal and (before == "absent" or _is_in_general(sentence, spot.start))):
        return "open"
    if spot.normal:
        # "Clear" itself is such a cue: "the lungs are clear of consolidation".
        negated = not (NO - _OF.keys()).isdisjoint(sentence[spot.start : spot.end])
        near = sentence[max(spot.start - 3, 0) : spot.end + 2]
        doubtful = negated or not _REST.isdisjoint(sentence) or not _BORDERLINE.isdisjoint(near)
        return "open" if doubtful else "absent"
    if before == "absent" or (spot.paired and any(_negates(sentence, at) for at in range(spot.start, spot.end))):
        return "absent"
    after = "absent" if _is_only_denied(sentence, spot.end) else _after(sentence, spot.end)
    if after == "absent" and not _RESTRICTED.isdisjoint(sentence[max(spot.start - 3, 0) : spot.start]):
        return "open"  # "a further effusion is not seen"
    return before if after == "present" else after


def _is_in_general(sentence: Sequence[str], start: int) -> bool:
    """Return whether a normal part is that of anybody: "A normal heart occupies less than half of the thorax"."""
    begin = sentence[max(start - 2, 0) : start + 1]
    return len(begin) > 1 and begin[-1] == "normal" and begin[-2] in _ARTICLES and begin[0] in _GENERAL_BEFORE


def _before(sentence: Sequence[str], start: int) -> Status:
    """Return the status of a finding from the words to its left, beginning with the nearest."""
    origin = start  # where the words are counted from
    connected = False  # a comma or "and" is between here and the finding
    said: Status = "present"  # unless a negation comes first: "suggests pneumonia", "no opacity to suggest pneumonia"
    alternative = _has_alternative(sentence, start)
    for at in range(start - 1, -1, -1):
        word = sentence[at]
        if word not in _BEFORE_CUES or (word == "there" and "nor" in sentence[max(at - 2, 0) : at]):
            continue
        if word in _OF and not _applies(sentence, at):
            continue
        if origin - at > _BACK or word in _TURNS or (connected and _is_verb(sentence, at)):
            return said
        if word in NO:
            return _negation(sentence, at, start)
        if word in _HEDGES:
            return "open"
        if word in _CONCLUDES:
            said, origin = "likely", at
        elif word in _CONNECTS:
            if said == "likely" or (sentence[at + 1] in _FRESH_START and not alternative):
                return said
            connected, origin = True, at
        elif word == "or":
            alternative, origin = True, at
    return said


def _has_alternative(sentence: Sequence[str], start: int) -> bool:
    """Return whether a list that continues after a finding ends with "or": one negation then covers all of it."""
    for word in sentence[start : start + _LIST]:
        if word == "or" or word in _TURNS or word in _VERBS:
            return word == "or"
    return False


def _applies(sentence: Sequence[str], at: int) -> bool:
    """Return whether a word that is a cue only before certain others is one here."""
    return not _OF[sentence[at]].isdisjoint(sentence[at + 1 : at + 2])


def _is_verb(sentence: Sequence[str], at: int) -> bool:
    """Return whether a word ends the reach of what comes before it; that of "no visible effusion" does not."""
    return sentence[at] in _VERBS and not (at and sentence[at - 1] in NO)


def _negates(sentence: Sequence[str], at: int) -> bool:
    return sentence[at] in NO and (sentence[at] not in _OF or _applies(sentence, at))


def _negation(sentence: Sequence[str], at: int, start: int) -> Status:
    between = sentence[at + 1 : start]
    # Of a list, only the finding's own item is restricted: "no large effusion or pneumothorax".
    item = next((place for place in range(start, at, -1) if sentence[place - 1] in _JOINS), at)
    if not _NO_NEGATION_BEFORE.isdisjoint(between[:2]) or not _RESTRICTED.isdisjoint(sentence[item:start]):
        return "open"
    return "absent"


def _after(sentence: Sequence[str], end: int) -> Status:
    """Return the status of a finding from the words to its right, to the end of its clause."""
    if _defines(sentence[end : end + 2]):
        return "open"
    verb = False
    for at in range(end, min(end + _FORWARD, len(sentence))):
        word = sentence[at]
        if word not in _AFTER_CUES:
            continue
        if word in _AFTER_STOPS or (verb and word in _CONNECTS):
            return "present"
        if word in _BE or word in _ACTS or word == ":":
            verb = True
        elif word in _AFTER_HEDGES:
            return "open"
        elif word in NO and word not in _GONE and word not in _OF:
            return _negation_after(sentence, at)
        elif verb and (word in _GONE or word == "ruled"):
            return "absent"
    return "present"


def _is_only_denied(sentence: Sequence[str], end: int) -> bool:
    """Return whether a denial is all that follows a finding: "| Effusion | no |", "Effusion - none"."""
    return len(sentence) - end <= _SHORT and [word for word in sentence[end:] if word.isalpha()] in _DENIALS


def _defines(following: Sequence[str]) -> bool:
    """Return whether the two words after a finding teach what it is: "is a collection of air", "shows as a line"."""
    if len(following) < 2:
        return False
    return following[1] in {"as", "like"} or (following[0] in _BE and following[1] in _ARTICLES)


def _negation_after(sentence: Sequence[str], at: int) -> Status:
    following = sentence[at + 1 : at + 4]
    further = sentence[at + 1 : at + 6]
    if not _EARLIER.isdisjoint(further) and _COMPARED.isdisjoint(further):
        return "present"  # "a nodule, not well seen on the prior film": present now, but not then
    if sentence[at] == "no":
        # "Effusion: no." denies it, "Small effusion: no sign of a cause" does not.
        alone = sentence[at - 1] == ":" and (not following or not following[0].isalpha())
        return "absent" if alone or "longer" in following[:1] else "present"
    return "absent" if not _SEEN.isdisjoint(following) else "open"


_REMOVAL = WORDS["devices.removal"]
_TAKEN_OUT = WORDS["devices.taken_out"]
_PAST = WORDS["devices.past"]  # "is removed" may be teaching
_AFTER = WORDS["devices.after"]
_REACH = 5  # words between a device and the word that removes it
_NOT_NOW = WORDS["devices.not_now"]
_PARTS = WORDS["devices.parts"]
_DENIED_WITH = WORDS["devices.denied_with"]
_CLOSES = WORDS["devices.closes"]


def device_status(sentence: Sequence[str], spot: Spot, status: Status) -> Status:
    """Return the status of a device, given the status that a finding would have in its place."""
    if status == "open" or not _NOT_NOW.isdisjoint(sentence):
        return "open"
    if status == "absent":
        return "absent" if _is_denied(sentence, spot) else "open"
    if _REMOVAL.isdisjoint(sentence):
        return status
    return "absent" if _is_removed(sentence, spot) else "open"


def _is_denied(sentence: Sequence[str], spot: Spot) -> bool:
    cues = [at for at in range(spot.start) if sentence[at] in NO]
    if not cues:
        return _PARTS.isdisjoint(sentence)
    return _DENIED_WITH.issuperset(sentence[cues[-1] + 1 : spot.start]) and _CLOSES.issuperset(
        sentence[spot.end : spot.end + 1]
    )


def _is_removed(sentence: Sequence[str], spot: Spot) -> bool:
    before = sentence[max(spot.start - _REACH - 2, 0) : spot.start]
    if "removal" in before:
        return not _AFTER.isdisjoint(before[: before.index("removal")])  # "before", "prior to" are open
    behind = sentence[spot.end : spot.end + _REACH]
    return any(word in _TAKEN_OUT and said in _PAST for said, word in pairwise(behind))
