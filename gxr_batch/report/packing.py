"""The cases as two blocks of text inside the page: small columns as JSON, long texts as numbers of words.

10,000 texts of a night are about 13 MB. Deflate, the one method that every browser can undo by itself, looks back 32 kB
and so sees few of them at a time; a list of the words of all texts, the most frequent first, makes up for that. Every
text is a row of numbers into that list (LEB128: seven bits a byte, the eighth says that more follow), deflated and
spelled in base 85. web/unpack.js undoes it.
"""

from __future__ import annotations

import gzip
import json
import re
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

# A word with the blank before it, a digit, or any one sign: joined they give the text back.
_PIECES = re.compile(r" ?[^\W\d_]+|.", re.DOTALL)
# The end of a cell, a cell without text, and the number of the first word.
_END, _NULL, _FIRST_WORD = 0, 1, 2
_LEB_BITS, _MOST_LEB_BYTES = 7, 4
_NUMBERS_A_STEP = 1 << 18
# The digits of base 85: none of them means anything in HTML. web/unpack.js has them too.
_DIGITS = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%:()*+-;,=.?@^_[{|}~"
_BASE = len(_DIGITS)

Numbers = npt.NDArray[np.int32]
_NONE: Numbers = np.zeros(0, np.int32)


class Block(NamedTuple):
    """Deflated bytes spelled as text that is safe inside a script element; `size` counts the deflated bytes."""

    text: str
    size: int


class Packed(NamedTuple):
    """What the page's script unpacks: a JSON object, and the long texts, row after row."""

    head: Block
    texts: Block

    @property
    def size(self) -> int:
        """How many bytes of the page it takes."""
        return len(self.head.text) + len(self.texts.text)


def pack(head: dict[str, Any], texts: Sequence[Sequence[str | None]]) -> Packed:
    """Pack `texts`, columns of one length, and `head`, to which the list of words is added.

    Row after row and not column after column: a text repeats the words of its own findings.
    """
    words = _Words()
    numbers = array("i")
    for row in zip(*texts, strict=True):
        for text in row:
            numbers.extend((_NULL,) if text is None else map(words.__getitem__, _PIECES.findall(text)))
            numbers.append(_END)
    ordered, ranked = _by_frequency(list(words), np.frombuffer(numbers, np.int32) if numbers else _NONE)
    text = json.dumps({**head, "words": ordered}, ensure_ascii=False, separators=(",", ":"))
    return Packed(_block(text.encode("utf-8", "replace")), _block(leb128(ranked)))


class _Words(dict[str, int]):
    """Numbers words as they come, from the first number that means nothing else."""

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self) + _FIRST_WORD
        return number


def _by_frequency(words: list[str], numbers: Numbers) -> tuple[list[str], Numbers]:
    """Return the words, the most frequent first, and the text in the numbers that they have then."""
    counts = np.bincount(numbers, minlength=len(words) + _FIRST_WORD)[_FIRST_WORD:]
    order = np.argsort(-counts, kind="stable")
    rank = np.arange(len(words) + _FIRST_WORD, dtype=np.int32)
    rank[order + _FIRST_WORD] = np.arange(len(words), dtype=np.int32) + _FIRST_WORD
    return [words[place] for place in order], rank[numbers]


def leb128(numbers: Numbers) -> bytes:
    """Return numbers below 2**28 as LEB128, the lowest seven bits first."""
    return b"".join(_leb128(numbers[at : at + _NUMBERS_A_STEP]) for at in range(0, len(numbers), _NUMBERS_A_STEP))


def _leb128(numbers: Numbers) -> bytes:
    shifted = np.stack([numbers >> (_LEB_BITS * place) for place in range(_MOST_LEB_BYTES)], axis=1)
    present = shifted > 0
    present[:, 0] = True
    table = (shifted & 127).astype(np.uint8)
    table[:, :-1] |= np.where(present[:, 1:], 128, 0).astype(np.uint8)
    return table[present].tobytes()


def _block(data: bytes) -> Block:
    deflated = gzip.compress(data, 9, mtime=0)
    return Block(_spelled(deflated), len(deflated))


def _spelled(data: bytes) -> str:
    """Return bytes in base 85: four bytes, filled up with zeros at the end, as five digits."""
    values = np.frombuffer(data + bytes(-len(data) % 4), ">u4").astype(np.uint32)
    digits = np.empty((len(values), 5), np.uint8)
    for place in reversed(range(5)):
        digits[:, place] = values % _BASE
        values //= _BASE
    return np.frombuffer(_DIGITS, np.uint8)[digits].tobytes().decode("ascii")


def mean_length(values: Iterable[Any]) -> float:
    """Return the mean number of characters of the texts among the values, 0 where there is none."""
    lengths = [len(value) for value in values if isinstance(value, str)]
    return sum(lengths) / len(lengths) if lengths else 0.0
