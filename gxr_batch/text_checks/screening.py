"""Identifier screening of one job: what is screened of a row, what a hit is called, and what becomes of the row.

Rules are told by name, in flags, errors, notices and counts; the text that they found goes nowhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from gxr_batch.job import Job
from gxr_batch.prompts import Templates
from gxr_batch.records import Messages, Row
from gxr_batch.text_checks.identifiers import identifiers_in

IN_INPUT, IN_OUTPUT = "identifier_in_input", "identifier_in_output"
# Between two cells, so that no rule reads across them: neither a blank nor a letter.
_BETWEEN = "\n\x00\n"


class Screen:
    """Screens the rows of one job. `mode` says what a hit does: nothing (off), a flag, or the row is held."""

    def __init__(self, templates: Templates, names: Iterable[str], job: Job) -> None:
        self.mode = job.privacy.screening(job.generator)
        # A template's own words come with every prompt: they are no row's fault, and are told once.
        sources = {name: templates.get(name).source for name in names}
        self._own = {name: frozenset(identifiers_in(source)) for name, source in sources.items()}
        self._system = identifiers_in(job.prompt.system)

    def notices(self) -> list[str]:
        """Say which rules hit the job's own words. These stand in every prompt."""
        if self.mode == "off":
            return []
        texts = {f"the template {name}": sorted(rules) for name, rules in self._own.items()}
        texts["prompt.system"] = list(self._system)
        return [
            f"Identifier screening hits the text of {what} itself: {', '.join(rules)}. It stands in every prompt; "
            "no row is flagged or held for it, unless the model repeats it."
            for what, rules in texts.items()
            if rules
        ]

    def of_row(self, row: Row, messages: Messages) -> tuple[str, ...]:
        """Return the rules that hit the row's cells or its prompt, but for what the template says for every row."""
        cells = [str(value) for value in row.values.values() if value is not None]
        prompt = "\n".join(turn.text for turn in messages.turns if turn.role != "system")
        return hits_in(cells, prompt, self._own[row.template])


def hits_in(cells: Iterable[str], prompt: str, own: Collection[str]) -> tuple[str, ...]:
    """Return the rules that hit a cell, or the prompt made of them but for `own`, which its template hits by itself."""
    if not own:
        return identifiers_in(_BETWEEN.join([*cells, prompt]))
    of_prompt = (rule for rule in identifiers_in(prompt) if rule not in own)
    return tuple(dict.fromkeys((*identifiers_in(_BETWEEN.join(cells)), *of_prompt)))


def flags(where: str, rules: Iterable[str]) -> tuple[str, ...]:
    """Return the flags of these hits, such as `identifier_in_input:mrn`."""
    return tuple(f"{where}:{rule}" for rule in rules)


def reason(where: str, rules: Iterable[str]) -> str:
    """Return why a row is held, as its gxr_error says it."""
    return f"identifier screening{' of the output' if where == IN_OUTPUT else ''}: {', '.join(rules)}"
