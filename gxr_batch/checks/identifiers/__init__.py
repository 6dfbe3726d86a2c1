"""Screening for identifiers: rules that look for what is written in the usual ways, in English.

Screening, never de-identification: what is written in another way passes. A hit is told by the rule's name alone; the
text goes no further. Every pattern is bounded, so that a long or hostile cell costs no more than its length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from gxr_batch.checks.identifiers import dates, names, numbers, places

RULES = {
    "mrn": "A record, accession or account number after such a word, or seven digits or more in one piece.",
    "name": "A person's name after a title or a word such as Patient:, or in front of letters such as MD.",
    "date": "A full date: day, month and year, in figures or with the month's name.",
    "age_over_89": "An age of 90 years or more.",
    "phone": "A telephone, fax or pager number.",
    "ssn": "A social security number.",
    "email": "An e-mail address.",
    "address": "A street with its number, a post office box, a place with its ZIP code, or what follows Address:.",
    "hospital": "The name of a hospital or clinic.",
}


class _Search(NamedTuple):
    """A way to find something, tried where the text has one of the cues.

    Cues are words in lower case, one of the signs below, _FIGURE for any digit, or _NUMBER for four of them close
    together. They spare an ordinary cell nearly every pattern.
    """

    rule: str
    find: Callable[[str], bool]
    cues: tuple[str, ...]


_FIGURE, _NUMBER = ("0",), ("0000",)


_SEARCHES = (
    _Search("mrn", numbers.record_number, _NUMBER),
    _Search("mrn", numbers.long_number, _NUMBER),
    _Search("name", names.titled, names.TITLE_CUES),
    _Search("name", names.named, ("name", "surname")),
    _Search("name", names.in_a_role, (":",)),
    _Search("name", names.in_full, (":", *names.BY_WORDS)),
    _Search("name", names.patient, ("patient", "pt")),
    _Search("name", names.lettered, names.LETTER_CUES),
    _Search("date", dates.in_figures, _NUMBER),
    _Search("date", dates.in_one_piece, _NUMBER),
    _Search("date", dates.with_month, dates.MONTH_CUES),
    _Search("age_over_89", numbers.age_over_89, _FIGURE),
    _Search("age_over_89", numbers.age_in_words, numbers.AGE_CUES),
    _Search("phone", numbers.phone_number, _NUMBER),
    _Search("phone", numbers.phone_number_abroad, ("+",)),
    _Search("ssn", numbers.social_security_number, _NUMBER),
    _Search("email", numbers.e_mail, ("@",)),
    _Search("address", places.street, _FIGURE),
    _Search("address", places.zip_code, _NUMBER),
    _Search("address", places.street_alone, places.STREET_ALONE_CUES),
    _Search("address", places.address, places.ADDRESS_CUES),
    _Search("hospital", places.hospital, places.HOSPITAL_CUES),
)
_CUES = frozenset(cue for search in _SEARCHES for cue in search.cues)
_SIGNS = ":@+"
# What is no letter becomes a blank, so that "03MAR2019" and "(Dr.Smith" fall into words.
_BLANKS = {code: " " for code in range(128) if not chr(code).isalpha()} | {ord("\u2019"): " "}


def identifiers_in(text: str) -> tuple[str, ...]:
    """Return the names of the rules that find something, in the order of RULES, each once."""
    words = _CUES.intersection(text.lower().translate(_BLANKS).split())
    words |= {sign for sign in _SIGNS if sign in text}
    if numbers.any_figure(text):
        words |= {*_FIGURE, *_NUMBER} if numbers.any_number(text) else {*_FIGURE}
    if not words:
        return ()
    tried = [search for search in _SEARCHES if not words.isdisjoint(search.cues)]
    found = {search.rule for search in tried if search.find(text)}
    return tuple(rule for rule in RULES if rule in found) if found else ()
