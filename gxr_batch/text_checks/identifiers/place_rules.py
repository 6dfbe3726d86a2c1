"""Streets and hospitals, found from the word that names their kind."""

from __future__ import annotations

import re

from gxr_batch.text_checks.identifiers.name_rules import is_name
from gxr_batch.text_checks.word_lists import either, read_tables

_LISTS = read_tables("identifiers/words.toml")["places"]
_STREETS, _STREETS_SHORT, _STREETS_ALONE = (
    _LISTS[name].split() for name in ("streets", "streets_short", "streets_alone")
)
_SHORT = either((*map(str.title, _STREETS_SHORT), *map(str.upper, _STREETS_SHORT)))
_KINDS, _LEADS, _SAINTS = (frozenset(_LISTS[name].split()) for name in ("kinds", "leads", "saints"))
_WORD = r"[A-Z][\w'\u2019.-]{0,30}"
_STREET = re.compile(
    r"[0-9](?<![\w.,/-][0-9])[0-9]{0,4}[A-Za-z]?,?[ ]{1,2}(?:(?:[NSEW]|North|South|East|West)\.?[ ])?"
    rf"(?P<words>(?:(?:{_WORD}|[0-9]{{1,3}}(?:st|nd|rd|th))[ ]){{1,3}})"
    rf"(?:(?i:{either(_STREETS)})|{_SHORT})(?!\w)"
)
_STREET_ALONE = re.compile(rf"\b(?P<words>[A-Z][a-z'\u2019-]{{2,30}})[ ](?:{either(map(str.title, _STREETS_ALONE))})\b")
_BOX = re.compile(r"\bP\.?[ ]?O\.?[ ]?Box[ ]#?[0-9]", re.IGNORECASE)
_ZIP = re.compile(r",[ ]?(?P<words>[A-Z]{2}|[A-Z][a-z]{3,12}(?:[ ][A-Z][a-z]{3,12})?)[ ]{1,2}[0-9]{5}(?![0-9])")
_AFTER_WORD = re.compile(
    r"\baddress[ \t]?[:=]\s{0,3}(?![Xx_])\w|\b(?:lives|living|resides|residing)[ ](?:at|on)[ ][0-9]", re.IGNORECASE
)
STREET_CUES, STREET_ALONE_CUES = (*_STREETS, *_STREETS_SHORT), tuple(_STREETS_ALONE)
ADDRESS_CUES = ("box", "address", "lives", "living", "resides", "residing")

_FACILITY = re.compile(
    r"\b(?:hospital|hosp\.|medical[ ]cent(?:er|re)|med\.?[ ]ctr|clinic|infirmary|hospice|health[ ]system"
    r"|(?:health|cancer|imaging)[ ]cent(?:er|re)|nursing[ ]home)(?!\w)",
    re.IGNORECASE,
)
_OF = re.compile(
    r"[ ](?i:of|for)[ ](?:(?i:the)[ ])?(?:(?i:university)[ ](?i:of)[ ](?:(?i:the)[ ])?)?"
    r"(?P<name>[A-Z][\w'\u2019-]{1,30})"
)
HOSPITAL_CUES = ("hospital", "hosp", "clinic", "infirmary", "hospice")
# Words that are part of a name only before one of these kinds.
CENTER_CUES = ("center", "centre", "ctr", "system", "home")
CENTER_KINDS = ("medical", "med", "health", "cancer", "imaging", "nursing")
_DEPARTMENT = re.compile(r"(?:ology|ics|iatry|apy|surgery|ation|medicine)$")
_CHARACTERS_BEFORE, _WORDS_BEFORE = 80, 6


def street(text: str) -> bool:
    """Return whether the text has a street with its number."""
    return _has_a_name(_STREET, text)


def street_alone(text: str) -> bool:
    """Return whether the text has a street without a number, in title case."""
    return _has_a_name(_STREET_ALONE, text)


def _has_a_name(pattern: re.Pattern[str], text: str) -> bool:
    words = (word for match in pattern.finditer(text) for word in match["words"].split())
    return any(is_name(word) or word[0].isdigit() for word in words)


def address(text: str) -> bool:
    """Return whether the text has a post office box, or something after `Address:` or `lives at`."""
    return any(pattern.search(text) for pattern in (_BOX, _AFTER_WORD))


def zip_code(text: str) -> bool:
    """Return whether a ZIP code follows a state."""
    return _has_a_name(_ZIP, text)


def hospital(text: str) -> bool:
    """Return whether a hospital or clinic is named, not only mentioned."""
    return any(_is_named(text, match) for match in _FACILITY.finditer(text))


def _is_named(text: str, match: re.Match[str]) -> bool:
    word = match[0]
    after = _OF.match(text, match.end())
    if after is not None and word[0].isupper() and is_name(after["name"]):
        return True
    before = text[max(0, match.start() - _CHARACTERS_BEFORE) : match.start()]
    words = before.rpartition("\n")[2].split()[-_WORDS_BEFORE:]
    while words and (words[-1].lower() in _KINDS or _DEPARTMENT.search(words[-1].lower())):
        words.pop()
    name = []
    while words and _is_part_of_a_name(words[-1]):
        name.append(words.pop().lower())
    if not name:
        return False
    # In lower case, or if all is in capitals, a capital before it means nothing: a word must introduce the name.
    in_title_case = word[0].isupper() and not word.isupper()
    return in_title_case or not _SAINTS.isdisjoint(name) or bool(words and words[-1].lower() in _LEADS)


def _is_part_of_a_name(word: str) -> bool:
    if word.lower() in _SAINTS and word[0].isupper():
        return True
    return word[-1] not in ".,;:)?!" and is_name(word)
