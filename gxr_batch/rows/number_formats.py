"""Numbers and dates of a workbook as Excel shows them: 0007 with the format 0000, 45% with 0%, dates in ISO form.

A format that this module does not know, such as fractions, shows the number as the format General does.
"""

from __future__ import annotations

import datetime as dt
import re
from decimal import ROUND_HALF_UP, Decimal
from functools import lru_cache
from typing import NamedTuple

_MOST_DIGITS = 15  # Excel keeps no more
_MOST_IN_A_FORMAT = 255  # Excel refuses longer ones
_LARGEST_PLAIN = 10**_MOST_DIGITS
# Quoted text, an escaped character, a blank as wide as a character, a fill character, or something in brackets.
_LITERAL = re.compile(r'"([^"]*)"|\\(.)|_.|\*.|\[([^\]]*)\]')
_DIGITS = re.compile(r"[0#?,]*[0#?](?:[0#?,]*)(?:\.[0#?]*)?,*|\.[0#?]+")
_EXPONENT = re.compile(r"[Ee][+-]([0#?]+)")
_PLACE = "\0"


class _Section(NamedTuple):
    """One part of a format: texts around the number, and how its digits are shown. None: as General does."""

    before: str
    after: str
    whole: int
    decimals: int
    optional: int
    grouped: bool
    thousands: int
    percent: int
    exponent: int


def shown_number(value: float | int, number_format: str) -> str:
    """Return a number as its cell shows it."""
    sections = _sections(number_format)
    if len(sections) > 1 and value < 0:
        section, magnitude = sections[1], abs(value)
        sign = ""
    elif len(sections) > 2 and value == 0:
        section, magnitude, sign = sections[2], value, ""
    else:
        section, magnitude, sign = sections[0], abs(value), "-" if value < 0 else ""
    if section is None:
        return general(value)
    digits = _digits(magnitude, section)
    if sign and not any(digit in "123456789" for digit in digits):
        sign = ""
    return f"{sign}{section.before}{digits}{section.after}".strip()


def general(value: float | int) -> str:
    """Return a number as the format General shows it in a wide column: at most 15 digits."""
    if isinstance(value, int) and abs(value) < _LARGEST_PLAIN:
        return str(value)
    text = f"{value:.{_MOST_DIGITS}g}"
    if "e" not in text:
        return text
    exact = Decimal(text)
    # Excel changes to an exponent from 21 digits on, and below ten decimals.
    return f"{exact:f}" if Decimal("1e-10") < abs(exact) < _LARGEST_PLAIN * 10**6 else text.replace("e", "E")


def shown_time(value: dt.datetime | dt.date | dt.time | dt.timedelta) -> str:
    """Return a date or time in ISO form; midnight is a date alone, as programs write dates with a time of zero."""
    if isinstance(value, dt.datetime):
        value = _rounded(value)
        return value.isoformat(sep=" ") if value.time() != dt.time() else value.date().isoformat()
    if isinstance(value, dt.time):
        return _rounded(dt.datetime.combine(dt.date(2000, 1, 1), value)).time().isoformat()
    return value.isoformat() if isinstance(value, dt.date) else str(value)


def _rounded(value: dt.datetime) -> dt.datetime:
    """Return the time to the millisecond: a workbook's days are floats."""
    try:
        near = value + dt.timedelta(microseconds=500)
    except OverflowError:
        return value
    return near.replace(microsecond=near.microsecond // 1000 * 1000)


@lru_cache(maxsize=1024)
def _sections(number_format: str) -> tuple[_Section | None, ...]:
    if len(number_format) > _MOST_IN_A_FORMAT:
        return (None,)
    parts: list[str] = [""]
    for piece in re.findall(r'"[^"]*"|\\.|_.|\*.|\[[^\]]*\]|;|[^"\\_*\[;]+|.', number_format):
        if piece == ";":
            parts.append("")
        else:
            parts[-1] += piece
    return tuple(map(_section, parts[:3]))


def _section(text: str) -> _Section | None:
    if re.search(r"\[[<>=]", text):  # a condition
        return None
    literals: list[str] = []

    def kept(found: re.Match[str]) -> str:
        currency = re.match(r"\$([^-]*)", found[3] or "")
        literals.append(
            found[1] or found[2] or (currency[1] if currency else "") or (" " if found[0][0] == "_" else "")
        )
        return _PLACE

    bare = _LITERAL.sub(kept, text)
    digits = _DIGITS.search(bare)
    if not digits or "General" in bare or "/" in bare or "@" in bare:
        return None
    exponent = _EXPONENT.match(bare, digits.end())
    before, after = bare[: digits.start()], bare[(exponent or digits).end() :]
    if _DIGITS.search(before) or _DIGITS.search(after) or re.search(r"[A-Za-z]", before + after):
        return None
    texts = iter(literals)
    before, after = (re.sub(_PLACE, lambda _: next(texts), part) for part in (before, after))
    whole, _, decimals = digits[0].partition(".")
    tail = len(digits[0]) - len(digits[0].rstrip(","))
    return _Section(
        before=before,
        after=after,
        whole=whole.count("0"),
        decimals=decimals.count("0"),
        optional=sum(map(decimals.count, "#?")),
        grouped="," in whole.rstrip(","),
        thousands=tail,
        percent=bare.count("%"),
        exponent=len(exponent[1]) if exponent else 0,
    )


def _digits(value: float | int, section: _Section) -> str:
    number = Decimal(f"{value:.{_MOST_DIGITS}g}") * 100**section.percent / 1000**section.thousands
    if section.exponent:
        return _scientific(number, section)
    most = section.decimals + section.optional
    text = f"{number.quantize(Decimal(1).scaleb(-most), ROUND_HALF_UP) if _fits(number, most) else number:f}"
    whole, _, decimals = text.partition(".")
    while len(decimals) > section.decimals and decimals.endswith("0"):
        decimals = decimals[:-1]
    whole = whole.lstrip("0").rjust(section.whole, "0")
    if section.grouped:
        whole = re.sub(r"(?<=\d)(?=(\d{3})+$)", ",", whole)
    return f"{whole}.{decimals}" if decimals else whole or "0"


def _fits(number: Decimal, decimals: int) -> bool:
    """Return whether rounding stays within the 28 digits of Python's decimals."""
    return number.adjusted() + decimals < 27


def _scientific(number: Decimal, section: _Section) -> str:
    power = number.adjusted() if number else 0
    mantissa = number.scaleb(-power).quantize(Decimal(1).scaleb(-section.decimals), ROUND_HALF_UP)
    if mantissa >= 10:
        mantissa, power = (mantissa / 10).quantize(Decimal(1).scaleb(-section.decimals), ROUND_HALF_UP), power + 1
    return f"{mantissa:f}E{'-' if power < 0 else '+'}{abs(power):0{section.exponent}d}"
