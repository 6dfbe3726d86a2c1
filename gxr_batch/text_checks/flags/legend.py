"""The names of the flags in the order in which a row lists them, each with a sentence for the radiologist."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

NOT_COMPUTED = "flags_not_computed"

FLAGS: Mapping[str, str] = MappingProxyType(
    {
        "findings_truncated": "The prompt was too long, so the end of the row's longest cell was cut off before the "
        "model read it.",
        "control_tokens_in_input": "A cell of the table holds a control mark of a language model, such as "
        "<start_of_turn>; it reached the model as plain text.",
        "empty_text": "The text has no words, only punctuation or markup.",
        "cut_mid_sentence": "The text reached its token limit in the middle of a sentence.",
        "repeats_itself": "The text says the same words over and over.",
        "echoes_prompt": "The text repeats the instruction, makes up a new one, or is mostly a copy of the findings.",
        "leaked_turn_markers": "The text holds marks of a chat, such as <end_of_turn> or a line that only says model.",
        "refusal": "The text declines the task or speaks as an AI.",
        "other_language": "The text, or a part of it, is not in English.",
        "claims_to_see_image": "The text claims to have looked at an image, or points to a figure; the model was "
        "given words only.",
        "invented_comparison": "The text compares with an earlier film, but the row mentions none.",
        "side_flipped": "The text places a finding or a device on a side where the row does not have it.",
        "number_not_in_input": "The text gives a measurement, an age or a duration of the case that the row does not "
        "have.",
        "asserts_negated_finding": "The text says that a finding is present which the row says is absent.",
        "negates_given_finding": "The text says that a finding is absent which the row says is present.",
        # A run says which rule hit instead: identifier_in_output:RULE.
        "possible_identifier": "The text holds something that looks like a name, a date or a number of a real person.",
        NOT_COMPUTED: "The rules failed on this row, a fault of the program; its flags are not known.",
    }
)
