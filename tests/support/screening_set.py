"""The hand-written set for identifier screening, and each rule's recall and precision on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from places import DATA

from gxr_batch.text_checks.identifiers import RULES, identifiers_in

SET = DATA / "identifiers.tsv"


class Line(NamedTuple):
    """One text, and the rules that should match it."""

    number: int
    rules: frozenset[str]
    text: str


class Figures(NamedTuple):
    """The counts for a rule: texts that it should match, that it matches, and both."""

    expected: int
    found: int
    both: int

    @property
    def recall(self) -> float:
        return self.both / self.expected

    @property
    def precision(self) -> float:
        return self.both / self.found if self.found else 0.0


def lines() -> list[Line]:
    """Return the set."""
    made = []
    for number, line in enumerate(SET.read_text(encoding="utf-8").splitlines(), 1):
        if line and not line.startswith("#"):
            rules, _, text = line.partition("\t")
            made.append(Line(number, frozenset(rules.split(",")) - {"-"}, text.replace("\\n", "\n")))
    return made


def figures() -> dict[str, Figures]:
    """Return the figures of each rule."""
    pairs = [(line.rules, set(identifiers_in(line.text))) for line in lines()]
    return {
        rule: Figures(
            sum(rule in expected for expected, _ in pairs),
            sum(rule in found for _, found in pairs),
            sum(rule in expected and rule in found for expected, found in pairs),
        )
        for rule in RULES
    }


def mistakes() -> Iterator[tuple[Line, set[str]]]:
    """Yield the lines that other rules match than should, and those rules."""
    for line in lines():
        if (found := set(identifiers_in(line.text))) != line.rules:
            yield line, found
