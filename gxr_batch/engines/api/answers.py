"""What a server's answer says, once it is checked: servers send wrong types, no choices, and counts that cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from gxr_batch.engines.api.faults import Trouble
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
_MOST = 2**31 - 1  # what a column of the results holds


class Answer(NamedTuple):
    """One answer. Counts are None where the server gives none, or one that cannot be."""

    text: str
    finish_reason: FinishReason
    error: str | None
    prompt_tokens: int | None
    new_tokens: int | None


class _Part(BaseModel):
    # The values may be answers, so no error may quote them.
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)


def _encodable(text: str) -> str:
    text.encode()  # JSON can spell half of a surrogate pair, and no file can hold it
    return text


class _Message(_Part):
    content: Annotated[str, AfterValidator(_encodable)] | None = None


class _Choice(_Part):
    message: _Message
    finish_reason: str | None = None


class _Whole(_Part):
    choices: list[_Choice] = Field(min_length=1)
    usage: Any = None


class _PieceChoice(_Part):
    delta: _Message = _Message()
    finish_reason: str | None = None


class _Piece(_Part):
    choices: list[_PieceChoice] | None = None
    usage: Any = None


def whole_answer(data: Mapping[str, Any], most_tokens: int) -> Answer:
    """Read a chat completion. Raises Trouble where it is none."""
    try:
        answer = _Whole.model_validate(dict(data))
    except ValidationError:
        raise Trouble("sent something that is no chat completion", nonsense=True) from None
    choice = answer.choices[0]
    return _judged(choice.message.content or "", choice.finish_reason, answer.usage, most_tokens)


class Pieces:
    """An answer that comes piece by piece."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._reason: str | None = None
        self._usage: Any = None

    def take(self, data: Mapping[str, Any]) -> str:
        """Take a piece in and return its text. Raises Trouble where it is none."""
        try:
            piece = _Piece.model_validate(dict(data))
        except ValidationError:
            raise Trouble("sent something that is no piece of a chat completion", nonsense=True) from None
        self._usage = piece.usage or self._usage
        if not piece.choices:  # the last piece of many servers holds nothing but counts
            return ""
        self._reason = piece.choices[0].finish_reason or self._reason
        text = piece.choices[0].delta.content or ""
        if text:
            self.texts.append(text)
        return text

    def answer(self, most_tokens: int) -> Answer | None:
        """Return the answer that the pieces make; None where no piece came, as from a server that does not stream.

        Raises Trouble where the pieces end in the middle.
        """
        if not self.texts and self._reason is None:
            return None
        if self._reason is None:
            raise Trouble("broke off its answer")
        return _judged("".join(self.texts), self._reason, self._usage, most_tokens)


def _judged(text: str, reason: str | None, usage: Any, most_tokens: int) -> Answer:
    counts = usage if isinstance(usage, Mapping) else {}
    prompt_tokens = _count(counts.get("prompt_tokens"), _MOST) or None
    # A count beyond the limit that the server was given, or of nothing for a text, is no count of this answer.
    new_tokens = _count(counts.get("completion_tokens"), most_tokens)
    if not new_tokens and text:
        new_tokens = None
    if reason in _NO_TEXT:
        return Answer("", "error", _NO_TEXT[reason], prompt_tokens, new_tokens)
    unnamed: FinishReason = "length" if new_tokens == most_tokens else "stop"
    known = _REASONS.get(reason) if reason else unnamed
    if known is None:  # whether the text is complete is what a reviewer must be able to rely on
        return Answer("", "error", "the server ended the answer for a reason of its own", prompt_tokens, new_tokens)
    return Answer(text, known, None, prompt_tokens, new_tokens)


def _count(value: Any, most: int) -> int | None:
    sound = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
    return value if sound else None
