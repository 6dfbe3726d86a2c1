"""What templates can call: small rules that turn cells into parts of a sentence."""

from __future__ import annotations

import re
from typing import Any

_UNKNOWN_SEXES = frozenset({"", "u", "unknown", "o", "other", "n", "na", "n/a", "not stated", "?"})
_SEXES = {"m": "male", "male": "male", "man": "man", "boy": "boy", "f": "female", "female": "female"}
_SEXES |= {"woman": "woman", "girl": "girl"}
_AGE_UNITS = re.compile(
    r"(\d+)\s*[- ]?\s*(y|m|w|d|years?|yrs?|months?|mos?|weeks?|wks?|days?)\b\.?( old)?", re.IGNORECASE
)
_UNITS = {"y": "year", "m": "month", "w": "week", "d": "day"}


def as_text(value: Any) -> str:
    """Return a cell as people write it: whole floats without ".0", no blanks around it, nothing for a missing one."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def clause(value: Any, lead: str = "") -> str:
    """Return text without its last full stop; where it begins as a sentence of its own, `lead` stands before it."""
    text = as_text(value).rstrip().removesuffix(".").rstrip()
    return lead + text if lead and re.match(r"[A-Z][a-z]", text) else text


def patient(age: Any, sex: Any) -> str:
    """Return e.g. "a 65-year-old male", "an 8-month-old girl", "a female patient", "a patient"."""
    years, person = _age(age), as_text(sex).lower()
    noun = _SEXES.get(person, "patient" if person in _UNKNOWN_SEXES else f"{as_text(sex)} patient")
    if noun in {"male", "female"} and not years:
        noun += " patient"
    words = f"{years} {noun}".strip()
    return f"{_article(words)} {words}"


def _age(value: Any) -> str:
    text = as_text(value)
    if match := re.fullmatch(r"\d{1,3}", text):
        return f"{match[0]}-year-old"
    if match := _AGE_UNITS.fullmatch(text):
        return f"{match[1]}-{_UNITS[match[2][0].lower()]}-old"
    return text


def _article(words: str) -> str:
    number = re.match(r"\d+", words)
    spoken_vowel = number and (number[0][0] == "8" or number[0] in {"11", "18"})
    return "an" if spoken_vowel or re.match(r"[aeiou]", words, re.IGNORECASE) else "a"
