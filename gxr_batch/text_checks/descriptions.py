"""Every flag that `gxr_flags` can hold, with a one-sentence description for workbooks and HTML reports."""

from __future__ import annotations

from gxr_batch.forms import Form
from gxr_batch.forms.form import PREFIX
from gxr_batch.records import REVIEWERS_DISAGREE, STALE_REVIEW
from gxr_batch.text_checks.flags import CUT_SECTION, FLAGS
from gxr_batch.text_checks.identifiers import RULES
from gxr_batch.text_checks.screening import IN_INPUT, IN_OUTPUT

SHORTENED = "shortened_for_excel"

LEGEND = {
    **{flag: text for flag, text in FLAGS.items() if flag != "possible_identifier"},
    f"{CUT_SECTION}SECTION": "The section of a form reached its token limit in the middle of a sentence.",
    f"{IN_INPUT}:RULE": f"A cell or the prompt seems to contain an identifier. Rules: {', '.join(RULES)}.",
    f"{IN_OUTPUT}:RULE": FLAGS["possible_identifier"],
    STALE_REVIEW: "The text was generated again after a reviewer judged an earlier one.",
    REVIEWERS_DISAGREE: "Reviewers disagree in their verdict or corrected text; the newest review is shown.",
    SHORTENED: "A cell is too long for Excel and was cut at a mark; results.parquet has the whole text.",
}
# The same, with every screening rule listed separately.
EVERY_FLAG = LEGEND | {
    f"{where}:{rule}": sentence for where in (IN_INPUT, IN_OUTPUT) for rule, sentence in RULES.items()
}


def described(form: Form | None) -> dict[str, str]:
    """Return every flag that rows of a run with this form can have, with its description."""
    sections = {
        f"{CUT_SECTION}{part.column.removeprefix(PREFIX)}": (
            f'The section "{part.heading}" reached its token limit in the middle of a sentence.'
        )
        for part in (form.parts if form else ())
    }
    return EVERY_FLAG | sections
