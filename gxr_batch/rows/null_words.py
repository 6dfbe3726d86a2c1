"""Words that tables hold for a missing value (NA, -, unknown), and cells made missing.

A word counts only if it is the whole cell; blanks around it, a full stop and capitals do not matter. These words are
the only text of a cell that a message may show.
"""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from gxr_batch.cells import is_bytes, is_text

# Each word as messages show it; cells are compared in lower case.
_SHOWN = (
    "NA", "N/A", "n.a.", "#N/A", "#NA", "<NA>", "nan", "NaT", "None", "null", "(null)", "nil", r"\N", ".", "-", "--",
    "---", "?", "unknown", "unk",
)  # fmt: skip
NULL_WORDS = {word.lower(): word for word in _SHOWN}
# "None." is how reports end a field; templates take the full stop off anyway.
NULL_WORDS |= {f"{word.lower()}.": word for word in _SHOWN if word[-1].isalpha()}
# Text that means false, and is true in a condition of a template.
FALSE_WORDS = frozenset({"0", "0.0", "0.00", "false", "no"})
_LONGEST = 16  # bytes, blanks included; longer cells are not looked at


def is_null_word(text: str) -> bool:
    """Return whether a text is a word for a missing value, and nothing else."""
    return text.strip().lower() in NULL_WORDS


def words_in(column: pa.ChunkedArray) -> dict[str, int]:
    """Return how many cells of a column hold only a word for a missing value, by the word as messages show it."""
    found: Counter[str] = Counter()
    for text, number in (short_words(column) or {}).items():
        if is_null_word(text):
            found[NULL_WORDS[plain(text)]] += number
    return {word: found[word] for word in _SHOWN if found[word]}


def without(column: pa.Array, words: pa.Array) -> pa.Array:
    """Return the column with cells that are one of `words` as null if it holds text, else unchanged."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        if not (is_text(kind.value_type) or is_bytes(kind.value_type)):
            return column
        gone = pc.is_in(_binary(column.dictionary_decode()), value_set=words.cast(pa.binary()))
        indices = pc.if_else(gone, None, column.indices)
        return pa.DictionaryArray.from_arrays(indices, column.dictionary, ordered=kind.ordered)
    if not (is_text(kind) or is_bytes(kind)):
        return column
    gone = pc.is_in(_binary(column), value_set=words.cast(pa.binary()))
    return pc.if_else(gone, pa.scalar(None, kind), column)


def _binary(column: pa.Array) -> pa.Array:
    """Return text or bytes as bytes without the zeros that fill a fixed width."""
    if not pa.types.is_fixed_size_binary(column.type):
        return column.cast(pa.binary())
    return pa.array([None if cell is None else cell.rstrip(b"\0") for cell in column.to_pylist()], pa.binary())


def plain(text: str) -> str:
    """Return a text as the words are compared."""
    return text.strip().lower()


def short_words(column: pa.ChunkedArray) -> dict[str, int] | None:
    """Return how often each short text occurs that may be one of the words; None if the column is not text."""
    kind = column.type
    if pa.types.is_dictionary(kind) and (is_text(kind.value_type) or is_bytes(kind.value_type)):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_fixed_size_binary(kind):
        column, kind = column.cast(pa.binary()), pa.binary()
    if not (is_text(kind) or is_bytes(kind)):
        return None
    short = column.filter(pc.less_equal(pc.binary_length(column), _LONGEST))
    if not len(short):
        return {}
    try:
        texts = pc.utf8_rtrim(short.cast(pa.string()), "\0")  # zeros fill a fixed width
    except pa.ArrowInvalid:  # bytes that are no text
        return None
    plain = pc.utf8_lower(pc.utf8_trim_whitespace(texts))
    hits = texts.filter(pc.is_in(plain, value_set=_ASKED))
    return {one["values"]: one["counts"] for one in pc.value_counts(hits).to_pylist()}


_ASKED = pa.array([*NULL_WORDS, *FALSE_WORDS], pa.string())
