"""Marks of a chat format: in a text they have leaked out of the model, in a cell somebody may want to steer it."""

from __future__ import annotations

import re

from gxr_batch.text_checks.flags.evidence import MAX_CHARS, Reading

_CONTROL = re.compile(
    r"<(?:start_of_turn|end_of_turn|start_of_image|end_of_image|image_soft_token|bos|eos|pad|unk|mask|s|/s|unused\d+"
    r"|\|[a-z_0-9]{1,30}\|?)>|\[/?INST\]|<</?SYS>>",
    re.IGNORECASE,
)
# A role alone on its line is what remains of a turn whose marks were taken out; with a colon it is a chat protocol.
_ROLE_LINE = re.compile(
    r"^[ \t]*(?:(?:user|model|assistant)[ \t]*:?[ \t]*$|(?:user|assistant|human)[ \t]*:)", re.IGNORECASE | re.MULTILINE
)
_ROLES = frozenset({"user", "model", "assistant", "human"})


def leaks_markers(reading: Reading) -> bool:
    """Say whether a text holds control tokens or lines that only name a role."""
    text = reading.text
    if ("<" in text or "[" in text) and _CONTROL.search(text):
        return True
    return not _ROLES.isdisjoint(reading.vocabulary) and _ROLE_LINE.search(reading.new) is not None


def input_has_control_tokens(reading: Reading) -> bool:
    """Say whether a cell of the row holds a control token of a language model."""
    for value in reading.evidence.values.values():
        cell = value if isinstance(value, str) else "" if value is None else str(value)
        if ("<" in cell or "[" in cell) and _CONTROL.search(cell[:MAX_CHARS]):
            return True
    return False
