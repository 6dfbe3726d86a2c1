"""Identifier screening of one job: what is screened in a row, how a hit is reported, and what happens to the row.

Rules are reported by name, in flags, errors, notices and counts; the text that they found is never stored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from gxr_batch.job import Job
from gxr_batch.prompts import Templates
from gxr_batch.records import Messages, Row
from gxr_batch.text_checks.identifiers import identifiers_in

IN_INPUT, IN_OUTPUT = "identifier_in_input", "identifier_in_output"
# Between two cells, so that no rule matches across them: neither a space nor a letter.
_BETWEEN = "\n\x00\n"


class Screen:
    """Screens the rows of one job. `mode` decides the effect of a hit: none (off), a flag, or the row is held."""

    def __init__(self, templates: Templates, names: Iterable[str], job: Job) -> None:
        self.mode = job.privacy.screening(job.generator)
        # A template's text is in every prompt, so its hits are reported once and not for each row.
        sources = {name: templates.get(name).source for name in names}
        self._own = {name: frozenset(identifiers_in(source)) for name, source in sources.items()}
        self._system = identifiers_in(job.prompt.system)

    def notices(self) -> list[str]:
        """Return notices for the rules that hit the job's own text, which is in every prompt."""
        if self.mode == "off":
            return []
        texts = {f"the template {name}": sorted(rules) for name, rules in self._own.items()}
        texts["prompt.system"] = list(self._system)
        return [
            f"Identifier screening found something in the text of {what} itself: {', '.join(rules)}. It is in every "
            "prompt; rows are flagged or held for it only if the model repeats it."
            for what, rules in texts.items()
            if rules
        ]

    def of_row(self, row: Row, messages: Messages) -> tuple[str, ...]:
        """Return the rules that hit the row's cells or its prompt, except for hits in the template itself."""
        cells = [str(value) for value in row.values.values() if value is not None]
        prompt = "\n".join(turn.text for turn in messages.turns if turn.role != "system")
        return hits_in(cells, prompt, self._own[row.template])


def hits_in(cells: Iterable[str], prompt: str, own: Collection[str]) -> tuple[str, ...]:
    """Return the rules that hit a cell or the prompt, except for `own`, the prompt hits of the template itself."""
    if not own:
        return identifiers_in(_BETWEEN.join([*cells, prompt]))
    of_prompt = (rule for rule in identifiers_in(prompt) if rule not in own)
    return tuple(dict.fromkeys((*identifiers_in(_BETWEEN.join(cells)), *of_prompt)))


def flags(where: str, rules: Iterable[str]) -> tuple[str, ...]:
    """Return the flags of these hits, such as `identifier_in_input:mrn`."""
    return tuple(f"{where}:{rule}" for rule in rules)


def reason(where: str, rules: Iterable[str]) -> str:
    """Return the reason why a row is held, for gxr_error."""
    return f"identifier screening{' of the output' if where == IN_OUTPUT else ''}: {', '.join(rules)}"
