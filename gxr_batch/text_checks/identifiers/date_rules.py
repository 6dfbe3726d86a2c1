"""Full dates: day, month and year. "2/24", "March 2019" and a year alone are not dates."""

from __future__ import annotations

import re

_MONTHS = "january february march april may june july august september october november december"
MONTH_CUES = (*_MONTHS.split(), *(month[:3] for month in _MONTHS.split()), "sept")
_MONTH = (
    "(?i:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\.?"
)
_YEAR = "(?:19|20)[0-9]{2}(?![0-9])"
# Patterns begin with the digit and look back from there: the search then jumps from digit to digit.
_IN_FIGURES = re.compile(
    r"[0-9](?<![\w./-][0-9])[0-9]{0,3}([-.]|[ ]?/[ ]?)[0-9]{1,2}\1[0-9]{1,4}(?!(?!T[0-9])\w|[-/.][0-9])"
)
_IN_ONE_PIECE = re.compile(r"[12](?<![\w.,/-][12])(?:(?<=1)9|(?<=2)0)[0-9]{6}(?!\w)")
_DAY_FIRST = re.compile(
    rf"[0-9](?<![\w.][0-9])[0-9]?(?:(?:st|nd|rd|th)?[ .,-]{{0,2}}(?:of[ ])?{_MONTH},?[ -]{{0,2}}{_YEAR}"
    # Two digits are a year only if nothing else is likely: "segment 6 may 10 mm" is not a date.
    rf"|(?:-|[ ](?!(?i:may)))?{_MONTH}[- ]?'?[0-9]{{2}}(?![0-9]|[ -]?(?:mm|cm|%)))"
)
_YEAR_FIRST = re.compile(rf"[12](?<![\w./-][12])(?:9|0)[0-9]{{2}}[ -]{_MONTH}[ -][0-9]{{1,2}}(?![0-9])")
# The day and month before a year.
_YEAR_LAST = re.compile(r"[12](?<!\w[12])(?:(?<=1)9|(?<=2)0)[0-9]{2}(?![0-9])")
_MONTH_AND_DAY = re.compile(rf"\b{_MONTH}[ -]{{0,2}}[0-9]{{1,2}}(?:st|nd|rd|th)?[ ,.-]{{1,3}}$")
_UNITS_AFTER = re.compile(r"[ -]?(?:mm|cm|ml|months?|weeks?|days?|years?|hours?|hrs?|h\b|ribs?|degrees?|%)")
_CHARACTERS_BEFORE = 24


def in_figures(text: str) -> bool:
    """Return whether the text has a date in digits, with dots, slashes or hyphens."""
    return any(_is_date(match[0], match[1].strip(), text[match.end() :][:10]) for match in _IN_FIGURES.finditer(text))


def _is_date(figures: str, separator: str, after: str) -> bool:
    """Return whether three numbers are a day, a month and a year, in any order."""
    parts = [part.strip() for part in figures.split(separator)]
    first, second, third = (int(part) for part in parts)
    if len(parts[0]) == 4:
        return 1900 <= first < 2100 and _is_day_and_month(second, third)
    if len(parts[0]) > 2 or not _is_day_and_month(first, second):
        return False
    if len(parts[2]) == 4:
        return 1900 <= third < 2100
    # "ribs 9/10/11", "at 3-6-12 months" and section 1.2.10 are not dates.
    counted = second == first + 1 and third == second + 1
    section = separator == "." and (len(parts[0]) < 2 or len(parts[1]) < 2)
    return len(parts[2]) == 2 and not counted and not section and not _UNITS_AFTER.match(after)


def _is_day_and_month(one: int, other: int) -> bool:
    return min(one, other) >= 1 and min(one, other) <= 12 and max(one, other) <= 31


def in_one_piece(text: str) -> bool:
    """Return whether the text has a date in DICOM format, such as 20190304."""
    return any(is_date_in_one_piece(match[0]) for match in _IN_ONE_PIECE.finditer(text))


def is_date_in_one_piece(digits: str) -> bool:
    """Return whether digits are a year, month and day."""
    if len(digits) != 8 or digits[:2] not in {"19", "20"}:
        return False
    return 1 <= int(digits[4:6]) <= 12 and 1 <= int(digits[6:]) <= 31


def with_month(text: str) -> bool:
    """Return whether the text has a date with the month's name."""
    if _DAY_FIRST.search(text) or _YEAR_FIRST.search(text):
        return True
    years = _YEAR_LAST.finditer(text)
    return any(_MONTH_AND_DAY.search(text[max(0, year.start() - _CHARACTERS_BEFORE) : year.start()]) for year in years)
