"""All flags of one row, in the order of the legend."""

from __future__ import annotations

from gxr_batch.text_checks.flags.contradictions import finding_flags
from gxr_batch.text_checks.flags.echo import echoes
from gxr_batch.text_checks.flags.evidence import Evidence, Reading
from gxr_batch.text_checks.flags.invented_comparison import invents_comparison
from gxr_batch.text_checks.flags.legend import FLAGS
from gxr_batch.text_checks.flags.markers import input_has_control_tokens, leaks_markers
from gxr_batch.text_checks.flags.number_claims import invents_number
from gxr_batch.text_checks.flags.text_quality import is_cut, is_empty, is_foreign, repeats
from gxr_batch.text_checks.flags.voice import claims_to_see, refuses
from gxr_batch.text_checks.identifiers import identifiers_in

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


def flags_of(evidence: Evidence) -> list[str]:
    """Return the names of the flags that a generated text deserves, in the order of FLAGS.

    A flag that compares with a field which the row's template does not have is not computed.
    """
    reading = Reading(evidence)
    found = {name for name, rule in _RULES.items() if rule(reading)}
    found |= finding_flags(reading)
    screened = identifiers_in(reading.text) if evidence.identifiers is None else evidence.identifiers
    if screened:
        found.add("possible_identifier")
    return [name for name in FLAGS if name in found] if found else []
