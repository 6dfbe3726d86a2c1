"""Detects measurements, ages and durations of the case that the text gives but its row does not.

Thresholds ("more than 3 cm"), advice ("repeat after 6 weeks") and general statements are not measurements of the case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gxr_batch.text_checks.flags.evidence import Reading
from gxr_batch.text_checks.flags.lexicon import WORDS
from gxr_batch.text_checks.flags.mentions import GENERAL
from gxr_batch.text_checks.flags.sentences import words_of

_UNITS = {
    **dict.fromkeys(("mm", "millimetre", "millimetres", "millimeter", "millimeters"), ("length", 1.0)),
    **dict.fromkeys(("cm", "centimetre", "centimetres", "centimeter", "centimeters"), ("length", 10.0)),
    **dict.fromkeys(("ml", "cc", "millilitre", "millilitres", "milliliter", "milliliters"), ("volume", 1.0)),
    **dict.fromkeys(("l", "litre", "litres", "liter", "liters"), ("volume", 1000.0)),
    **dict.fromkeys(("%", "percent"), ("share", 1.0)),
    **dict.fromkeys(("hour", "hours"), ("time", 1 / 24)),
    **dict.fromkeys(("day", "days"), ("time", 1.0)),
    **dict.fromkeys(("week", "weeks"), ("time", 7.0)),
    **dict.fromkeys(("month", "months"), ("time", 30.4)),
    **dict.fromkeys(("year", "years"), ("time", 365.0)),
    "pack": ("smoking", 1.0),
}
_CUES = frozenset(_UNITS) | {"ratio", "age", "aged"}
_NUMBERS = "one two three four five six seven eight nine ten eleven twelve"
_SPELLED = {word: str(number) for number, word in enumerate(_NUMBERS.split(), start=1)}
_AGES = frozenset({"age", "aged"})
_RANGE = frozenset({"to", "x", "by", "and", "or", "times"})
_SPAN = frozenset({"to", "and", "or"})
_COMPARATORS = WORDS["numbers.comparators"]
_ADVICE = WORDS["numbers.advice"]
_PEOPLE = WORDS["numbers.people"]
_LASTS = WORDS["numbers.lasts"]
_HISTORY = WORDS["numbers.history"]
_TOLERANCE = 0.1  # for times, since a month is not a whole number of weeks


class _Measure(NamedTuple):
    at: int  # position of the number in its sentence
    number: float
    kind: str
    size: float  # in mm, ml, percent, days or pack-years
    unit_at: int


def invents_number(reading: Reading) -> bool:
    """Return whether a text gives a measurement, an age or a duration of the case that the row does not have."""
    if _CUES.isdisjoint(reading.vocabulary) or not reading.findings:
        return False
    given = [
        measure
        for sentence in reading.case
        if not _CUES.isdisjoint(sentence) and GENERAL.isdisjoint(sentence)
        for measure in _measures(sentence)
        if _is_of_the_case(sentence, measure)
    ]
    if not given:
        return False
    cells = "\n".join(str(value) for value in reading.evidence.values.values() if value is not None)
    words = [_SPELLED.get(word, word) for word in words_of(f"{reading.prompt}\n{cells}"[:100_000])]
    numbers = {number for word in words if (number := _number(word)) is not None}
    known = list(_measures(words))
    return any(not _is_known(measure, known, numbers) for measure in given)


def _number(word: str) -> float | None:
    if not word[0].isdecimal():
        return None
    try:
        return float(word.replace(",", "."))
    except ValueError:  # 1,234,567
        return None


def _measures(sentence: Sequence[str]) -> Iterator[_Measure]:
    for at, word in enumerate(sentence):
        number = _number(word)
        if number is None:
            continue
        unit_at = _unit_after(sentence, at)
        if unit_at is not None:
            kind, scale = _UNITS[sentence[unit_at]]
            age = kind == "time" and "old" in sentence[unit_at + 1 : unit_at + 2]
            yield _Measure(at, number, "age" if age else kind, number * scale, unit_at)
        elif sentence[at - 1] in _AGES and at:
            yield _Measure(at, number, "age", number * _UNITS["years"][1], at)
        elif number < 1 and "ratio" in sentence[max(at - 5, 0) : at]:
            yield _Measure(at, number, "share", number * 100, at)


def _unit_after(sentence: Sequence[str], at: int) -> int | None:
    """Return the position of a number's unit; the first of "3 to 5 cm" or "2 x 3 cm" shares it."""
    after = at + 1
    while after < len(sentence) and after <= at + 4:
        word = sentence[after]
        if word == "l" and after > at + 1:  # "T10 to L1"
            return None
        if word in _UNITS:
            return after
        if word not in _RANGE and not word[0].isdecimal():
            return None
        after += 1
    return None


def _is_range(sentence: Sequence[str], at: int) -> bool:
    """Return whether a number is an end of "3 to 5" or "3-5": ranges are general knowledge, not measurements."""
    near = [sentence[place] if 0 <= place < len(sentence) else "" for place in (at - 2, at - 1, at + 1, at + 2)]
    numbers = [bool(word) and word[0].isdecimal() for word in near]
    return numbers[1] or numbers[2] or (numbers[0] and near[1] in _SPAN) or (numbers[3] and near[2] in _SPAN)


def _is_of_the_case(sentence: Sequence[str], measure: _Measure) -> bool:
    before = sentence[max(measure.at - 3, 0) : measure.at]
    after = sentence[measure.unit_at + 1 : measure.unit_at + 5]
    if _is_range(sentence, measure.at) or not _COMPARATORS.isdisjoint(before):
        return False
    if measure.kind == "age":
        return True
    if not _ADVICE.isdisjoint(sentence):
        return False
    if measure.kind == "share":
        ratio = sentence.index("ratio") if "ratio" in sentence else measure.at
        normal = "normal" in sentence[max(ratio - 3, 0) : ratio]
        return not normal and _PEOPLE.isdisjoint(after)
    if measure.kind == "time":
        return (bool(before) and before[-1] in _LASTS) or not _HISTORY.isdisjoint(after[:2])
    return True


def _is_known(measure: _Measure, known: Sequence[_Measure], numbers: set[float]) -> bool:
    if measure.number in numbers:  # a cell often has no unit, especially an age
        return True
    if measure.kind == "time":
        return any(other.kind == "time" and _near(other.size, measure.size) for other in known)
    return any(other.kind == measure.kind and abs(other.size - measure.size) <= 1e-6 * other.size for other in known)


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= _TOLERANCE * max(one, other)
