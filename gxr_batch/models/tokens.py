"""Messages -> token ids. Encoded once, exactly one BOS; the text of a cell never becomes a control token.

The turns are laid out with placeholders, split at the layout's control tokens, and each piece between two of them is
encoded in one call with control tokens disabled. So the ids outside a cell are the same as with a harmless cell, and
for harmless text they are those of the library's own `apply_chat_template`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gxr_batch.cells import is_unicode
from gxr_batch.errors import ModelUnavailable, RowError
from gxr_batch.models.foreign import loading
from gxr_batch.records import Encoded, Messages, Turn

# Replaces a turn's text while the turns are laid out; the private-use characters occur in no template.
_PLACEHOLDER = "\ue000{}\ue001"
_SLOT = re.compile("\ue000(\\d+)\ue001")
# Control tokens that some conversions mark as ordinary text.
_CONTROL = re.compile(r"<(start|end)_of_\w+>|<image_soft_token>|\[multimodal\]")
_END_OF_TURN = "<end_of_turn>"
_ROLES = {"system": "system", "user": "user", "model": "assistant"}


_UNUSABLE = "The model's tokenizer cannot encode text"


class _Piece(NamedTuple):
    """Part of a layout: ids that are the same for every prompt, then a text with placeholders for the turns' texts."""

    ids: list[int]
    text: str


class _Layout(NamedTuple):
    """`trims` is True for each turn whose text the chat template strips."""

    pieces: tuple[_Piece, ...]
    trims: tuple[bool, ...]


