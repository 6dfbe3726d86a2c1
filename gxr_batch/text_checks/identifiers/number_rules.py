"""Numbers that identify a person: record, telephone and social security numbers, high ages; e-mail addresses.

Patterns begin with the digit itself and look back from there, so that a search jumps from digit to digit instead of
trying every word of the text.
"""

from __future__ import annotations

import re
import string

from gxr_batch.text_checks.identifiers.date_rules import is_date_in_one_piece

# Four digits, with at most three signs or capitals between them, and the words that may introduce such a number.
_FOUR_DIGITS = re.compile("[0-9](?:[ ()./A-Z-]{0,3}[0-9]){3}")
# A cheap check first: remove what may be between them, then split the text at everything except digits.
_BETWEEN_DIGITS = b" ()./-" + string.ascii_uppercase.encode()
_DIGITS = bytes(code if chr(code) in string.digits else ord(" ") for code in range(256))
_CHARACTERS_BEFORE = 60
_LINK = r"(?:\W{0,3}\b(?:numbers?|num|no|nr|ids?|identifier|is|was|at|on|ending|in)\b){0,3}\W{0,4}"
_RECORD = re.compile(
    rf"""\b(?:m\.?r\.?n\b|med(?:ical)?[ ]rec(?:ord)?\b|accession\b|acc(?=[ .]{{0,2}}(?:\#|n[ou]))
    |record(?=[ ](?:no|num|id|\#))|id(?=[ ]?[:\#])
    |(?:patient|pt|hospital|hosp|nhs|chart|account|acct|encounter|member|policy|insurance|beneficiary|exam|study|case
        |order|requisition|unit)(?:'s)?\.?(?=[ ]?(?:\#|(?:id|no|num)))
    |specimen\b)
    {_LINK}(?:[A-Z]{{1,5}}[-/ ]?)?$""",
    re.IGNORECASE | re.VERBOSE,
)
_PHONE = re.compile(
    rf"\b(?:(?:tele)?phone|tel|mobile(?=[ ]?(?:phone|no|num|:))|cell(?=[ ]?(?:phone|no|num|:))|pager|beeper|fax"
    rf"|ext(?:ension)?|call[ -]?back|text[ -]page)\b(?:[ ]phone)?{_LINK}$|\b(?:at|call|dial)[ ]x$",
    re.IGNORECASE,
)
_SSN = re.compile(rf"\b(?:ssn|ss(?=\#)|soc(?:ial)?\.?[ ]sec(?:urity)?)\b{_LINK}(?:[X*-]{{2,8}})?$", re.IGNORECASE)

_LONG_NUMBER = re.compile("[0-9]{7,}")
_UID = "1.2.840."  # the start of unique ids of DICOM studies, series and images
_PHONE_IN_GROUPS = re.compile(r"[0-9](?<![\w.,][0-9])[0-9]{2}(?:\)[ ]?|[-. ])[0-9]{3}[-. ][0-9]{4}(?![0-9])")
_PHONE_FROM_ZERO = re.compile(r"0(?<![\w.,/]0)[0-9]{2,4}[ -][0-9]{3,4}[ -]?[0-9]{3,4}(?![0-9])")  # 020 7946 0958
_PHONE_ABROAD = re.compile(r"\+[0-9]{1,3}(?:[ .()-]{0,2}[0-9]){7,12}(?![0-9])")
_SSN_IN_GROUPS = re.compile(r"[0-9](?<![\w-][0-9])[0-9]{2}-[0-9]{2}-[0-9]{4}(?![\w-])")
_EMAIL = re.compile(r"@(?<=[\w.+-]@)[\w-]{1,63}(?:\.[\w-]{1,63}){0,5}\.[A-Za-z]{2,24}\b")

