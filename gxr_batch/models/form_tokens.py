"""A form as tokens: which ids a row may draw next, what is written for it, and when each section ends.

llguidance turns the content of a section into the ids that may follow. Of a heading each id is the only one allowed,
which costs a step of the row: a call for a few rows alone would read all weights again. A section ends with the
blank line that the model draws after it, which its end token counts as, or at the section's token limit; a row always
has the tokens for the headings and sections that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import llguidance.hf
import llguidance.numpy
import numpy as np
import numpy.typing as npt
import torch
from llguidance import LLExecutor, LLMatcher

from gxr_batch.errors import ModelUnavailable
from gxr_batch.forms import Form, Part, composed, form_of, parts_of
from gxr_batch.forms.layout import SEPARATOR
from gxr_batch.forms.limits import least_of_part, least_tokens
from gxr_batch.job import Job

Masks = npt.NDArray[np.int32]
# A character of four bytes may be as many tokens; none is begun that the limit would cut.
_BYTES = 4
# What may follow a section's opening. Masks of states in which all ids without a line feed may follow are computed
# hundred times faster than others, so that beyond the first token of a section little is asked.
_ANY = r"[^\x00-\x1f\x7f]"  # no control characters, which no spreadsheet takes
_FIRST = r"[^\s\x00-\x1f\x7f]"
_CONTENT = {
    "text": rf" {_FIRST}({_ANY}|\n{_ANY})*",
    "line": rf" {_FIRST}{_ANY}*",
    "bullets": rf" {_FIRST}{_ANY}*(\n-{_ANY}+)*",
    "number": r" [0-9]{1,6}(\.[0-9]{1,3})?",
}
NO_ID = -1
_PIECE = 8  # rows


class Allowed(NamedTuple):
    """What rows may draw next.

    `masks` [rows, ceil(vocab / 32)] int32: id i is bit i % 32 of word i // 32. `closing` [rows] int64 is the id to
    which the probability of the end tokens goes, NO_ID where they may be drawn or nothing may end.
    """

    masks: Masks
    closing: npt.NDArray[np.int64]

    def spread(self, places: Sequence[int], rows: int) -> Allowed:
        """Return the same for rows at these places of `rows`; the others may draw anything."""
        masks, closing = np.full((rows, self.masks.shape[1]), -1, np.int32), np.full(rows, NO_ID)
        masks[places], closing[places] = self.masks, self.closing
        return Allowed(masks, closing)


class FormTokens:
    """A form for one tokenizer (a fast one of transformers) and a model with `vocab` ids.

    Raises ModelUnavailable if the tokenizer cannot write the form's headings.
    """

    def __init__(self, form: Form, tokenizer: Any, end_ids: frozenset[int], vocab: int) -> None:
        self.form, self.end_ids = form, end_ids
        self._words = -(-vocab // 32)
        try:
            self._guide = llguidance.hf.from_tokenizer(tokenizer, n_vocab=max(vocab, len(tokenizer)))
        except (ValueError, TypeError, AttributeError) as error:
            raise ModelUnavailable(
                f"Texts of this model cannot be held to a form: its tokenizer is of a kind unknown to llguidance "
                f"({type(error).__name__}).",
                where="[form]",
                next_step="remove [form], or use another model",
            ) from None
        self._executor = LLExecutor()
        self.separator = self._guide.tokenize_str(SEPARATOR)
        self.line_end = self._guide.tokenize_str("\n")
        self.openings = [self._guide.tokenize_str(part.opening) for part in form.parts]
        self._check(tokenizer)
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._never = ~_bits(special | {*tokenizer.all_special_ids} | end_ids, self._words)
        self._ends = _bits(end_ids, self._words)
        self._whole = ~_bits((id for id in range(vocab) if self._begins_a_character(id)), self._words)
        self._starts = [self._matcher(part) for part in form.parts]
        self._first = self._filled(self._starts)
        self._cost = max(len(self.separator), len(self.line_end))

    def _check(self, tokenizer: Any) -> None:
        """Raise ModelUnavailable unless the headings come out of this tokenizer as they are written."""
        contents = [_EXAMPLES.get(part.kind, part.choices[0] if part.choices else "x") for part in self.form.parts]
        text = composed(self.form, contents)
        rest = text
        ids: list[int] = []
        for part, opening in zip(self.form.parts, self.openings, strict=True):
            content = rest.removeprefix(part.opening).partition(SEPARATOR)[0]
            rest = rest[len(part.opening) + len(content) + len(SEPARATOR) :]
            ids += [*opening, *self._guide.tokenize_str(content), *(self.separator if rest else ())]
        if parts_of(self.form, tokenizer.decode(ids, skip_special_tokens=True)) != parts_of(self.form, text):
            raise ModelUnavailable(
                "The model's tokenizer cannot write the headings of the form.",
                where="[form]",
                next_step="use headings with common letters, or remove [form]",
            )

    def _matcher(self, part: Part) -> LLMatcher:
        """Return a matcher at the beginning of a section."""
        choices = "|".join(map(_escaped, part.choices))
        content = f" ({choices})" if part.kind == "choice" else _CONTENT[part.kind]
        matcher = LLMatcher(self._guide, LLMatcher.grammar_from_regex(f"({content})\n\n"))
        if matcher.is_error():
            raise RuntimeError(f"llguidance refuses the content of a section: {part.kind}")
        return matcher

    def _begins_a_character(self, id: int) -> bool:
        """Return whether a token begins a character that it does not end."""
        text = self.text(id)
        if text.isascii():
            return False
        for back, byte in enumerate(reversed(text[-_BYTES:]), start=1):
            if byte >= 0xC0:
                return back < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
            if byte < 0x80:
                break
        return False

    @property
    def least_tokens(self) -> int:
        """The fewest tokens of a text that holds every heading and a few tokens of each section."""
        return least_tokens(self.form, [len(opening) for opening in self.openings], self._cost)

    def _reserved(self, part: int) -> int:
        """Return the fewest tokens from the content of a section to the end, without the end token."""
        return self._headings(part) + sum(map(least_of_part, self.form.parts[part:]))

    def _headings(self, part: int) -> int:
        """Return the tokens of the headings after a section, with the blank lines before them."""
        return sum(len(opening) + self._cost for opening in self.openings[part + 1 :])

    def limit(self, part: int, left: int) -> int:
        """Return the token limit of a section when the text may have `left` more tokens.

        A section without its own limit gets a share of what the headings and limits after it leave (`Form.version`).
        """
        left -= 1  # the end token
        own, after = self.form.parts[part], self.form.parts[part + 1 :]
        most = left - self._reserved(part) + least_of_part(own)
        if own.kind in {"choice", "number"}:
            return least_of_part(own)
        if own.max_tokens is not None:
            return min(own.max_tokens, most)
        left -= self._headings(part)
        whole = [least_of_part(one) for one in after if one.kind in {"choice", "number"}]
        cut = [one.max_tokens for one in after if one.kind not in {"choice", "number"}]
        equal = (left - sum(whole)) // (1 + len(cut))
        given = sum(min(tokens, equal) for tokens in cut if tokens is not None)
        left -= sum(whole) + given
        others = cut.count(None)
        share = left // (1 + others)
        if self.form.version > 1:
            share += min(share // 2, others * share // 4)
        return min(max(share, least_of_part(own)), most)

    def start(self, part: int) -> LLMatcher:
        """Return a matcher at the beginning of a section."""
        return self._starts[part].deep_copy()

    def row(self, max_new_tokens: int, *, opened: bool = True) -> FormRow:
        """Return the state of a new row of at least `least_tokens`.

        Its text begins with the ids of the first opening; if it is not `opened`, these are the first to be drawn.
        """
        row = FormRow(self, max_new_tokens)
        row.forced = [] if opened else list(self.openings[0])
        return row

    def text(self, id: int) -> bytes:
        """Return the text of a token."""
        return bytes(self._guide.decode_bytes([id]))

    def allowed(self, rows: Sequence[FormRow]) -> Allowed:
        """Return what each row may draw next."""
        masks = self._first[[row.part for row in rows]]
        begun = [at for at, row in enumerate(rows) if row.begun and not row.forced]
        masks[begun] = self._filled([rows[at].matcher for at in begun])
        masks &= self._never
        short = [at for at, row in enumerate(rows) if row.left < _BYTES and not row.is_choice]
        masks[short] &= self._whole
        closing = np.full(len(rows), NO_ID)
        for at, row in enumerate(rows):
            id = row.closing_id
            if row.forced:
                masks[at] = _bits(row.forced[:1], self._words)
            elif masks[at, id // 32] >> (id % 32) & 1:
                if row.is_last:
                    masks[at] |= self._ends
                else:
                    closing[at] = id
        return Allowed(masks, closing)

    def _filled(self, matchers: Sequence[LLMatcher]) -> Masks:
        found = llguidance.numpy.allocate_token_bitmask(len(matchers), self._guide.vocab_size)
        each = [(matcher, at) for at, matcher in enumerate(matchers)]
        if each:
            llguidance.numpy.fill_next_token_bitmask_par(self._executor, each, found)
        return found[:, : self._words]

    def hold(self, logits: torch.Tensor, allowed: Allowed, write: Forbid | None = None) -> None:
        """Change logits [rows, vocab] so that each row can only draw what it may: -inf for any other id.

        Where an end token would come too early, its probability goes to the blank line that ends a section. `write`
        is a faster way to set the -inf than `forbid`.
        """
        with torch.inference_mode():
            self._hold(logits, allowed, write or forbid)

    def _hold(self, logits: torch.Tensor, allowed: Allowed, write: Forbid) -> None:
        early = [at for at, id in enumerate(allowed.closing.tolist()) if id != NO_ID]
        if early:
            ids = torch.from_numpy(
                np.concatenate([early, allowed.closing[early], sorted(self.end_ids)]).astype(np.int64)
            )
            if logits.device.type == "cuda":
                ids = ids.pin_memory()  # else the copy would wait until the device has computed the logits
            ids = ids.to(logits.device, non_blocking=True)
            at, to, ends = torch.split(ids, [len(early), len(early), len(self.end_ids)])
            both = torch.cat([logits[at, to].float()[:, None], logits[at[:, None], ends].float()], dim=1)
            logits[at, to] = both.logsumexp(dim=1).to(logits.dtype)
        write(logits, allowed.masks)


Forbid = Callable[[torch.Tensor, Masks], None]


def forbid(logits: torch.Tensor, masks: Masks) -> None:
    """Set the logits [rows, vocab] of ids that are not in the masks to -inf.

    llguidance's own function is compiled by torch when it is first called, which takes a C++ compiler and seconds.
    """
    if logits.device.type == "cpu":
        bits = np.unpackbits(masks.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little")
        logits.masked_fill_(torch.from_numpy(bits == 0), -torch.inf)
        return
    _forbid_in_pieces(logits, torch.from_numpy(masks).to(logits.device))


def _forbid_in_pieces(logits: torch.Tensor, words: torch.Tensor) -> None:
    """Do the same with torch's operations, a few rows at a time: bits take a hundred times the memory of the masks."""
    rows, vocab = logits.shape
    each = torch.arange(32, dtype=torch.int32, device=logits.device)
    for first in range(0, rows, _PIECE):
        piece = slice(first, first + _PIECE)
        kept = ((words[piece, :, None] >> each) & 1).bool().flatten(1)[:, :vocab]
        logits[piece].masked_fill_(~kept, -torch.inf)


