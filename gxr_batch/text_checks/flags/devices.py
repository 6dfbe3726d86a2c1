"""What a sentence says of a device, where that differs from what it would say of a finding.

A device comes and goes by hand: it can be removed, planned or needed, and what is denied may be something about it ("no
kink of the line", "no central line complication"). Where the words leave a doubt, the device is open.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from gxr_batch.text_checks.flags.lexicon import NO, Spot, Status
from gxr_batch.text_checks.flags.sentences import word_set

_REMOVAL = word_set("removal remove removed removes removing withdrawn withdrawal taken pulled")
_TAKEN_OUT = word_set("removed withdrawn taken")
_PAST = word_set("been was were since already")  # "is removed" may be a lesson on how it is done
_AFTER = word_set("after following since")
_REACH = 5  # words between a device and the word that removes it
# A device that is wanted, was there once, is compared with others of its kind, or has left a trace.
_NOT_NOW = word_set(
    "need needs needed require requires required recommend recommended indicated indication advisable advised insert "
    "inserting placing replace replaced had longer shorter than such once track tract site sites ready "
    "treated treatment managed management therapy used post earlier"
)
_PARTS = word_set("tip tips hole holes end ends lead leads loop course position complication malposition")
# What stands between "no" and a device that it denies, and what may follow such a device.
_DENIED_WITH = word_set(
    "a an any the evidence sign signs of or nor and , visible indwelling line lines tube tubes catheter catheters "
    "drain drains pacemaker wires leads devices support left right sided basal apical internal jugular subclavian "
    "central venous chest pleural intercostal is there neither"
)
_CLOSES = word_set(
    ". , ; : ) \n ! is are was were has have seen visible present noted identified described shown mentioned in on or "
    "and nor"
)


def device_status(sentence: Sequence[str], spot: Spot, status: Status) -> Status:
    """Return what a sentence says of a device, given what it would say of a finding at this place."""
    if status == "open" or not _NOT_NOW.isdisjoint(sentence):
        return "open"
    if status == "absent":
        return "absent" if _is_denied(sentence, spot) else "open"
    if _REMOVAL.isdisjoint(sentence):
        return status
    return "absent" if _is_removed(sentence, spot) else "open"


def _is_denied(sentence: Sequence[str], spot: Spot) -> bool:
    cues = [at for at in range(spot.start) if sentence[at] in NO]
    if not cues:
        return _PARTS.isdisjoint(sentence)
    return _DENIED_WITH.issuperset(sentence[cues[-1] + 1 : spot.start]) and _CLOSES.issuperset(
        sentence[spot.end : spot.end + 1]
    )


def _is_removed(sentence: Sequence[str], spot: Spot) -> bool:
    before = sentence[max(spot.start - _REACH - 2, 0) : spot.start]
    if "removal" in before:
        return not _AFTER.isdisjoint(before[: before.index("removal")])  # "before", "prior to" are open
    behind = sentence[spot.end : spot.end + _REACH]
    return any(word in _TAKEN_OUT and said in _PAST for said, word in pairwise(behind))