class ChatEncoder:
    """Encodes messages for one tokenizer (a fast one of transformers). Implements the protocol's Encoder."""

    def __init__(self, tokenizer: Any, *, format: Literal["chat", "literal"] = "chat") -> None:
        self._tokenizer = tokenizer
        self._format = format
        # Of a tokenizer that was made in memory there is no folder.
        self._folder = Path(str(getattr(tokenizer, "name_or_path", "") or "tokenizer"))
        with loading(_UNUSABLE, self._folder):
            self._prepare()

    def _prepare(self) -> None:
        tokenizer = self._tokenizer
        self._mark_controls(_CONTROL.fullmatch)
        self._layouts: dict[tuple[str, ...], _Layout] = {}
        self._prefixes: dict[tuple[tuple[str, ...], str, str], list[int]] = {}
        # All tokens in one text: searching it for a pair of characters is faster than searching 250,000 strings.
        vocabulary = tokenizer.get_vocab()
        self._vocabulary = "\n".join(vocabulary)
        self._end_of_answer = vocabulary.get(_END_OF_TURN, tokenizer.eos_token_id)
        # How this vocabulary writes a blank: "▁" or "Ġ", each of which may be an ordinary letter in the other kind.
        self._blank = "".join(tokenizer.convert_ids_to_tokens(self._plain("a b"))).partition("a")[2][:1]

    def encode(self, messages: Messages) -> Encoded:
        """Return the ids of a prompt, ready for the model to answer."""
        turns = messages.turns
        roles = tuple(turn.role for turn in turns)
        if roles not in self._layouts:
            self._layouts[roles] = self._lay_out(roles)
        layout = self._layouts[roles]
        texts = [turn.text.strip() if trims else turn.text for turn, trims in zip(turns, layout.trims, strict=True)]
        ids: list[int] = []
        shared = 0
        last = len(turns) - 1
        for piece in layout.pieces:
            ids += piece.ids
            if not piece.text:
                continue
            if messages.literal_chars and f"\ue000{last}\ue001" in piece.text:
                shared = self._shared(ids, piece.text, texts, messages, last)
            ids += self._plain(_SLOT.sub(lambda slot: texts[int(slot[1])], piece.text))
        if shared and self._prefixes[self._prefix_key(roles, texts, messages)] != ids[:shared]:
            shared = 0
        return Encoded(ids, len(ids), shared)

    def count(self, text: str) -> int:
        """Return how many tokens a text has in which nothing is a control token."""
        return len(self._plain(text))

    def encode_answer(self, text: str) -> list[int]:
        """Return the ids of an answer as the model should give it after a prompt: its text, then its end token.

        A model trained on answers must learn their ends too: without the end token it continues.
        """
        return [*self._plain(text.strip()), self._end_of_answer]

    # ------------------------------------------------------------------ layout

    def _lay_out(self, roles: tuple[str, ...]) -> _Layout:
        if self._format == "literal":
            return _Layout(self._cut(_literal(roles)), (False,) * len(roles))
        if not self._tokenizer.chat_template:
            return _Layout(self._cut(_gemma(roles)), tuple(role != "system" for role in roles))
        padded = self._by_template(roles, "\n {} \n")
        trims = tuple(f"\n {_PLACEHOLDER.format(number)} \n" not in padded for number in range(len(roles)))
        return _Layout(self._cut(self._by_template(roles, "{}")), trims)

    def _by_template(self, roles: tuple[str, ...], around: str) -> str:
        """Lay turns out with the tokenizer's chat template; if it refuses a system text, put that before the user's."""
        turns = [Turn(role, around.format(_PLACEHOLDER.format(number))) for number, role in enumerate(roles)]  # type: ignore[arg-type]
        for candidate in (turns, _system_in_front(turns)):
            try:
                text: str = self._tokenizer.apply_chat_template(
                    [{"role": _ROLES[turn.role], "content": turn.text} for turn in candidate],
                    tokenize=False,
                    add_generation_prompt=True,
                )
            except MemoryError:
                raise
            except Exception:  # templates raise any kind of error
                continue
            if all(_PLACEHOLDER.format(number) in text for number in range(len(roles))):
                return text
        raise ModelUnavailable(
            "The tokenizer's chat template fails, or does not support these turns.",
            where=f"the chat template in {self._folder}",
            next_step='set prompt.format = "literal", or fix the chat template',
        )

    def _cut(self, text: str) -> tuple[_Piece, ...]:
        """Split a layout at its control tokens, encode the constant parts, and ensure exactly one BOS."""
        self._mark_controls(lambda token: token.strip() and token in text)
        controls = set(self._controls())
        # Gemma has six thousand: a pattern of them all takes 0.3 s to compile.
        here = sorted((token for token in controls if token and token in text), key=len, reverse=True)
        # Control tokens are at the odd positions.
        parts = re.split(f"({'|'.join(map(re.escape, here))})", text) if here else [text]
        pieces: list[_Piece] = []
        ids: list[int] = []
        for at, part in enumerate(parts):
            if at % 2:
                ids.append(self._tokenizer.convert_tokens_to_ids(part))
            elif _SLOT.search(part):
                pieces.append(_Piece(ids, part))
                ids = []
            elif part:
                ids += self._plain(part)
        pieces.append(_Piece(ids, ""))
        bos = self._tokenizer.bos_token_id
        first = pieces[0].ids
        if bos is not None and first[:1] != [bos] and (self._wants_bos() or "<start_of_turn>" in controls):
            first.insert(0, bos)
        return tuple(pieces)

    def _wants_bos(self) -> bool:
        """Return whether the tokenizer itself begins a text with BOS (some Gemma files omit that setting)."""
        ids = self._tokenizer("x").input_ids
        return bool(ids) and ids[0] == self._tokenizer.bos_token_id

    # ------------------------------------------------------------------ tokens

    def _plain(self, text: str) -> list[int]:
        """Encode text in which nothing is a control token, whatever it looks like."""
        try:
            with loading(_UNUSABLE, self._folder):
                ids: list[int] = self._encode(text)
        except ModelUnavailable:
            if not is_unicode(text):  # halves of a UTF-16 pair
                raise RowError("the prompt holds signs that are not valid Unicode") from None
            raise
        return ids

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        ).input_ids
        return ids

    def _controls(self) -> Iterator[str]:
        added = self._tokenizer.added_tokens_decoder
        return (token.content for token in added.values() if token.special)

    def _mark_controls(self, is_control: Callable[[str], object]) -> None:
        """Make control tokens special that a conversion marked as ordinary text, so that cells cannot spell them."""
        from tokenizers import AddedToken

        added = self._tokenizer.added_tokens_decoder.values()
        wrong = [token.content for token in added if not token.special and is_control(token.content)]
        if wrong:
            self._tokenizer.backend_tokenizer.add_special_tokens(
                [AddedToken(content, special=True, normalized=False) for content in wrong]
            )

    # ------------------------------------------------------------------ shared prefix

    def _prefix_key(self, roles: tuple[str, ...], texts: Sequence[str], messages: Messages) -> Any:
        return (roles, *texts[:-1], texts[-1][: messages.literal_chars])

    def _shared(self, before: list[int], piece: str, texts: Sequence[str], messages: Messages, last: int) -> int:
        """Return how many leading ids all rows of the template share: up to a boundary that no cell can change."""
        key = self._prefix_key(tuple(turn.role for turn in messages.turns), texts, messages)
        if key not in self._prefixes:
            start = piece.index(f"\ue000{last}\ue001")
            head = _SLOT.sub(lambda slot: texts[int(slot[1])], piece[:start])
            cut = self._safe_cut(head + texts[last][: messages.literal_chars])
            self._prefixes[key] = before + self._plain(cut) if cut else []
        return len(self._prefixes[key])

    def _safe_cut(self, text: str) -> str:
        """Return the longest beginning of `text` that is tokenised the same whatever follows.

        A blank between two words is such a boundary if no token of the vocabulary contains that letter next to a blank:
        merges only produce tokens of the vocabulary, so none can cross it.
        """
        for at in range(len(text) - 2, 0, -1):
            before = text[at - 1]
            between_words = text[at] == " " and before.isascii() and before.isalpha() and text[at + 1].isalpha()
            if between_words and before + self._blank not in self._vocabulary:
                return text[:at]
        return ""


def _gemma(roles: Sequence[str]) -> str:
    """Lay turns out as in Gemma 3's training: no system role, its text precedes the first user turn."""
    turns = [Turn(role, _PLACEHOLDER.format(number)) for number, role in enumerate(roles)]  # type: ignore[arg-type]
    laid = "".join(f"<start_of_turn>{turn.role}\n{turn.text}<end_of_turn>\n" for turn in _system_in_front(turns))
    return laid + "<start_of_turn>model\n"


def _literal(roles: Sequence[str]) -> str:
    """Lay turns out exactly as in the guide: a system turn, line feeds before each end of turn.

    With a system turn the guide leaves an empty line after the last "model".
    """
    laid = "".join(
        f"<start_of_turn>{role}\n{_PLACEHOLDER.format(number)}\n<end_of_turn>\n" for number, role in enumerate(roles)
    )
    return laid + "<start_of_turn>model\n" + ("\n" if "system" in roles else "")


def _system_in_front(turns: Sequence[Turn]) -> list[Turn]:
    if len(turns) < 2 or turns[0].role != "system":
        return list(turns)
    return [Turn("user", f"{turns[0].text}\n\n{turns[1].text}"), *turns[2:]]