class FormRow:
    """Where a row is in its form, before its next token.

    `used` counts the tokens of its text, `left` those that the section may still have, `forced` are ids that come next
    whatever the model makes of it. `cut` are the sections that their limit ended; `begun` is False until the section
    has a token.
    """

    def __init__(self, tokens: FormTokens, max_new_tokens: int) -> None:
        self.tokens, self._max_new_tokens = tokens, max_new_tokens
        self.used = self.left = 0
        self.forced: list[int] = []
        self.cut: tuple[int, ...] = ()
        self._open(0)

    @property
    def is_last(self) -> bool:
        """Whether the section is the last one."""
        return self.part + 1 == len(self.tokens.form.parts)

    @property
    def is_choice(self) -> bool:
        """Whether the section is a choice, whose limit counts its bytes."""
        return self.tokens.form.parts[self.part].kind == "choice"

    @property
    def closing_id(self) -> int:
        """The id with which the blank line after the section begins."""
        return self._blank[0]

    @property
    def _blank(self) -> list[int]:
        """The ids of the blank line after the section, of which the first line end may be there."""
        return self.tokens.line_end if self._after_line_end else self.tokens.separator

    @property
    def finish(self) -> Literal["stop", "closed"]:
        """How the text ended, if it has: "closed" if a limit ended a section."""
        return "closed" if self.cut else "stop"

    def take(self, id: int) -> bool:
        """Add the token that was drawn; return whether the text has ended."""
        if self.forced:
            if id != self.forced.pop(0):
                raise RuntimeError("a row drew another token than the one that was forced")
            return False
        if id in self.tokens.end_ids and self.is_last:
            return True
        if not self.matcher.consume_token(id):
            raise RuntimeError("a row drew a token that its form does not allow")
        self.used, self.left, self.begun = self.used + 1, self.left - 1, True
        if self.matcher.is_stopped():
            return self._end_section([])
        self._after_line_end = self.tokens.text(id).endswith(b"\n")
        if self.is_choice and self._has_chosen(id):
            return self._end_section(self._blank)
        if self.left > 0:
            return False
        self.cut += (self.part,)
        return self._end_section(self._blank)

    def _has_chosen(self, id: int) -> bool:
        """Return whether the section is a whole choice that cannot become a longer one, after one more token."""
        self._chosen += self.tokens.text(id)
        choices = [f" {choice}".encode() for choice in self.tokens.form.parts[self.part].choices]
        return [choice for choice in choices if choice.startswith(self._chosen)] == [self._chosen]

    def _end_section(self, blank: list[int]) -> bool:
        """Open the next section, if there is one, after the ids of a blank line; return whether there is none."""
        if self.is_last:
            return True
        self.forced = [*blank, *self.tokens.openings[self.part + 1]]
        self.used += len(blank)
        self._open(self.part + 1)
        return False

    def _open(self, part: int) -> None:
        self.part, self.used = part, self.used + len(self.tokens.openings[part])
        self.matcher, self._after_line_end, self.begun = self.tokens.start(part), False, False
        self._chosen = b""
        self.left = self.tokens.limit(part, self._max_new_tokens - self.used)


