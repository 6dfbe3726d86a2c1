"""Separates what a reasoning model wrote before its text from the text, by the marks that models put around it.

Only reasoning at the beginning is recognised, or everything before a closing mark whose opening one the chat template
wrote. Servers that send reasoning in a field put it into the completion; this is where both meet, for every engine.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from gxr_batch.records import Completion

USED_UP = "all max_new_tokens tokens were used up by reasoning, before the text; raise sampling.max_new_tokens"
ONLY_REASONING = "the model returned reasoning and no text"
# Opening and closing marks: DeepSeek, Qwen and most others; Mistral; Kimi; MedGemma; gpt-oss.
_NAMES = "think|thinking|thought|reasoning|seed:think"
_PAIRS = (
    (rf"<(?:{_NAMES})>", rf"</(?:{_NAMES})>"),
    (r"\[THINK\]", r"\[/THINK\]"),
    (r"◁think▷", r"◁/think▷"),
    (r"<unused94>(?:thought\n)?", r"<unused95>"),
    (
        r"(?:<\|start\|>assistant)?<\|channel\|>(?:analysis|commentary)[^<]*<\|message\|>",
        r"(?:<\|end\|>)?(?:<\|start\|>assistant)?<\|channel\|>final[^<]*<\|message\|>|<\|end\|>",
    ),
)
_OPENED = tuple((re.compile(rf"\s*(?:{opening})"), re.compile(closing)) for opening, closing in _PAIRS)
_CLOSED = re.compile("|".join(closing for _, closing in _PAIRS[:4]))


class Separated(NamedTuple):
    """A model's answer as text and reasoning; None if it had no reasoning."""

    text: str
    reasoning: str | None


def separated(answer: str) -> Separated:
    """Separate the reasoning at the beginning of an answer from its text; an answer without any stays as it is."""
    found: list[str] = []
    rest = answer
    while rest:
        cut = _first(rest)
        if cut is None and not found and (closing := _CLOSED.search(rest)):
            cut = rest[: closing.start()], rest[closing.end() :]
        if cut is None:
            break
        found.append(cut[0].strip())
        rest = cut[1]
    if not found:
        return Separated(answer, None)
    return Separated(rest.lstrip(), "\n\n".join(filter(None, found)))


def _first(text: str) -> tuple[str, str] | None:
    """Return the reasoning that a text begins with, and what follows it; None if it begins with none."""
    for opening, closing in _OPENED:
        if begun := opening.match(text):
            ended = closing.search(text, begun.end())
            if ended is None:  # the tokens ran out before the text
                return text[begun.end() :], ""
            return text[begun.end() : ended.start()], text[ended.end() :]
    return None


def without_reasoning(completion: Completion) -> Completion:
    """Return a completion whose text has no reasoning, which is in `reasoning`; an error if nothing else is left."""
    if completion.error is not None:
        return completion
    text, marked = separated(completion.text)
    reasoning = "\n\n".join(filter(None, (completion.reasoning, marked))) or None
    if marked is None and reasoning is None:
        return completion
    if text.strip():
        return completion._replace(text=text, reasoning=reasoning)
    if not reasoning:  # empty marks: models write them if reasoning is switched off
        return completion._replace(text="")
    error = USED_UP if completion.finish_reason == "length" else ONLY_REASONING
    return completion._replace(text="", finish_reason="error", error=error, reasoning=reasoning)
