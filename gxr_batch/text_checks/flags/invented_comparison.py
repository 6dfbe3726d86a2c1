"""Detects comparisons with an earlier film of the patient if the row mentions none."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gxr_batch.text_checks.flags.evidence import Reading
from gxr_batch.text_checks.flags.lexicon import WORDS
from gxr_batch.text_checks.flags.mentions import GENERAL
from gxr_batch.text_checks.flags.sentences import words_of

_STUDY = (
    r"(?:films?|stud(?:y|ies)|radiographs?|x ?rays?|exams?|examinations?|cts?|scans?|imaging|images?|chest|reports?)"
)
_BEFORE = r"(?:prior|previous|earlier|last|preceding|former|baseline|preoperative|first|initial|old|older|most recent)"
_CHANGED = (
    r"(?:has|have) (?:\w+ )?(?:increased|decreased|improved|worsened|progressed|grown|enlarged|regressed|diminished)\b"
)
_HAS_CHANGED = re.compile(rf"\b{_CHANGED}")
_COMPARES = re.compile(
    rf"\b(?:{_BEFORE} (?:available )?(?:chest |frontal |portable )?{_STUDY}\b|"
    rf"since (?:the |an? |his |her )?{_BEFORE}\b|since (?:yesterday|admission)\b|"
    rf"{_STUDY} (?:of|from) (?:the )?(?:last|previous|prior|earlier|yesterday|{_BEFORE})\b|"
    r"interval (?:\w+ )?(?:change|increase|decrease|improvement|worsening|development|resolution|progression|"
    r"enlargement|growth|removal|placement|clearing|appearance)\b|in the (?:short |brief )?interval\b|"
    r"unchanged\b|(?:remains?|is|are|overall|appears?) (?:\w+ )?stable\b|stable (?:in|since|appearance|compared)\b|"
    r"again (?:is |are )?(?:seen|noted|demonstrated|visible|shown|identified|observed)\b|"
    r"previously (?:seen|noted|described|identified|reported|demonstrated|visible|known)\b|"
    rf"{_CHANGED}|"
    r"(?:compared (?:to|with)|in comparison (?:to|with)) (?:the )?(?:prior|previous|earlier|last|yesterday|"
    rf"{_STUDY} (?:of|from|taken))\b|no longer (?:seen|visible|present|evident|identified)\b)|^stable \w+"
)
_CUES = WORDS["comparison.cues"]
_WISHED = WORDS["comparison.wished"]
_KNOWN = WORDS["comparison.known"]
_NONE = re.compile(rf"\b(?:no|without|lacking|not) (?:an? |any |the )?(?:{_BEFORE}|comparison)\b")


def invents_comparison(reading: Reading) -> bool:
    """Return whether a text compares with an earlier film without any basis in the row.

    Only for templates with a field `comparison`: other prompts ask for no comparison.
    """
    asked = "comparison" in reading.evidence.values
    if not asked or reading.cell("comparison") or _CUES.isdisjoint(reading.vocabulary):
        return False
    if not any(_is_comparison(words) for words in reading.case if not _CUES.isdisjoint(words)):
        return False
    known = words_of(f"{reading.findings}\n{reading.story}")
    return _KNOWN.isdisjoint(known) and _HAS_CHANGED.search(" ".join(known)) is None


def _is_comparison(words: Sequence[str]) -> bool:
    if not GENERAL.isdisjoint(words):
        return False
    sentence = " ".join(words)
    if _COMPARES.search(sentence) is None:
        return False
    return _WISHED.isdisjoint(words) and _NONE.search(sentence) is None
