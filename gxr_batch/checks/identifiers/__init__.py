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
    """A way to find something, tried where the text has a figure, if it needs one, and one of the cues, if it has any.

    Cues are in lower case. They cost next to nothing, and spare an ordinary cell nearly every pattern.
    """

    rule: str
    find: Callable[[str], object]
    figures: bool = False
    cues: tuple[str, ...] = ()


_SEARCHES = (
    _Search("mrn", numbers.record_number, figures=True),
    _Search("mrn", numbers.long_number, figures=True),
    _Search("name", names.titled, cues=names.TITLE_CUES),
    _Search("name", names.named, cues=("name",)),
    _Search("name", names.in_a_role, cues=names.ROLE_CUES),
    _Search("name", names.in_full, cues=names.FULL_CUES),
    _Search("name", names.patient, cues=("patient ", " pt ", " pt.")),
    _Search("name", names.lettered, cues=names.LETTER_CUES),
    _Search("date", dates.in_figures, figures=True),
    _Search("date", dates.in_one_piece, figures=True),
    _Search("date", dates.with_month, figures=True, cues=dates.MONTHS),
    _Search("age_over_89", numbers.age_over_89, figures=True, cues=("9", "10", "11", "12")),
    _Search("age_over_89", numbers.age_in_words, cues=("ninet", "hundred", "nonagen", "centenar", "90")),
    _Search("phone", numbers.phone_number, figures=True),
    _Search("phone", numbers.phone_number_abroad, figures=True, cues=("+",)),
    _Search("ssn", numbers.social_security_number, figures=True),
    _Search("email", numbers.e_mail, cues=("@",)),
    _Search("address", places.street, figures=True),
    _Search("address", places.street_alone, cues=places.STREET_ALONE_CUES),
    _Search("address", places.address, cues=places.ADDRESS_CUES),
    _Search("address", places.zip_code, figures=True),
    _Search("hospital", places.hospital, cues=places.HOSPITAL_CUES),
)


# One loop over all cues, and one list of what needs none but a figure: this is all that an ordinary cell costs.
_BY_CUE = tuple((cue, search) for search in _SEARCHES for cue in search.cues)
_BY_FIGURE = tuple(search for search in _SEARCHES if not search.cues)


def identifiers_in(text: str) -> tuple[str, ...]:
    """Return the names of the rules that find something, in the order of RULES, each once."""
    lowered = f" {text.lower()} "
    figures = numbers.any_figure(text)
    tried = dict.fromkeys([search for cue, search in _BY_CUE if cue in lowered and (figures or not search.figures)])
    if figures:
        tried |= dict.fromkeys(_BY_FIGURE)
    found = {search.rule for search in tried if search.find(text)}
    return tuple(rule for rule in RULES if rule in found) if found else ()
