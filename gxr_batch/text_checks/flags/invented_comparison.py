"""Detects comparisons with an earlier film of the patient for which the row has no basis.

A row has one if its cells compare the same thing: "stable heart size" is none for lungs that are "unchanged". The name
or the date of an earlier film alone says nothing of what it shows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gxr_batch.text_checks.flags.evidence import Reading
from gxr_batch.text_checks.flags.lexicon import TABLES, WORDS
from gxr_batch.text_checks.flags.mentions import GENERAL
from gxr_batch.text_checks.flags.sentences import sentences_of, words_of

_STUDY = (
    r"(?:films?|stud(?:y|ies)|radiographs?|x ?rays?|exams?|examinations?|cts?|scans?|imaging|images?|chest|reports?)"
)
_BEFORE = r"(?:prior|previous|earlier|last|preceding|former|baseline|preoperative|first|initial|old|older|most recent)"
_CHANGED = (
    r"(?:has|have) (?:\w+ )?(?:increased|decreased|improved|worsened|progressed|grown(?! into)|enlarged|"
    r"regressed|diminished)\b"
)
_HAS_CHANGED = re.compile(rf"\b{_CHANGED}")
_COMPARES = re.compile(
    rf"\b(?:{_BEFORE} (?:available )?(?:chest |frontal |portable )?{_STUDY}\b|"
    rf"since (?:the |an? |his |her )?(?:{_BEFORE}|film|tube)\b|since (?:yesterday|admission)\b|"
    rf"{_STUDY} (?:of|from) (?:the )?(?:last|previous|prior|earlier|yesterday|{_BEFORE})\b|"
    r"interval (?:\w+ )?(?:change|increase|decrease|improvement|worsening|development|resolution|progression|"
    r"enlargement|growth|removal|placement|clearing|appearance)\b|in the (?:short |brief )?interval\b|"
    r"unchanged\b|(?:remains?|is|are|overall|appears?) (?:\w+ )?stable\b|stable (?:in|since|appearance|compared)\b|"
    r"again (?:is |are )?(?:seen|noted|demonstrated|visible|shown|identified|observed)\b|"
    r"previously (?:\w+ed|seen|known)\b|not been seen before\b|(?:larger|smaller|higher|lower|wider) than before\b|"
    rf"without any change\b|{_CHANGED}|"
    r"(?:compared (?:to|with)|in comparison (?:to|with)|similar to) (?:the )?(?:prior|previous|earlier|last|"
    rf"yesterday|{_STUDY} (?:of|from|taken))\b|no longer (?:seen|visible|present|evident|identified)\b)|"
    r"(?:^|: )stable \w+|: new on\b"
)
_CUES = WORDS["comparison.cues"]
_WISHED = WORDS["comparison.wished"]
_KNOWN = WORDS["comparison.known"]
_NONE = re.compile(rf"\b(?:no|without|lacking|not|absence of) (?:an? |any |the )?(?:{_BEFORE}|comparison)\b")
_SUBJECTS = {name: frozenset(words.split()) for name, words in TABLES["comparison"]["subjects"].items()}
# Of a comparison cell: it tells what the earlier film shows, and so of all that is compared with it.
_TELLS = WORDS["comparison.tells"]
_ALL = "all"
_NEAR = 8  # words from a comparison in which its subject is looked for, before it first


def invents_comparison(reading: Reading) -> bool:
    """Return whether a text compares with an earlier film what the row does not compare.

    Only for templates with a field `comparison`: other prompts ask for no comparison.
    """
    if "comparison" not in reading.evidence.values or _CUES.isdisjoint(reading.vocabulary):
        return False
    claims = [
        claim for words in reading.case if not _CUES.isdisjoint(words) and (claim := _compared(words)) is not None
    ]
    if not claims or not _TELLS.isdisjoint(words_of(reading.cell("comparison"))):
        return False
    basis = _basis(reading)
    return not all(_is_known(claim, basis) for claim in claims)


def _basis(reading: Reading) -> set[str]:
    """Return the subjects that the row compares."""
    found: set[str] = set()
    for sentence in sentences_of(words_of(f"{reading.findings}\n{reading.story}")):
        if not _KNOWN.isdisjoint(sentence) or _HAS_CHANGED.search(" ".join(sentence)):
            found |= _subjects(sentence) or {_ALL}
    return found


def _is_known(claim: set[str], basis: set[str]) -> bool:
    return bool(basis) and (not claim - {_ALL} or _ALL in basis or not claim.isdisjoint(basis))


def _subjects(words: Sequence[str]) -> set[str]:
    return {name for name, own in _SUBJECTS.items() if not own.isdisjoint(words)}


def _compared(words: Sequence[str]) -> set[str] | None:
    """Return the subjects of a comparison, None if a sentence makes none."""
    if not GENERAL.isdisjoint(words):
        return None
    sentence = " ".join(words)
    match = _COMPARES.search(sentence)
    if match is None or not _WISHED.isdisjoint(words) or _NONE.search(sentence):
        return None
    before, after = sentence[: match.start()].split()[-_NEAR:], sentence[match.start() :].split()[:_NEAR]
    return _subjects(before) - {_ALL} or _subjects(after)
