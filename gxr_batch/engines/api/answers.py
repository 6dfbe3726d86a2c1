"""Reads and checks a server's answer: servers send wrong types, no choices, and impossible counts.

The openai library does not validate responses against its types, so nothing here trusts them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from gxr_batch.engines.api.server_faults import MISREAD, Trouble
from gxr_batch.records import FinishReason

_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",
}
_NO_TEXT = {
    "content_filter": "the server's content filter stopped the answer",
    "tool_calls": "the server answered with a call of a tool in place of a text",
    "function_call": "the server answered with a call of a tool in place of a text",
}
# Servers that shut down, sleep or fail end requests in progress so, with HTTP 200.
_BROKEN_OFF = frozenset({"abort", "error"})
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_REASONING_PARTS = ("thinking", "reasoning", "summary")
_MOST = 2**31 - 1  # the largest value of a result column


class Answer(NamedTuple):
    """One answer, in the fields of a Completion. Counts are None if the server gives none, or an impossible one."""

    text: str
    finish_reason: FinishReason
    error: str | None
    prompt_tokens: int | None
    new_tokens: int | None
    reasoning: str | None = None


class _Said(NamedTuple):
    """Text and reasoning of a message, or of a piece of one."""

    text: str
    reasoning: str


def whole_answer(completion: Any, most_tokens: int) -> Answer:
    """Read a chat completion. Raises one of MISREAD if it is not one, Trouble if the server broke it off."""
    choice = completion.choices[0]
    return _judged(_said(choice.message), _reason(choice), completion, most_tokens)


class StreamedAnswer:
    """An answer that arrives in pieces."""

    def __init__(self) -> None:
        self._said: list[_Said] = []
        self._reason = ""
        self._counted: Any = None

    def take(self, piece: Any) -> str:
        """Add a piece and return its text. Raises Trouble if it is not a piece of a chat completion."""
        try:
            said = _Said("", "")
            if choices := piece.choices:  # the last piece of many servers holds only counts
                said = _said(choices[0].delta) if hasattr(choices[0], "delta") else said
                self._reason = _reason(choices[0]) or self._reason
        except MISREAD:
            raise Trouble("sent something that is no piece of a chat completion", nonsense=True) from None
        if getattr(piece, "usage", None):
            self._counted = piece
        if any(said):
            self._said.append(said)
        return said.text

    def answer(self, most_tokens: int) -> Answer | None:
        """Return the answer that the pieces make; None if none arrived, as from a server that does not stream.

        Raises Trouble if the pieces end in the middle, or the server broke the answer off.
        """
        if not self._reason:
            if self._said:
                raise Trouble("broke off its answer")
            return None
        whole = _Said(*("".join(pieces) for pieces in zip(*self._said, strict=True))) if self._said else _Said("", "")
        return _judged(whole, self._reason, self._counted, most_tokens)


def _said(message: Any) -> _Said:
    """Return what a message says. Raises one of MISREAD."""
    if message is None or isinstance(message, str | int | float | list):
        raise TypeError  # not an object at all, so it cannot lack its content either
    text, thought = _parts(getattr(message, "content", None))
    # Servers have several names for this field, and some send two of them with the same text.
    for name in _REASONING_FIELDS:
        value = getattr(message, name, None)
        if isinstance(value, str) and value:
            return _Said(text, _text(value) + thought)
    return _Said(text, thought)


def _parts(content: Any) -> _Said:
    """Return the text of a content, which may be a list of parts. Raises TypeError for parts that are neither text nor
    reasoning.
    """
    if not isinstance(content, list):
        return _Said(_text(content), "")
    texts, thoughts = [], []
    for part in content:
        if isinstance(part, str):
            texts.append(_text(part))
            continue
        kind, value = _of(part, "type"), _of(part, "text")
        if kind in _REASONING_PARTS:
            inner = value or next((found for name in _REASONING_PARTS if (found := _of(part, name))), None)
            thoughts.append("".join(_parts(inner)))
        elif kind in {None, "text", "output_text"} and value is not None:
            texts.append(_text(_of(value, "value") if isinstance(value, dict) else value))
        else:
            raise TypeError
    return _Said("".join(texts), "".join(thoughts))


def _of(part: Any, name: str) -> Any:
    return part.get(name) if isinstance(part, dict) else getattr(part, name, None)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # JSON can encode half of a surrogate pair, which no file can hold
    return value


def _reason(choice: Any) -> str:
    return _text(getattr(choice, "finish_reason", None))


def _judged(said: _Said, reason: str, counted: Any, most_tokens: int) -> Answer:
    text, thought = said
    usage = getattr(counted, "usage", None)
    prompt_tokens = _count(usage, "prompt_tokens", _MOST) or None
    # A count above the limit that was sent, or of 0 for a text, is not a count of this answer.
    new_tokens = _count(usage, "completion_tokens", most_tokens)
    if not new_tokens and any(said):
        new_tokens = None
    if reason in _BROKEN_OFF:
        raise Trouble("broke off its answer")
    if reason in _NO_TEXT:
        return Answer("", "error", _NO_TEXT[reason], prompt_tokens, new_tokens)
    unnamed: FinishReason = "length" if new_tokens == most_tokens else "stop"
    known = _REASONS.get(reason) if reason else unnamed
    if known is None:  # a reviewer must be able to rely on whether the text is complete
        return Answer("", "error", "the server ended the answer for a reason of its own", prompt_tokens, new_tokens)
    return Answer(text, known, None, prompt_tokens, new_tokens, thought or None)


def _count(usage: Any, name: str, most: int) -> int | None:
    value = getattr(usage, name, None)
    sound = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
    return value if sound else None
