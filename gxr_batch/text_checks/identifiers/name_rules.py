"""Names of persons: after a title, after a word that introduces one, or before professional letters.

A name is a capitalised word that is not an ordinary word of a report. "XXXX" and "___", which replace names in public
data sets, are not names.
"""

from __future__ import annotations

import re

from gxr_batch.text_checks.word_lists import either, read_tables

_LISTS = read_tables("identifiers/words.toml")["names"]
BY_WORDS = tuple(_LISTS["by"].split())
_BY = tuple(f"{word} by" for word in BY_WORDS)
_ROLE_WORDS = (*_LISTS["roles"], *_BY)
FULL_WORDS = tuple(_LISTS["full"].split())
_BEFORE_COLON = (*_ROLE_WORDS, "md")

_TITLES, _TITLES_WITH_POINT = _LISTS["titles"].split(), _LISTS["titles_with_point"].split()
_ORDINARY = frozenset(_LISTS["ordinary"].split())
ROLE_CUES = tuple(word.split()[0] for word in _ROLE_WORDS)
TITLE_CUES = (*_TITLES, *_TITLES_WITH_POINT)
LETTER_CUES = ("md", "m", "d", "mbbs", "frcr", "frcpc", "rn", "phd", "ph", "c")  # m for M.D., c for PA-C

# Capitals that are both titles and abbreviations: magnetic resonance, multiple sclerosis, digital radiography.
_AMBIGUOUS = frozenset({"MR", "MS", "DR"})
_HIDDEN = frozenset("Xx_")
_LETTERS = re.compile(r"(?:MD|M\.D\.|MBBS|D\.O\.|FRCR|FRCPC|RN|PhD|PHD|Ph\.D\.|PA-C)(?!\w)")
_CHARACTERS_BEFORE = 80


def _name(group: str) -> str:
    """Return the pattern of one name: initials, particles such as "van der", then the word that counts."""
    initials = r"(?:[A-Z](?:\.[ -]?|[ ])){0,3}"
    particles = r"(?:(?i:de|da|do|dos|di|du|del|la|le|van|von|der|den|el|al|bin|ibn|ter|ten)[ -]){0,3}"
    return initials + particles + rf"(?P<{group}>[^\W\d_][\w'\u2019-]{{1,30}})"


_FIRST, _SECOND = _name("first"), _name("second")
_TITLED = re.compile(
    rf"\b(?P<title>(?i:{either(_TITLES)}|(?:{either(_TITLES_WITH_POINT)})(?=\.)))\b"
    rf"(?:(?P<dot>\.)[ \t]{{0,3}}|[ \t]{{1,3}}){_FIRST}"
)
_NAMED = re.compile(
    r"(?:(?i:\b(?:patient|pt|full|first|last|given|family|maiden|middle|physician|doctor|mother|father|guardian)"
    r"(?:'s|\u2019s)?[ \t]name|\bsurname)|(?:^|(?<=[\n.;,|(\x00-\x1f])|(?<=[.;,|(][ ]))(?i:name))"
    rf"[ \t]{{0,2}}(?:[:=]|\bis\b)\s{{0,3}}{_FIRST}"
)
_IN_A_ROLE = re.compile(rf"\b(?i:{either(_ROLE_WORDS)})(?:[ ]MD)?[ \t]{{0,2}}:\s{{0,3}}{_FIRST}")
_IN_FULL = re.compile(
    rf"\b(?:(?i:{either(FULL_WORDS)})[ \t]{{0,2}}(?P<colon>:)"
    rf"|(?i:{either(BY_WORDS)})[ ](?i:by))\s{{1,3}}{_FIRST}(?:[ ]|,[ ]?){_SECOND}"
)
_PATIENT = re.compile(rf"[Pp](?<!\w[Pp])(?:atient|t\.?)[ ]{_FIRST}[ ]{_SECOND}")
_BEFORE_LETTERS = re.compile(rf"\b{_FIRST}[ ]{_SECOND},?[ ]{{1,2}}$")


def is_name(word: str) -> bool:
    """Return whether a word can be a name: capitalised, two letters or more, no ordinary word or redaction."""
    bare = word.rstrip("'\u2019-.").removesuffix("'s").removesuffix("\u2019s")
    return (
        len(bare) > 1
        and bare[0].isupper()
        and not any(character.isdigit() for character in bare)
        and bare.lower() not in _ORDINARY
        and not set(bare) <= _HIDDEN
    )


def titled(text: str) -> bool:
    """Return whether a name follows a title."""
    return any(_is_titled(match) for match in _TITLED.finditer(text))


def _is_titled(match: re.Match[str]) -> bool:
    title, name = match["title"], match["first"]
    if title in _AMBIGUOUS and not name.isupper() and not (title == "DR" and match["dot"]):
        return False  # "MR Spectroscopy", and "history of MS. Bibasilar atelectasis"
    return is_name(name)


def named(text: str) -> bool:
    """Return whether a name follows `Name:` or similar words."""
    return any(is_name(match["first"]) for match in _NAMED.finditer(text))


def in_a_role(text: str) -> bool:
    """Return whether a name follows `Radiologist:`, `signed by:` or similar words."""
    if not _precedes_colon(_folded(text), _BEFORE_COLON):
        return False
    # Here a short word in capitals is a department or a person's initials.
    names = (match["first"] for match in _IN_A_ROLE.finditer(text))
    return any(is_name(name) and not (len(name) < 4 and name.isupper()) for name in names)


def in_full(text: str) -> bool:
    """Return whether first and last name follow `Patient:`, `signed by` or similar words."""
    folded = _folded(text)
    if not (_precedes_colon(folded, FULL_WORDS) or any(words in folded for words in _BY)):
        return False
    return any(_are_names(match, bool(match["colon"])) for match in _IN_FULL.finditer(text))


def _folded(text: str) -> str:
    """Return a text in which letters that IGNORECASE treats as equal are the same."""
    return text.casefold().replace("i\u0307", "i").replace("\u0131", "i")


def _precedes_colon(folded: str, words: tuple[str, ...]) -> bool:
    """Return whether one of the words ends before a colon: a check that is far cheaper than the pattern."""
    return any(piece.rstrip(" \t").endswith(words) for piece in folded.split(":")[:-1])


def patient(text: str) -> bool:
    """Return whether first and last name directly follow the word patient."""
    return any(_are_names(match, False) for match in _PATIENT.finditer(text))


def _are_names(match: re.Match[str], after_colon: bool) -> bool:
    """Return whether both words are names; without a colon, capitals mean nothing if the whole text is in capitals."""
    first, second = match["first"], match["second"]
    return (after_colon or not (first.isupper() or second.isupper())) and is_name(first) and is_name(second)


def lettered(text: str) -> bool:
    """Return whether a name of two words precedes letters such as MD."""
    for letters in _LETTERS.finditer(text):
        match = _BEFORE_LETTERS.search(text[max(0, letters.start() - _CHARACTERS_BEFORE) : letters.start()])
        if match is not None and is_name(match["first"]) and is_name(match["second"]):
            return True
    return False
