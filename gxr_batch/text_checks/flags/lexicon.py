"""The words of the flags, from lexicon.toml, and where a sentence names a chest finding or a device.

A finding is a phrase ("pleural effusion"), or a head word with a word near it ("the heart is mildly enlarged").
A normal statement ("heart size is normal") says that findings are absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from gxr_batch.text_checks.word_lists import read_tables, sets_by_word, word_sets

TABLES = read_tables("flags/lexicon.toml")
WORDS = word_sets(TABLES)
# The status of a finding in a sentence, and negations.
Status = Literal["present", "likely", "absent", "open"]
NO = WORDS["status.no"]


class Spot(NamedTuple):
    """Where findings, or a device, are named in a sentence: words `start` to `end`.

    `normal`: named by their normal counterpart. `paired`: named by two words with possibly others in between.
    """

    start: int
    end: int
    findings: tuple[str, ...]
    normal: bool = False
    paired: bool = False

    @property
    def device(self) -> bool:
        """Whether this is a device rather than a finding."""
        return self.findings[0] in DEVICES


THREADED = WORDS["devices.threaded"]
DEVICES = THREADED | WORDS["devices.others"]
_REACH = 6
_BARRIERS = frozenset(",;:.") | {"but", "while", "with"}


class _Pair(NamedTuple):
    near: frozenset[str]
    findings: tuple[str, ...]
    normal: bool
    reach: int


def _phrases_by_head() -> dict[str, list[tuple[tuple[str, ...], str]]]:
    """Return, for each first word, its phrases, longest first."""
    by_head: dict[str, list[tuple[tuple[str, ...], str]]] = {}
    for finding, spellings in TABLES["findings"]["phrases"].items():
        for spelling in spellings:
            words = tuple(spelling.split())
            by_head.setdefault(words[0], []).append((words, finding))
    return {head: sorted(found, key=lambda entry: -len(entry[0])) for head, found in by_head.items()}


def _pairs_by_head() -> dict[str, list[_Pair]]:
    by_head: dict[str, list[_Pair]] = {}
    for pair in TABLES["findings"]["pairs"]:
        near, names = frozenset(pair["near"].split()), tuple(pair["names"].split())
        made = _Pair(near, names, pair.get("normal", False), pair.get("reach", _REACH))
        for head in pair["heads"].split():
            by_head.setdefault(head, []).append(made)
    return by_head


_BY_HEAD, _PAIRED = _phrases_by_head(), _pairs_by_head()
_NOT_AFTER, _NOT_BEFORE = (sets_by_word(TABLES["findings"][name]) for name in ("not_after", "not_before"))
HEADS = frozenset(_BY_HEAD) | frozenset(_PAIRED)


def spots_in(sentence: Sequence[str]) -> list[Spot]:
    """Return the spots where a sentence names findings, from left to right."""
    found: list[Spot] = []
    taken = 0  # words before this already belong to a phrase
    for at in [place for place, word in enumerate(sentence) if word in HEADS]:
        if at < taken:
            continue
        spot = _phrase_at(sentence, at) or _pair_at(sentence, at, taken)
        if spot is not None:
            found.append(spot)
            taken = spot.end
    return found


def _phrase_at(sentence: Sequence[str], at: int) -> Spot | None:
    for words, finding in _BY_HEAD.get(sentence[at], ()):
        end = at + len(words)
        if len(words) > 1 and tuple(sentence[at:end]) != words:
            continue
        if at and sentence[at - 1] in _NOT_AFTER.get(words[0], ()):
            continue
        if end < len(sentence) and sentence[end] in _NOT_BEFORE.get(words[0], ()):
            continue
        return Spot(at, end, (finding,))
    return None


def _pair_at(sentence: Sequence[str], at: int, taken: int) -> Spot | None:
    for pair in _PAIRED.get(sentence[at], ()):
        for step in (-1, 1):
            place = at + step
            while 0 <= place < len(sentence) and abs(place - at) <= pair.reach:
                if sentence[place] in _BARRIERS and not _is_label(sentence, place, pair.near):
                    break
                if place < taken and (pair.normal or (sentence[place] in HEADS and "and" in sentence[taken:at])):
                    break  # "the heart is enlarged and vascularity is normal"
                if (pair.normal or pair.reach < _REACH) and _phrase_at(sentence, place):
                    break  # "a small nodule behind the heart"
                if sentence[place] in pair.near:
                    return Spot(min(at, place), max(at, place) + 1, pair.findings, pair.normal, True)
                place += step
    return None


def _is_label(sentence: Sequence[str], at: int, near: frozenset[str]) -> bool:
    """Return whether a mark is the colon after a label: "Heart: enlarged"."""
    return sentence[at] == ":" and at > 0 and sentence[at - 1] in near


def _kin() -> dict[str, frozenset[str]]:
    """Return, for each finding, those that name it as well, if less exactly, and itself."""
    tables = (TABLES["findings"]["kin"], TABLES["findings"]["same_place"])
    groups = [frozenset(words.split()) for table in tables for words in table.values()]
    names = {
        *TABLES["findings"]["phrases"],
        *(name for pair in TABLES["findings"]["pairs"] for name in pair["names"].split()),
    }
    return {name: frozenset({name}).union(*(group for group in groups if name in group)) for name in names}


KIN = _kin()
