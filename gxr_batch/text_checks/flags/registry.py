"""All flags: their names in the order in which a row lists them, their descriptions, and their rules."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from gxr_batch.text_checks.flags.contradictions import finding_flags, kept_and_lost
from gxr_batch.text_checks.flags.evidence import Evidence, Reading
from gxr_batch.text_checks.flags.invented_comparison import invents_comparison
from gxr_batch.text_checks.flags.number_claims import invents_number
from gxr_batch.text_checks.flags.text_quality import (
    claims_to_see,
    echoes,
    input_has_control_tokens,
    is_cut,
    is_empty,
    is_foreign,
    leaks_markers,
    refuses,
    repeats,
    stops_mid_sentence,
)
from gxr_batch.text_checks.identifiers import identifiers_in

NOT_COMPUTED = "flags_not_computed"
# Followed by the section of a form: the part of its column after gxr_section_.
CUT_SECTION = "cut_mid_sentence:"

FLAGS: Mapping[str, str] = MappingProxyType(
    {
        "findings_truncated": "The prompt was too long, so the end of the row's longest cell was cut before the "
        "model read it.",
        "control_tokens_in_input": "A cell of the table contains a control token of a language model, such as "
        "<start_of_turn>; it reached the model as plain text.",
        "empty_text": "The text has no words, only punctuation or markup.",
        "cut_mid_sentence": "The text reached its token limit in the middle of a sentence.",
        "repeats_itself": "The text repeats the same words over and over.",
        "echoes_prompt": "The text repeats the instruction, makes up a new one, or is mostly a copy of the findings.",
        "leaked_turn_markers": "The text has chat markers, such as <end_of_turn> or a line with only the word model.",
        "refusal": "The text declines the task or speaks as an AI.",
        "other_language": "The text, or a part of it, is not in English.",
        "claims_to_see_image": "The text claims to have looked at an image, or points to a figure; the model was "
        "given only text.",
        "invented_comparison": "The text compares something with an earlier film that the row does not compare.",
        "side_flipped": "The text places a finding or a device on a side where the row does not have it.",
        "number_not_in_input": "The text gives a measurement, an age or a duration of the case that the row does not "
        "have.",
        "asserts_negated_finding": "The text says that a finding is present, but the row says it is absent.",
        "negates_given_finding": "The text says that a finding is absent, but the row says it is present.",
        "finding_invented": "The text states a finding or a device that the row neither has nor denies.",
        "finding_lost": "The text does not name a finding or a device that the row has.",
        # A run names the rule instead: identifier_in_output:RULE.
        "possible_identifier": "The text contains something that looks like a real person's name, date or number.",
        NOT_COMPUTED: "The rules failed on this row because of a bug; its flags are unknown.",
    }
)


_RULES = {
    "control_tokens_in_input": input_has_control_tokens,
    "empty_text": is_empty,
    "cut_mid_sentence": is_cut,
    "repeats_itself": repeats,
    "echoes_prompt": echoes,
    "leaked_turn_markers": leaks_markers,
    "refusal": refuses,
    "other_language": is_foreign,
    "claims_to_see_image": claims_to_see,
    "invented_comparison": invents_comparison,
    "number_not_in_input": invents_number,
}


# Texts that are no teaching case at all, of which nobody expects findings.
_NO_CASE = frozenset({"empty_text", "refusal", "other_language", "echoes_prompt"})


class Checked(NamedTuple):
    """The names of the flags that apply to a generated text, in the order of FLAGS, and the findings that it keeps.

    `kept` and `lost` are the findings and devices that the row has, in words: those that the text names, and those that
    it does not name or denies. Both are None if the row has no findings cell, or if the text is no teaching case.
    """

    flags: list[str]
    kept: list[str] | None = None
    lost: list[str] | None = None


def flags_of(evidence: Evidence) -> list[str]:
    """Return the names of the flags that apply to a generated text, in the order of FLAGS.

    Flags that compare with a field missing from the row's template are not computed.
    """
    return checked(evidence).flags


def checked(evidence: Evidence) -> Checked:
    """Return the flags of a generated text, as `flags_of` does, and the findings that it keeps and loses."""
    reading = Reading(evidence)
    found = {name for name, rule in _RULES.items() if rule(reading)}
    kept = lost = None
    if reading.findings:
        given = kept_and_lost(reading)
        found |= finding_flags(reading, *given)
        kept, lost = ([name.replace("_", " ") for name in names] for names in given)
    if not _NO_CASE.isdisjoint(found):
        found.discard("finding_lost")
        kept = lost = None
    screened = identifiers_in(reading.text) if evidence.identifiers is None else evidence.identifiers
    if screened:
        found.add("possible_identifier")
    cut = [f"{CUT_SECTION}{name}" for name, text in evidence.cut.items() if stops_mid_sentence(text)]
    return Checked([*(name for name in FLAGS if name in found), *cut] if found or cut else [], kept, lost)
