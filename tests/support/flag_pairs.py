"""The planted errors of tests/data as test cases for the flags, and how well the flags find them."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

from places import DATA

from gxr_batch.job import PromptSection
from gxr_batch.prompts import Templates
from gxr_batch.prompts.render import render
from gxr_batch.text_checks.flags import FLAGS, Evidence, flags_of

SETS = {
    "tuning": [DATA / "flags_tuning.toml", DATA / "flags_long.toml"],
    "held out": [DATA / "flags_held_out.toml", DATA / "flags_long_held_out.toml"],
}
_TEMPLATES = Templates(PromptSection())
# Flags that the program sets itself, not by a rule over a text.
RULED = [name for name in FLAGS if name not in {"findings_truncated", "flags_not_computed"}]


class Case(NamedTuple):
    """One text of a pair: the error planted in it ("" = none), and which flags it may have as well."""

    name: str
    evidence: Evidence
    planted: str
    also: frozenset[str]


class Score(NamedTuple):
    """How one flag did: planted errors, those found, and texts flagged without reason."""

    positives: int
    found: int
    wrong: int

    @property
    def recall(self) -> float:
        return self.found / self.positives if self.positives else 1.0

    @property
    def precision(self) -> float:
        return self.found / (self.found + self.wrong) if self.found + self.wrong else 1.0


def evidence(text: str, *, template: str = "clinical_case", finish_reason: Any = "stop", **cells: Any) -> Evidence:
    """Return a text with the row and prompt that a built-in template makes of these cells."""
    compiled = _TEMPLATES.get(template)
    values = {field: cells.pop(field, None) for field in compiled.fields}
    assert not cells, f"the template {template} has no field {', '.join(cells)}"
    prompt = render(compiled, values, system="").turns[-1].text
    return Evidence(text, prompt, values, finish_reason)


def cases(name: str) -> list[Case]:
    """Return the texts of a set, clean and faulty ones."""
    found = []
    for pair in chain.from_iterable(tomllib.loads(path.read_text(encoding="utf-8"))["pair"] for path in SETS[name]):
        name, flag, also = pair.pop("id"), pair.pop("flag", ""), frozenset(pair.pop("also", ()))
        clean, faulty, planted = pair.pop("clean"), pair.pop("faulty", None), pair.pop("planted", ())
        changed = {key.removeprefix("faulty_"): pair.pop(key) for key in list(pair) if key.startswith("faulty_")}
        found.append(Case(f"{name} clean", evidence(clean, **pair), "", frozenset()))
        if faulty is not None:
            found.append(Case(f"{name} faulty", evidence(faulty, **pair | changed), flag, also))
        for number, (error, passage, instead) in enumerate(planted, start=1):
            assert clean.count(passage) == 1, f"{name}: {passage}"
            text = clean.replace(passage, instead)
            found.append(Case(f"{name} planted {number}", evidence(text, **pair), error, also))
    return found


def _is_whole(pair: str) -> bool:
    """Return whether a pair's texts name all that their row has; others have a sentence or two about one thing."""
    return any(kind in pair for kind in ("-lost-", "-invented-", "-kept-"))


def scores(texts: Iterable[Case]) -> tuple[dict[str, Score], list[str]]:
    """Return how each flag did, and a line for each text whose flags are not those planted.

    A wrong flag counts once per pair.
    """
    counts = {name: [0, 0, 0] for name in RULED}
    mistakes, known = [], set()
    for case in texts:
        flags = flags_of(case.evidence)
        if case.planted:
            counts[case.planted][0] += 1
            counts[case.planted][1] += case.planted in flags
        pair = case.name.split()[0]
        also = case.also if _is_whole(pair) else case.also | {"finding_lost"}
        wrong = [flag for flag in flags if flag != case.planted and flag not in also]
        for flag in wrong:
            counts[flag][2] += (pair, flag) not in known  # its clean text and its faulty ones share most sentences
            known.add((pair, flag))
        if wrong or (case.planted and case.planted not in flags):
            mistakes.append(
                f"{case.name}: planted {case.planted or 'nothing'}, flagged {', '.join(flags) or 'nothing'}"
            )
    return {name: Score(*count) for name, count in counts.items()}, mistakes
