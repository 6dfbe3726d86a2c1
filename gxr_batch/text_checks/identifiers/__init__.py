"""Screening for identifiers: rules that find identifiers written in the usual ways, in English.

This is screening, not de-identification: identifiers written in other ways pass. A hit is reported by its rule's name
only; the text goes no further. Every pattern is bounded, so that a long or hostile cell takes time linear in its
length.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import NamedTuple

from gxr_batch.text_checks.identifiers import date_rules, name_rules, number_rules, place_rules

RULES = {
    "mrn": "A number after a word such as MRN, accession or account, or any number of seven or more digits.",
    "name": "A person's name after a title or a word such as Patient:, or before letters such as MD.",
    "date": "A full date: day, month and year, in figures or with the month's name.",
    "age_over_89": "An age of 90 years or more.",
    "phone": "A telephone, fax or pager number.",
    "ssn": "A social security number.",
    "email": "An e-mail address.",
    "address": "A street with its number, a post office box, a place with its ZIP code, or text after Address:.",
    "hospital": "The name of a hospital or clinic.",
}


class _Search(NamedTuple):
    """A search, tried only if the text has one of the cues, and one of `also` unless that is empty.

    Cues are words in lower case, one of the signs below, a result of number_rules.cues_in, or _NOT_ASCII, since a word
    may hide between signs that do not separate words. Thanks to cues, an ordinary text needs almost no pattern.
    """

    rule: str
    find: Callable[[str], bool]
    cues: tuple[str, ...]
    also: tuple[str, ...] = ()


_SIGNS, _NOT_ASCII = ":@+", "\u00a0"
_NUMBER, _FIGURES = (number_rules.NUMBER,), (number_rules.FIGURES,)


_SEARCHES = (
    _Search("mrn", number_rules.record_number, _NUMBER),
    _Search("mrn", number_rules.long_number, _NUMBER),
    _Search("name", name_rules.titled, name_rules.TITLE_CUES),
    _Search("name", name_rules.named, ("name", "surname")),
    _Search("name", name_rules.in_a_role, (*name_rules.ROLE_CUES, _NOT_ASCII), (":",)),
    _Search("name", name_rules.in_full, (*name_rules.FULL_WORDS, _NOT_ASCII), (":",)),
    _Search("name", name_rules.in_full, name_rules.BY_WORDS, ("by",)),
    _Search("name", name_rules.patient, ("patient", "pt")),
    _Search("name", name_rules.lettered, name_rules.LETTER_CUES),
    _Search("date", date_rules.in_figures, _NUMBER),
    _Search("date", date_rules.in_one_piece, _NUMBER),
    _Search("date", date_rules.with_month, date_rules.MONTH_CUES, _FIGURES),
    _Search("age_over_89", number_rules.age_over_89, number_rules.OLD_CUES),
    _Search("age_over_89", number_rules.age_in_words, number_rules.AGE_CUES),
    _Search("phone", number_rules.phone_number, _NUMBER),
    _Search("phone", number_rules.phone_number_abroad, ("+",)),
    _Search("ssn", number_rules.social_security_number, _NUMBER),
    _Search("email", number_rules.e_mail, ("@",)),
    _Search("address", place_rules.street, (*place_rules.STREET_CUES, _NOT_ASCII), _FIGURES),
    _Search("address", place_rules.zip_code, _NUMBER),
    _Search("address", place_rules.street_alone, place_rules.STREET_ALONE_CUES),
    _Search("address", place_rules.address, place_rules.ADDRESS_CUES),
    _Search("hospital", place_rules.hospital, place_rules.HOSPITAL_CUES),
    _Search("hospital", place_rules.hospital, place_rules.CENTER_CUES, (*place_rules.CENTER_KINDS, _NOT_ASCII)),
)
_ALL_CUES = {cue for search in _SEARCHES for cue in (*search.cues, *search.also)}
_BY_CUE = {cue: [search for search in _SEARCHES if cue in search.cues] for cue in _ALL_CUES}
_WORDS = {cue.encode(): cue for cue in _ALL_CUES if cue.isalpha()}
# ASCII letters become lower case, all other ASCII a space, so that "03MAR2019" and "(Dr.Smith" split into words.
_SMALL = {ord(letter): ord(letter.lower()) for letter in string.ascii_letters}
_TO_WORDS = bytes(_SMALL.get(code, ord(" ")) if code < 128 else code for code in range(256))


def identifiers_in(text: str) -> tuple[str, ...]:
    """Return the names of the rules that find something, in the order of RULES, each once."""
    cues = _cues_in(text)
    hopeful = (search for cue in cues for search in _BY_CUE[cue])
    tried = {search.find: search.rule for search in hopeful if not (search.also and cues.isdisjoint(search.also))}
    found = {rule for find, rule in tried.items() if find(text)}
    return tuple(rule for rule in RULES if rule in found) if found else ()


def _cues_in(text: str) -> set[str]:
    raw = text.encode("utf-8", "surrogatepass")  # translating and splitting bytes takes half the time
    cues = number_rules.cues_in(text, raw)
    cues.update(sign for sign in _SIGNS if sign in text)
    if not text.isascii():
        cues.add(_NOT_ASCII)
        raw = " ".join(text.replace("\u2019", " ").split()).encode("utf-8", "surrogatepass")  # plain spaces only
    cues.update(_WORDS[word] for word in _WORDS.keys() & raw.translate(_TO_WORDS).split())
    return cues
