"""Reasoning before a text is separated from it by the marks of many models, and never from a text without any."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gxr_batch.records import Completion, Key
from gxr_batch.text_checks.reasoning import ONLY_REASONING, USED_UP, separated, without_reasoning

TEXT = "Impression: no acute finding."


@pytest.mark.parametrize(
    "answer",
    [
        f"<think>Heart first.</think>\n\n{TEXT}",
        f"\n<thinking>\nHeart first.\n</thinking>{TEXT}",
        f"<reasoning>Heart first.</reasoning> {TEXT}",
        f"[THINK]Heart first.[/THINK]{TEXT}",
        f"◁think▷Heart first.◁/think▷\n{TEXT}",
        f"<unused94>thought\nHeart first.<unused95>{TEXT}",
        f"<|channel|>analysis<|message|>Heart first.<|end|><|start|>assistant<|channel|>final<|message|>{TEXT}",
        f"Heart first.\n</think>\n\n{TEXT}",  # the chat template wrote the opening mark
        f"<think></think><think>Heart first.</think>{TEXT}",
    ],
)
def test_reasoning_is_separated_in_every_spelling(answer):
    assert separated(answer) == (TEXT, "Heart first.")


@pytest.mark.parametrize(
    "answer",
    [
        TEXT,
        f"  {TEXT}\n",
        "I think <think> is a tag.",
        "The pleural space <5 mm> is thin",
        "Findings: [THINK] is no mark here",
        "",
        " ",
    ],
)
def test_a_text_without_reasoning_stays_as_it_is(answer):
    assert separated(answer) == (answer, None)


@given(st.text())
def test_no_text_is_lost(answer):
    text, reasoning = separated(answer)
    assert text == answer or reasoning is not None


def completion(text: str, finish: str = "stop", reasoning: str | None = None) -> Completion:
    return Completion(Key("1", 1), text, finish, None, 3, 4, 0.0, 0.1, 0.2, 0.2, 1.0, 0, 0, reasoning)


@pytest.mark.parametrize(
    ("made", "text", "reasoning", "error"),
    [
        (completion(TEXT), TEXT, None, None),
        (completion(TEXT, reasoning="Sent apart."), TEXT, "Sent apart.", None),
        (completion(f"<think>In it.</think>{TEXT}", reasoning="Sent apart."), TEXT, "Sent apart.\n\nIn it.", None),
        (completion("<think>The heart is", "length"), "", "The heart is", USED_UP),
        (completion("", "length", "The heart is"), "", "The heart is", USED_UP),
        (completion("<think>Done.</think>"), "", "Done.", ONLY_REASONING),
        (completion("<think>\n\n</think>\n\n", "stop"), "", None, None),
        (completion(f"<think>\n\n</think>\n\n{TEXT}"), TEXT, None, None),
    ],
)
def test_an_answer_of_reasoning_alone_is_an_error_with_the_reason(made, text, reasoning, error):
    done = without_reasoning(made)
    assert (done.text, done.reasoning, done.error) == (text, reasoning, error)
    assert (done.finish_reason == "error") == (error is not None)
