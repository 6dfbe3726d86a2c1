"""Who speaks: a model that declines, or one that claims to have looked at an image it was never given."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from gxr_batch.text_checks.flags.evidence import Reading
from gxr_batch.text_checks.flags.sentences import word_set

_ABLE = (
    r"(?:\w+ ){0,2}(?:provid|offer|giv|interpret|analy[sz]|assist|help|diagnos|view|see|access|process|compl|fulfil|"
    r"answer|generat|creat|read|perform|examin|review|mak|discuss)"
)
_REFUSALS = re.compile(
    r"\b(?:as an ai\b|as a (?:large )?language model|i(?:'m| am) (?:just |only )?an? (?:ai|language model|artificial)|"
    rf"(?:i|we) (?:can't|cannot|can not|won't|will not|am unable to|am not able to) {_ABLE}|"
    rf"i'm (?:unable|not able) to {_ABLE}|"
    rf"i (?:won't|will not) be able to {_ABLE}|"
    r"i (?:must|have to|need to) (?:decline|refuse)|i decline\b|"
    r"i (?:do not|don't) have (?:access|the (?:ability|capability|capacity|expertise|means)|any (?:ability|access))|"
    r"i(?:'m| am) not (?:qualified|authori[sz]ed|allowed|permitted|a (?:doctor|physician|radiologist|medical))|"
    rf"(?:not possible|impossible) for me to {_ABLE}|"
    r"(?:sorry|apologi[sz]e|unfortunately) (?:, )?(?:but )?(?:, )?(?:i |we )?(?:can't|cannot|can not))"
)
_SPEAKERS = frozenset({"i", "i'm", "we", "ai", "language", "sorry", "apologize", "apologise", "me"})

_IMAGE = r"(?:image|picture|photo|photograph|figure|scan|x ray|xray|radiograph|film|radiographic image)s?"
_KIND = r"(?:(?:chest|medical|x ray|xray|radiographic|frontal|same) )*"
_SEEING = re.compile(
    rf"\b(?:(?:provided|attached|uploaded|submitted|shared|enclosed|supplied|accompanying) {_KIND}{_IMAGE}\b"
    r"(?! (?:findings?|descriptions?|reports?|results?|information))|"
    rf"{_IMAGE} (?:that |which )?you (?:have |'ve )?(?:provided|shared|uploaded|attached|sent|submitted|posted|gave)|"
    r"(?:image|picture|photo|figure)s? (?:is |are |was )?(?:shown |displayed |attached |provided |uploaded )?"
    r"(?:above|below|here|provided|attached|uploaded)\b|"
    rf"(?:above|following) {_KIND}(?:image|picture|photo|figure)\b|"
    rf"i (?:can |could |also |clearly )*(?:see|observe|notice)\b[^.;!?\n]{{0,80}}\b{_IMAGE}\b|"
    r"(?:looking at|reviewing|examining|inspecting|review of|inspection of|examination of|"
    r"having (?:reviewed|examined|seen)|based on) (?:the |this |your |these )?"
    rf"{_KIND}(?:image|picture|photo|figure)s?\b|"
    rf"i (?:have |'ve )?(?:reviewed|examined|looked at|analy[sz]ed|inspected|seen) (?:\w+ ){{0,3}}{_IMAGE}\b|"
    r"i've (?:reviewed|examined|looked at|analy[sz]ed|inspected|seen)\b|"
    r"thank(?:s| you) for (?:sharing|providing|sending|uploading|submitting)|"
    r"as (?:you can see|can be seen|seen|shown) (?:here )?(?:in|on) (?:the |this )?(?:image|picture|photo|figure)\b)"
)
_SEEN_THINGS = word_set(
    "i image images picture pictures photo photos photograph figure figures i've thank thanks provided attached "
    "uploaded submitted shared enclosed supplied accompanying"
)
_FIGURE = re.compile(r"\bfig(?:ure)?s?\.?\s?\d", re.IGNORECASE)
_FIGURES = frozenset({"fig", "figs", "figure", "figures"})
_TELLING = frozenset({"when", "before", "students", "should", "always", "readers", "cannot", "if"})


def refuses(reading: Reading) -> bool:
    """Say whether a text declines the task or speaks as an AI."""
    return not _SPEAKERS.isdisjoint(reading.vocabulary) and _any(_REFUSALS, reading.sentences, _SPEAKERS)


def claims_to_see(reading: Reading) -> bool:
    """Say whether a text claims to have looked at an image, other than in advice on how to look."""
    if not _FIGURES.isdisjoint(reading.vocabulary) and _FIGURE.search(reading.new):
        return True
    if _SEEN_THINGS.isdisjoint(reading.vocabulary):
        return False
    return _any(_SEEING, (words for words in reading.sentences if _TELLING.isdisjoint(words)), _SEEN_THINGS)


def _any(pattern: re.Pattern[str], sentences: Iterable[Sequence[str]], cues: frozenset[str]) -> bool:
    return any(not cues.isdisjoint(words) and pattern.search(" ".join(words)) for words in sentences)