_EXAMPLES: dict[str, Any] = {"number": 1.0, "bullets": ["x"]}


def _bits(ids: Any, words: int) -> Masks:
    """Return a bitmap of ids, [words]; ids beyond it are left out."""
    found = np.zeros(words, np.uint32)
    each = np.fromiter(ids, np.int64)
    each = each[each < words * 32]
    np.bitwise_or.at(found, each // 32, np.uint32(1) << (each % 32).astype(np.uint32))
    return found.view(np.int32)


def _escaped(text: str) -> str:
    """Return a regular expression for exactly this text, in the syntax of llguidance."""
    return "".join(letter if letter.isalnum() or letter == " " else f"\\x{{{ord(letter):x}}}" for letter in text)


def hold_rows(
    rows: Sequence[FormRow], logits: torch.Tensor, places: Sequence[int] | None = None, write: Forbid | None = None
) -> None:
    """Change the logits [any, vocab] so that each row can only draw what it may, as `FormTokens.hold` does.

    `places` are the rows' places in the logits if these have others too, which may draw anything.
    """
    if rows:
        tokens = rows[0].tokens
        allowed = tokens.allowed(rows)
        tokens.hold(logits, allowed if places is None else allowed.spread(places, len(logits)), write)


def form_tokens(job: Job, tokenizer: Any, end_ids: Iterable[int], vocab: int) -> FormTokens | None:
    """Return a job's form for its model's tokenizer and `vocab` ids, None without a form. Raises ModelUnavailable."""
    form = form_of(job)
    return FormTokens(form, tokenizer, frozenset(end_ids), vocab) if form else None
