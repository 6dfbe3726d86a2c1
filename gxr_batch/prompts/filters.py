"""What templates can call: small rules that turn cells into parts of a sentence."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

_UNKNOWN = frozenset({"", "-", "?", "n", "na", "n/a", "nan", "none", "not known", "not stated", "u", "unk", "unknown"})
_UNKNOWN_SEXES = _UNKNOWN | {"o", "other", "x"}
_SEXES = {"m": "male", "male": "male", "man": "man", "boy": "boy"}
_SEXES |= {"f": "female", "female": "female", "woman": "woman", "girl": "girl"}
_AGE = re.compile(
    r"(\d{1,3}(?:\.\d+)?)[\s-]*"
    r"(y|years?|yrs?|y\.?\s?/?o|m|months?|mths?|mos?|w|weeks?|wks?|d|days?|h|hours?|hrs?)?\.?"
    r"(?:[\s-]*old|\s+of\s+age)?",
    re.IGNORECASE,
)
_UNITS = {"y": "year", "m": "month", "w": "week", "d": "day", "h": "hour"}
_WHOLE = 10**15  # beyond, a float is no whole number but a magnitude
_FRACTIONAL = (float, Decimal)
_SENTENCE = re.compile(r"[A-Z][a-z]|An? ")
_CODE = re.compile(r"[\d.]+")
_AGE_WORD = re.compile(r"[A-Za-z]+(-[A-Za-z]+)*")
_NUMBER = re.compile(r"\d+")
_VOWEL = re.compile(r"(?!one\b|uni)[aeiou]", re.IGNORECASE)
_SEVERAL = re.compile(r"\b(from|versus|vs|between)\b", re.IGNORECASE)


def printed(value: Any) -> Any:
    """Return what stands in the prompt for a value: whole floats without ".0", nothing for a missing one."""
    if value is None:
        return ""
    if isinstance(value, _FRACTIONAL) and math.isfinite(value) and -_WHOLE < value < _WHOLE and value == int(value):
        return str(int(value))
    return value


def as_text(value: Any) -> str:
    """Return a cell as people write it, without blanks around it."""
    return (value if type(value) is str else str(printed(value))).strip()


def clause(value: Any, lead: str = "") -> str:
    """Return text without the mark that ends it; where it begins as a sentence of its own, `lead` stands before it."""
    text = as_text(value).rstrip(" \t\r\n.,;:")
    return lead + text if lead and _SENTENCE.match(text) else text


def stop(value: Any) -> str:
    """Return the full stop that ends a sentence whose last clause is `value`; nothing after "?" or "!"."""
    return "" if clause(value).endswith(("?", "!")) else "."


def of_each(topic: Any) -> str:
    """Return " of each" for a topic that sets several things against each other, else nothing."""
    return " of each" if _SEVERAL.search(as_text(topic)) else ""


def patient(age: Any, sex: Any) -> str:
    """Return e.g. "a 65-year-old male", "an 8-month-old girl", "a female patient (age: 90+)", "a patient"."""
    said, person = as_text(age), as_text(sex).lower()
    unknown = person in _UNKNOWN_SEXES or _CODE.fullmatch(person)  # what a number codes for, nobody here knows
    noun = "patient" if unknown else _SEXES.get(person, f"{person} patient")
    adjective = _age(said)
    if noun in {"male", "female"} and not adjective:
        noun += " patient"
    words = f"{adjective} {noun}".strip()
    other = "" if adjective or said.lower() in _UNKNOWN else f" (age: {said})"
    return f"{_article(words)} {words}{other}"


def _age(text: str) -> str:
    """Return an age as an adjective: "65-year-old", "elderly"; nothing if it is unknown or cannot be one."""
    if text.lower() in _UNKNOWN:
        return ""
    if match := _AGE.fullmatch(text):
        return f"{float(match[1]):g}-{_UNITS[(match[2] or 'y')[0].lower()]}-old"
    return text.lower() if _AGE_WORD.fullmatch(text) else ""


def _article(words: str) -> str:
    number = _NUMBER.match(words)
    spoken_vowel = number and (number[0][0] == "8" or number[0] in {"11", "18"})
    return "an" if spoken_vowel or _VOWEL.match(words) else "a"