_OLD = re.compile(r"[19](?<![\w.,/][19])(?:(?<=9)[0-9]|(?<=1)[0-2][0-9])(?![0-9%]|[.,][0-9])")
_YEARS_AFTER = re.compile(
    r"""[- ]{0,2}(?i:years?[- ]{0,2}old|yrs?\.?[- ]{0,2}old|(?:years?|yrs?)[ ]of[ ]age|y[/.]?[ ]?o\b
        |(?:years?|yrs?|y)[.,;]{0,2}[ ](?:male|female|man|woman|lady|gentleman|m|f)\b|(?:yrs?|y)\.?(?=[ ]?(?:$|[,;)])))
    |[MF](?=[ ](?:with|w/|who|presents|presenting|admitted|s/p|p/w|c/o))""",
    re.VERBOSE,
)
_AGE_BEFORE = re.compile(r"\bage[ds]?(?:[ ]?/[ ]?sex)?\b[ \t]*(?:is|was|of|[:=])?[ \t]*$", re.IGNORECASE)
_NO_YEARS_AFTER = re.compile(
    r"[ -]?(?:mm|cm|days?|weeks?|wks?|months?|mos?|hours?|hrs?|minutes?|percent)\b", re.IGNORECASE
)
_AGE_IN_WORDS = re.compile(
    r"\b(?:ninety(?:[- ]\w{3,5})?|one[- ]hundred(?:[- ]and)?(?:[- ]\w{3,9})?)[- ]years?[- ]old"
    r"|\b(?:nonagenarian|centenarian)|\bin (?:his|her|their) (?:(?:early|mid|late)[- ])?nineties",
    re.IGNORECASE,
)
FIGURES, NUMBER = "0", "0000"  # any digit, four digits close together
OLD_CUES = ("9", "10", "11", "12")  # how such an age in digits begins
AGE_CUES = ("ninety", "hundred", "nineties", "nonagenarian", "nonagenarians", "centenarian", "centenarians")
_NINETIES = re.compile(r"90'?s(?!\w)")
_IN_HIS = re.compile(r"\bin (?:his|her|their) (?:(?:early|mid|late)[- ])?$", re.IGNORECASE)


def cues_in(text: str, raw: bytes) -> set[str]:
    """Return which of FIGURES, NUMBER and OLD_CUES apply to a text; `raw` is its UTF-8."""
    pieces = raw.translate(_DIGITS, _BETWEEN_DIGITS).split()
    if not pieces:
        return set()
    digits = b" ".join(pieces).decode()
    cues = {FIGURES, *(cue for cue in OLD_CUES if cue in digits)}
    if max(map(len, pieces)) >= 4 and _FOUR_DIGITS.search(text):
        cues.add(NUMBER)
    return cues


def record_number(text: str) -> bool:
    """Return whether a number follows a word such as MRN, accession or patient ID, or the text has a DICOM id."""
    return _follows(_RECORD, text) or _UID in text


def _follows(words: re.Pattern[str], text: str) -> bool:
    return any(words.search(_before(text, match)) for match in _FOUR_DIGITS.finditer(text))


def _before(text: str, match: re.Match[str]) -> str:
    return text[max(0, match.start() - _CHARACTERS_BEFORE) : match.start()]


def long_number(text: str) -> bool:
    """Return whether the text has a number of seven or more digits that is not known to be something else."""
    return any(not _is_known(text, match) for match in _LONG_NUMBER.finditer(text))


def _is_known(text: str, match: re.Match[str]) -> bool:
    """Return whether a number continues across a dot or comma, is a date, or follows another rule's word."""
    before, after = _before(text, match), text[match.end() : match.end() + 2]
    part = re.search(r"[0-9][.,]$", before) or re.match(r"[.,][0-9]", after)
    return bool(part or _PHONE.search(before) or _SSN.search(before) or is_date_in_one_piece(match[0]))


def phone_number(text: str) -> bool:
    """Return whether a number is written like a telephone number, or follows a word such as pager or fax."""
    written = _PHONE_IN_GROUPS.search(text) or _PHONE_FROM_ZERO.search(text)
    return written is not None or _follows(_PHONE, text)


def phone_number_abroad(text: str) -> bool:
    """Return whether the text has a number with a country code."""
    return _PHONE_ABROAD.search(text) is not None


def social_security_number(text: str) -> bool:
    """Return whether a number is written like a social security number, or follows these words."""
    return _SSN_IN_GROUPS.search(text) is not None or _follows(_SSN, text)


def e_mail(text: str) -> bool:
    """Return whether the text has an e-mail address."""
    return _EMAIL.search(text) is not None


def age_over_89(text: str) -> bool:
    """Return whether an age of 90 years or more is given in digits."""
    if any(_is_age(text, match) for match in _OLD.finditer(text)):
        return True
    return any(_IN_HIS.search(_before(text, match)) for match in _NINETIES.finditer(text))


def _is_age(text: str, match: re.Match[str]) -> bool:
    if _YEARS_AFTER.match(text, match.end()):
        return True
    return bool(_AGE_BEFORE.search(_before(text, match))) and not _NO_YEARS_AFTER.match(text, match.end())


def age_in_words(text: str) -> bool:
    """Return whether such an age is given in words, or as a decade of life."""
    return _AGE_IN_WORDS.search(text) is not None
