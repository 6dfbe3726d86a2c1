"""Flags for the reviewer: hints of plain rules over a generated text and the row that it was generated from.

A flag says where a closer look pays. It is never a score, and no flag is no proof. Pure functions of their arguments.
"""

from gxr_batch.text_checks.flags.evidence import Evidence
from gxr_batch.text_checks.flags.registry import FLAGS, NOT_COMPUTED, flags_of

__all__ = ["FLAGS", "NOT_COMPUTED", "Evidence", "flags_of"]
