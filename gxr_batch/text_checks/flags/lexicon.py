"""The chest findings and devices that are compared between row and text: names, spellings, normal statements.

A finding is a phrase ("pleural effusion"), or a head word with a word beside it ("the heart is mildly enlarged").
A normal statement ("heart size is normal") says that findings are absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from gxr_batch.text_checks.flags.sentences import word_set

# What a sentence says of what it names, and the words that deny.
Status = Literal["present", "likely", "absent", "open"]
NO = word_set(
    "no without not never neither nor none nothing cannot can't isn't aren't wasn't weren't doesn't don't didn't "
    "hasn't haven't free negative absence lack excludes"
)


class Spot(NamedTuple):
    """Where findings, or a device, are named in a sentence: words `start` to `end`.

    `normal`: by their normal counterpart. `paired`: by two words that may have others between them.
    """

    start: int
    end: int
    findings: tuple[str, ...]
    normal: bool = False
    paired: bool = False

    @property
    def device(self) -> bool:
        """Whether a device is named rather than a finding."""
        return self.findings[0] in DEVICES


_PHRASES = {
    "pleural_effusion": "effusion|effusions|pleural fluid|hydrothorax|haemothorax|hemothorax|hydropneumothorax",
    "pericardial_effusion": "pericardial effusion|pericardial fluid",
    "pneumothorax": "pneumothorax|pneumothoraces",
    "consolidation": "consolidation|consolidations|consolidated",
    "opacity": "opacity|opacities|opacification|opacified|infiltrate|infiltrates|shadowing",
    "air_bronchograms": "air bronchogram|air bronchograms",
    "pneumonia": "pneumonia|bronchopneumonia",
    "atelectasis": "atelectasis|atelectases|atelectatic|collapse|collapsed",
    "cardiomegaly": "cardiomegaly",
    "pulmonary_oedema": "oedema|edema",
    "septal_lines": "septal lines|kerley lines|kerley b lines",
    "congestion": "vascular congestion|pulmonary congestion|venous congestion|congestion",
    "nodule": "nodule|nodules",
    "mass": "mass|masses",
    "cavity": "cavity|cavities|cavitation|cavitations|cavitating|cavitary",
    "fracture": "fracture|fractures|fractured",
    "hyperinflation": "hyperinflation|hyperinflated|hyperexpanded|overinflated|hyperexpansion",
    "emphysema": "emphysema|emphysematous",
    "subcutaneous_emphysema": "subcutaneous emphysema|surgical emphysema|subcutaneous gas|subcutaneous air",
    "pneumomediastinum": "pneumomediastinum",
    "pneumoperitoneum": "pneumoperitoneum|free air|free gas|free intraperitoneal air|free subdiaphragmatic air",
    "mediastinal_shift": "mediastinal shift|tracheal shift|tracheal deviation|mediastinal displacement",
    "mediastinal_widening": "mediastinal widening",
    "lymphadenopathy": "lymphadenopathy|adenopathy",
    "fibrosis": "fibrosis|fibrotic",
    "honeycombing": "honeycombing",
    "bronchiectasis": "bronchiectasis|bronchiectatic",
    "pleural_thickening": "pleural thickening",
    "calcification": "calcification|calcifications|calcified",
    "bullae": "bulla|bullae",
    "hiatus_hernia": "hiatus hernia|hiatal hernia",
    "foreign_body": "foreign body|foreign bodies",
    "granuloma": "granuloma|granulomas|granulomata",
    "scoliosis": "scoliosis",
    "chest_drain": "drain|drains|chest tube|chest tubes|thoracostomy tube|thoracostomy tubes|intercostal tube|"
    "pleural catheter|pleural catheters|pigtail catheter|pigtail catheters",
    "central_line": "central line|central lines|central venous line|central venous lines|central venous catheter|"
    "central venous catheters|venous line|venous catheter|jugular line|jugular lines|jugular catheter|"
    "jugular catheters|subclavian line|subclavian lines|subclavian catheter|subclavian catheters|dialysis catheter|"
    "cvc|cvp line|hickman line|hickman catheter",
    "picc": "picc|piccs|picc line|picc lines",
    "port": "port|port catheter|portacath",
    "pacemaker": "pacemaker|pacemakers",
    "defibrillator": "icd|defibrillator",
}
# Devices that enter on one side and may end on the other.
THREADED = frozenset({"central_line", "picc", "port", "pacemaker", "defibrillator"})
DEVICES = THREADED | {"chest_drain"}
# A finding's word that means something else after one of these.
_OTHER_SENSE = {
    "effusion": {"joint", "knee"},
    "cavity": {"pleural", "chest", "thoracic", "abdominal", "peritoneal", "oral"},
    "collapse": {"vertebral", "circulatory", "cardiovascular"},
    "fracture": {"lead", "catheter", "wire", "stent"},
    "oedema": {"ankle", "leg", "peripheral", "tissue", "limb", "subglottic", "laryngeal"},
    "drain": {"to", "that", "which", "can", "may", "will", "should", "veins", "surgical", "wound", "abdominal",
              "pericardial", "mediastinal", "biliary"},
    "port": {"side", "drainage"},
}  # fmt: skip
_OTHER_SENSE["edema"], _OTHER_SENSE["drains"] = _OTHER_SENSE["oedema"], _OTHER_SENSE["drain"]
_NEXT_SENSE = {
    "mass": {"effect"},
    "drain": {"it", "them", "the", "a", "an", "to", "into"},
    "port": {"of", "site", "sites"},
    "icd": {"code", "codes"},
    "defibrillator": {"pads"},
}
_NEXT_SENSE["drains"] = _NEXT_SENSE["drain"] | {"poorly", "slowly", "freely", "well"}

# Head words, the words of which one stands within a few words on either side, the findings, normal or not.
_PAIRS = (
    ("enlarged enlargement", "heart cardiac cardiomediastinal", ("cardiomegaly",), False),
    ("enlarged enlargement", "node nodes lymph hilar", ("lymphadenopathy",), False),
    ("shifted shift shifts displaced displacement deviated deviation pulled pushed", "mediastinum trachea mediastinal",
     ("mediastinal_shift",), False),
    ("widened widening", "mediastinum mediastinal", ("mediastinal_widening",), False),
    ("blunted blunting", "costophrenic", ("pleural_effusion",), False),
    ("thickened", "pleura", ("pleural_thickening",), False),
    ("raised elevated elevation", "hemidiaphragm diaphragm", ("raised_hemidiaphragm",), False),
    ("normal", "heart cardiac", ("cardiomegaly",), True),
    ("midline central", "mediastinum trachea mediastinal", ("mediastinal_shift",), True),
    ("sharp", "costophrenic", ("pleural_effusion",), True),
    ("intact", "bones bony skeleton", ("fracture",), True),
    ("clear unremarkable", "lung lungs", ("consolidation", "nodule", "pulmonary_oedema", "cavity", "opacity"), True),
)  # fmt: skip
_REACH = 6
_BARRIERS = frozenset(",;:.") | {"but", "while", "with"}


class _Pair(NamedTuple):
    near: frozenset[str]
    findings: tuple[str, ...]
    normal: bool


def _phrases_by_head() -> dict[str, list[tuple[tuple[str, ...], str]]]:
    """Return, for each first word, its phrases, longest first."""
    by_head: dict[str, list[tuple[tuple[str, ...], str]]] = {}
    for finding, spellings in _PHRASES.items():
        for spelling in spellings.split("|"):
            words = tuple(spelling.split())
            by_head.setdefault(words[0], []).append((words, finding))
    return {head: sorted(found, key=lambda entry: -len(entry[0])) for head, found in by_head.items()}


def _pairs_by_head() -> dict[str, list[_Pair]]:
    by_head: dict[str, list[_Pair]] = {}
    for heads, near, findings, normal in _PAIRS:
        for head in heads.split():
            by_head.setdefault(head, []).append(_Pair(frozenset(near.split()), findings, normal))
    return by_head


_BY_HEAD, _PAIRED = _phrases_by_head(), _pairs_by_head()
HEADS = frozenset(_BY_HEAD) | frozenset(_PAIRED)


def spots_in(sentence: Sequence[str]) -> list[Spot]:
    """Return where a sentence names findings, from left to right."""
    found: list[Spot] = []
    taken = 0  # words before this belong to a phrase already
    for at in [place for place, word in enumerate(sentence) if word in HEADS]:
        if at < taken:
            continue
        spot = _phrase_at(sentence, at) or _pair_at(sentence, at)
        if spot is not None:
            found.append(spot)
            taken = spot.end
    return found


def _phrase_at(sentence: Sequence[str], at: int) -> Spot | None:
    for words, finding in _BY_HEAD.get(sentence[at], ()):
        end = at + len(words)
        if len(words) > 1 and tuple(sentence[at:end]) != words:
            continue
        if at and sentence[at - 1] in _OTHER_SENSE.get(words[0], ()):
            continue
        if end < len(sentence) and sentence[end] in _NEXT_SENSE.get(words[0], ()):
            continue
        return Spot(at, end, (finding,))
    return None


def _pair_at(sentence: Sequence[str], at: int) -> Spot | None:
    for pair in _PAIRED.get(sentence[at], ()):
        for step in (-1, 1):
            place = at + step
            while 0 <= place < len(sentence) and abs(place - at) <= _REACH and sentence[place] not in _BARRIERS:
                if sentence[place] in pair.near:
                    return Spot(min(at, place), max(at, place) + 1, pair.findings, pair.normal, True)
                place += step
    return None
