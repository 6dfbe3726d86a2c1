"""Every flag that an export can show, each with a sentence for the reader."""

from __future__ import annotations

from gxr_batch.checks.flags import FLAGS
from gxr_batch.checks.identifiers import RULES
from gxr_batch.ledger.reviews import DISAGREEMENT, STALE

SHORTENED = "shortened_for_excel"

LEGEND = {
    **{flag: text for flag, text in FLAGS.items() if flag != "possible_identifier"},
    "identifier_in_input:RULE": f"Identifier screening hits a cell or the prompt. Rules: {', '.join(RULES)}.",
    "identifier_in_output:RULE": FLAGS["possible_identifier"],
    STALE: "The text was generated anew after a reviewer had judged an earlier one.",
    DISAGREEMENT: "Reviewers differ in their verdict or in the corrected text; the newest review is shown.",
    SHORTENED: "A cell is too long for Excel and was cut with a mark; results.parquet has all of it.",
}
