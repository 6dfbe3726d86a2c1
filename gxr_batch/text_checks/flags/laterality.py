"""The side of a finding in a sentence: the nearest side word in its clause, before it, else after it."""

from __future__ import annotations

from collections.abc import Sequence

from gxr_batch.text_checks.flags.lexicon import TABLES, THREADED, WORDS, Spot
from gxr_batch.text_checks.word_lists import names_by_word

_SIDES = names_by_word(TABLES["sides"]["words"])
SIDE_WORDS = frozenset(_SIDES) | {"middle"}
_STOPS = WORDS["sides.stops"]
_STOPS_BEFORE = _STOPS | {"with"}
_BACK, _FORWARD = 8, 14
_PLACING = WORDS["sides.placing"]
_MARKS = WORDS["sides.marks"]
_NOT_OF_DEVICES = WORDS["sides.not_of_devices"]
_STOPS_BEFORE_DEVICES = _STOPS_BEFORE | {"and"}
_STOPS_AFTER_DEVICES = _STOPS | WORDS["sides.stops_after_devices"]
_TIPS = WORDS["sides.tips"]
_LOBES = WORDS["sides.lobes"]
_MORE = WORDS["sides.more"]
_GAP = 8  # words between two sides of one finding
_BETWEEN = _LOBES | {"and", ",", "the", "in", "of", "at", "on"}
_BETWEEN_MORE = _LOBES | _MORE | {"the", "on"}
_STARTS = frozenset({",", ":", "with", "and", "but"})
_AFTER_SIDES = WORDS["status.stops_after"] | WORDS["status.concludes"] | WORDS["status.hedges"] | {"in"}
_ENDS = _STARTS | _AFTER_SIDES | WORDS["status.verbs"]
_BE, _SEEN = WORDS["status.be"], WORDS["status.seen"]


class Sides:
    """The sides of the findings in one sentence; `only` is set if it mentions a single side.

    `known` maps the position of each side word to its side, from left to right.
    """

    def __init__(self, sentence: Sequence[str], spots: Sequence[Spot]) -> None:
        self._sentence, self._spots = sentence, spots
        places = [at for at, word in enumerate(sentence) if word in SIDE_WORDS]
        self.known = {at: side for at in places if (side := _side_at(sentence, at))}
        if len(set(self.known.values())) > 1:
            self._join()
        sides = set(self.known.values())
        self.only = sides.pop() if len(sides) == 1 else ""

    def of(self, finding: str, spot: Spot) -> str:
        """Return "left", "right" or "both" if the clause of a finding gives its side, else ""."""
        if not self.known:
            return ""
        if finding == "mediastinal_shift":  # shifts to a side; a side before it belongs to its cause
            return self._after(spot, spot.start) or self.known.get(spot.start - 1, "")
        for at, side in self.known.items():
            if spot.start <= at < spot.end:
                return side
        if spot.device and not _MARKS.isdisjoint(self._sentence[spot.end + 1 : spot.end + 2]):
            side = self.known.get(spot.end, "")  # "line right, drain left"
            if side:
                return side
        return self._before(spot) or self._after(spot, spot.end)

    def _join(self) -> None:
        """Make both sides of one finding "both": "right upper lobe and left lower lobe", "right more than left"."""
        places, first = list(self.known), 0
        for number, at in enumerate(places):
            following = places[number + 1] if number + 1 < len(places) else None
            if following is not None and _is_link(self._sentence[at + 1 : following]):
                continue
            group = places[first : number + 1]
            first = number + 1
            if len({self.known[place] for place in group}) > 1 and self._is_of_one(group[0], at):
                self.known.update(dict.fromkeys(group, "both"))

    def _is_of_one(self, start: int, last: int) -> bool:
        """Return whether sides in words `start` to `last` belong to one finding: only before or only after them."""
        sentence = self._sentence
        if not _MORE.isdisjoint(sentence[start:last]):
            return True
        end = next((at for at in range(last + 1, len(sentence)) if sentence[at] not in _LOBES), len(sentence))
        reach = next((at for at in range(end, min(end + 3, len(sentence))) if sentence[at] in _ENDS), end + 3)
        follows = any(end <= spot.start < reach for spot in self._spots)
        begin = next((at for at in range(start - 1, -1, -1) if sentence[at] in _STARTS), 0)
        precedes = any(begin <= spot.start < start for spot in self._spots)
        if follows or not precedes:
            return follows and not precedes
        rest = sentence[end : end + 2]
        return (
            not rest
            or not rest[0].isalpha()
            or rest[0] in _AFTER_SIDES
            or (rest[0] in _BE and not _SEEN.isdisjoint(rest))
        )

    def _known_for(self, spot: Spot) -> dict[int, str]:
        if not spot.device:
            return self.known
        return {
            at: side for at, side in self.known.items() if _NOT_OF_DEVICES.isdisjoint(self._sentence[at + 1 : at + 3])
        }

    def _before(self, spot: Spot) -> str:
        at = -1
        for place in self._known_for(spot):
            if place < spot.start:
                at = place
        if at < max(spot.start - _BACK, 0) or self._names_between(at, spot.start, spot):
            return ""
        between = self._sentence[at + 1 : spot.start]
        stops = _STOPS_BEFORE_DEVICES if spot.device else _STOPS_BEFORE
        if spot.normal and at <= 1:  # "The right lung and pleura are normal"
            stops -= {"and"}
        if not stops.isdisjoint(between) or "to" in self._sentence[max(at - 2, 0) : at]:
            return ""
        # "On the left, a small effusion", with nothing else before the comma
        return self.known[at] if "," not in between or "," in between[:2] else ""

    def _after(self, spot: Spot, first: int) -> str:
        for at in self._known_for(spot):
            if at >= first:
                break
        else:
            return ""
        if at >= spot.end + _FORWARD or self._names_between(first, at, spot):
            return ""
        between = self._sentence[max(first, spot.end) : at]
        stops = _STOPS_AFTER_DEVICES if spot.device else _STOPS
        if not stops.isdisjoint(between) or (spot.findings[0] in THREADED and not _TIPS.isdisjoint(between)):
            return ""
        crossing = ("," in between) and self._sentence[max(first, spot.end) + between.index(",") + 1] not in _PLACING
        return "" if crossing else self.known[at]

    def _names_between(self, start: int, end: int, spot: Spot) -> bool:
        """Return whether another finding is named in words `start` to `end`; side words belong to the nearest one.

        Devices take their side from the words around them, and leave it to other findings.
        """
        return any(
            other.start < end and other.end > start
            for other in self._spots
            if other is not spot and (spot.device or not other.device)
        )


def _is_link(between: Sequence[str]) -> bool:
    """Return whether words between two sides join them: "lobe and", "lobe, in the", "greater than"."""
    if len(between) > _GAP:
        return False
    if not _MORE.isdisjoint(between):
        return _BETWEEN_MORE.issuperset(between)
    return not between or (not {"and", ","}.isdisjoint(between) and _BETWEEN.issuperset(between))


def _side_at(sentence: Sequence[str], at: int) -> str:
    word = sentence[at]
    if word == "middle":
        return "right" if sentence[at + 1 : at + 2] and sentence[at + 1] in {"lobe", "and"} else ""
    for words in (sentence[at + 1 : at + 5], sentence[max(at - 4, 0) : at][::-1]):
        either = [word for word in words if word not in {"the", "on"}]
        if len(either) > 1 and either[0] == "or" and either[1] in _SIDES:
            return ""  # "on the right or on the left": on either side, so no side
    return _SIDES[word]
