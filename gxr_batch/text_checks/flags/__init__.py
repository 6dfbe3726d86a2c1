"""Flags for the reviewer: hints from fixed rules about a generated text and its row.

A flag marks where to look more closely. It is never a score, and its absence proves nothing. All functions are pure.
"""

from gxr_batch.text_checks.flags.evidence import Evidence
from gxr_batch.text_checks.flags.registry import CUT_SECTION, FLAGS, NOT_COMPUTED, Checked, checked, flags_of

__all__ = ["CUT_SECTION", "FLAGS", "NOT_COMPUTED", "Checked", "Evidence", "checked", "flags_of"]
