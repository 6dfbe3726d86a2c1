"""The functions that templates can call: they turn cells into parts of a sentence."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

from gxr_batch.cells import Pairs, Record
from gxr_batch.cells import printed as as_printed
from gxr_batch.rows.null_words import is_null_word

_UNKNOWN = frozenset({"", "-", "?", "n", "na", "n/a", "nan", "none", "not known", "not stated", "u", "unk", "unknown"})
_DECIMAL = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_LONGEST_NUMBER = 100
_UNKNOWN_SEXES = _UNKNOWN | {"o", "other", "x"}
_SEXES = {"m": "male", "male": "male", "man": "man", "boy": "boy"}
_SEXES |= {"f": "female", "female": "female", "woman": "woman", "girl": "girl"}
# As German tables have them; "m" is the same word.
_MORE_SEXES = {"w": "female", "weiblich": "female", "männlich": "male", "maennlich": "male"}
_AGE = re.compile(
    r"(\d{1,3}(?:\.\d+)?)[\s-]*"
    r"(y|years?|yrs?|y\.?\s?/?o|m|months?|mths?|mos?|w|weeks?|wks?|d|days?|h|hours?|hrs?)?\.?"
    r"(?:[\s-]*old|\s+of\s+age)?",
    re.IGNORECASE,
)
_UNITS = {"y": "year", "m": "month", "w": "week", "d": "day", "h": "hour"}
_SENTENCE = re.compile(r"[A-Z][a-z]|An? ")
_CODE = re.compile(r"[\d.]+")
_AGE_WORD = re.compile(r"[A-Za-z]+(-[A-Za-z]+)*")
_NUMBER = re.compile(r"\d+")
_VOWEL = re.compile(r"(?!one\b|uni)[aeiou]", re.IGNORECASE)
_SEVERAL = re.compile(r"\b(from|versus|vs|between)\b", re.IGNORECASE)


class NotANumber(ValueError):
    """A cell to which a template applies `number` has text that is no number."""


class _NoNumber:
    """What `number` makes of a missing cell: false, equal to nothing, in no order to any number, printed as nothing."""

    def _never(self, _: object) -> bool:
        return False

    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = _never

    def __ne__(self, _: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return ""

    def _itself(self, _: object) -> _NoNumber:
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _itself


NO_NUMBER = _NoNumber()


def number(value: Any) -> Any:
    """Return a cell's text as a number: "65" as 65, "1.0" as 1.0; a missing cell is neither true nor equal to anything.

    Raises NotANumber for other text, and for one that can be read in two ways, such as "1,234".
    """
    if isinstance(value, bool):
        return int(value)
    if value is None or value is NO_NUMBER or (isinstance(value, float) and math.isnan(value)):
        return NO_NUMBER
    if not isinstance(value, str):
        if isinstance(value, int | float | Decimal):
            return value
        raise NotANumber
    text = value.strip().replace("\N{MINUS SIGN}", "-")
    if not text or is_null_word(text):
        return NO_NUMBER
    if len(text) > _LONGEST_NUMBER or not _DECIMAL.fullmatch(text):
        raise NotANumber
    return int(text) if text.lstrip("+-").isdecimal() else float(text)


def printed(value: Any) -> Any:
    """Return a value as the prompt shows it. Raises TypeError for a struct or a map, whose members can be shown."""
    if isinstance(value, Record | Pairs):
        raise TypeError
    return as_printed(value)


def as_text(value: Any) -> str:
    """Return a cell as people write it, without surrounding spaces."""
    return (value if type(value) is str else str(printed(value))).strip()


def clause(value: Any, lead: str = "") -> str:
    """Return text without its final punctuation mark, after `lead` if it starts like a separate sentence."""
    text = as_text(value).rstrip(" \t\r\n.,;:")
    return lead + text if lead and _SENTENCE.match(text) else text


def stop(value: Any) -> str:
    """Return the full stop that ends a sentence whose last clause is `value`; nothing after "?" or "!"."""
    return "" if clause(value).endswith(("?", "!")) else "."


def of_each(topic: Any) -> str:
    """Return " of each" for a topic that compares several things, else nothing."""
    return " of each" if _SEVERAL.search(as_text(topic)) else ""


def patient(age: Any, sex: Any) -> str:
    """Return e.g. "a 65-year-old male", "an 8-month-old girl", "a female patient (age: 90+)", "a patient"."""
    person = as_text(sex).lower()
    unknown_letter = len(person) == 1 and person not in _SEXES
    return _described(age, _MORE_SEXES.get(person) or ("patient" if unknown_letter else _noun(person)))


def patient_of_version_1(age: Any, sex: Any) -> str:
    """Return the same with fewer words for a sex, and an unknown letter as it is."""
    return _described(age, _noun(as_text(sex).lower()))


def _noun(sex: str) -> str:
    unknown = sex in _UNKNOWN_SEXES or _CODE.fullmatch(sex)  # a number is an unknown code
    return "patient" if unknown else _SEXES.get(sex, f"{sex} patient")


def _described(age: Any, noun: str) -> str:
    said = as_text(age)
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
