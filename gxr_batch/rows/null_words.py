"""Words that tables hold for a missing value (NA, -, unknown): counted in the columns of prompts, or made missing.

A word counts only if it is the whole cell; blanks around it, a full stop and capitals do not matter. These words are
the only text of a cell that a message may show. The same pass counts zeros in columns that a template tests for truth,
and lists and objects that are written as text.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from gxr_batch.cells import is_bytes, quoted
from gxr_batch.rows.columns import FieldMap, counted
from gxr_batch.rows.parquet_tables import is_text, without

# Each word as messages show it; cells are compared in lower case.
_SHOWN = (
    "NA", "N/A", "n.a.", "#N/A", "#NA", "<NA>", "nan", "NaT", "None", "null", "(null)", "nil", r"\N", ".", "-", "--",
    "---", "?", "unknown", "unk",
)  # fmt: skip
NULL_WORDS = {word.lower(): word for word in _SHOWN}
# "None." is how reports end a field; templates take the full stop off anyway.
NULL_WORDS |= {f"{word.lower()}.": word for word in _SHOWN if word[-1].isalpha()}
_FALSE_WORDS = frozenset({"0", "0.0", "0.00", "false", "no"})
_LONGEST = 16  # bytes, blanks included; longer cells are not looked at
_NAMED = 3  # words that a notice names for each column

# A list with at least one quoted item, as Python and as JSON write it: quote -> pattern.
_WRITTEN_LISTS = {quote: rf"(?s)^\s*\[\s*{quote}.*{quote}\s*\]\s*$" for quote in ("'", '"')}
# An object with a quoted first key, or a list of such objects.
_WRITTEN_OBJECT = r"""(?s)^\[?\s*\{\s*(?:'[^']*'|"[^"]*")\s*:.*\}\s*\]?\s*$"""


def is_null_word(text: str) -> bool:
    """Return whether a text is a word for a missing value, and nothing else."""
    return text.strip().lower() in NULL_WORDS


class WordCount:
    """Counts the words for missing values in the columns that prompts use, batch by batch.

    With `clears`, cells of all columns that are such a word become null instead.
    """

    def __init__(self, fields: FieldMap, *, clears: bool) -> None:
        self._fields, self._clears = fields, clears
        self._counted = dict.fromkeys(fields.columns[field] for field in fields.used())
        self._tested = {fields.columns[field] for field in fields.tested if field in fields.columns}
        self._words: dict[str, Counter[str]] = defaultdict(Counter)
        self._zeros: Counter[str] = Counter()
        self._lists: dict[str, Counter[str]] = defaultdict(Counter)
        self._objects: Counter[str] = Counter()

    def look(self, table: pa.Table) -> pa.Table:
        """Return a batch of rows, with the words as null if they count as missing; count what prompts use."""
        for place, name in enumerate(table.column_names):
            used = name in self._counted
            if not (used or self._clears):
                continue
            column = table[name]
            if used and is_text(column.type):
                self._lists[name].update(_written_lists(column))
                self._objects[name] += _written_objects(column)
            if (found := _short_words(column)) is None:
                continue
            if name in self._tested:
                self._zeros[name] += sum(number for word, number in found.items() if _plain(word) in _FALSE_WORDS)
            words = {word: number for word, number in found.items() if _plain(word) in NULL_WORDS}
            if self._clears and words:
                values = pa.array(list(words), pa.string())
                chunks = [without(chunk, values) for chunk in column.chunks]
                table = table.set_column(place, table.schema.field(place), pa.chunked_array(chunks, column.type))
            elif used:
                for word, number in words.items():
                    self._words[name][NULL_WORDS[_plain(word)]] += number
        return table

    def notices(self) -> Iterator[str]:
        """Yield notices about the words of the whole table."""
        seen = {name: words for name, words in self._words.items() if words}
        if seen:
            listed = "; ".join(
                f"{quoted(name)} {words.total():,} ({_most(words)})" for name, words in sorted(seen.items())
            )
            yield (
                f"cells that hold only a word for a missing value are text in prompts: {listed}; "
                'input.null_values = "common" makes them missing'
            )
        for name, quotes in sorted(self._lists.items()):
            if quotes:
                field = next(field for field in self._fields.used() if self._fields.columns[field] == name)
                yield (
                    f"column {quoted(name)} is text, and {counted(quotes.total(), 'cell')} of it hold a list with "
                    "brackets and "
                    "quotes, which appear in prompts; your own template can leave them out: "
                    + _without_marks(field, max(quotes, key=quotes.__getitem__))
                )
        for name, number in sorted(self._objects.items()):
            if number:
                yield (
                    f"column {quoted(name)} is text, and {counted(number, 'cell')} of it hold an object with braces "
                    "and quotes, which appear in prompts; save its parts as columns and map the field to one of them"
                )
        for field in sorted(self._fields.required):
            words = seen.get(self._fields.columns.get(field, ""))
            if words:
                yield (
                    f"WARNING: {field} is required, and in {counted(words.total(), 'row')} it is only such a word "
                    f'({_most(words)}), which the model would get; with input.null_values = "common" these rows fail'
                )
        for name, number in sorted(self._zeros.items()):
            if number:
                yield (
                    f"column {quoted(name)} is text, and {counted(number, 'cell')} of it mean zero or false, which "
                    "counts as "
                    f"true in a condition of the template; write {_field_of(self._fields, name)} | number"
                )


def words_in(column: pa.ChunkedArray) -> dict[str, int]:
    """Return how many cells of a column hold only a word for a missing value, by the word as messages show it."""
    found: Counter[str] = Counter()
    for text, number in (_short_words(column) or {}).items():
        if is_null_word(text):
            found[NULL_WORDS[_plain(text)]] += number
    return {word: found[word] for word in _SHOWN if found[word]}


def _written_lists(column: pa.ChunkedArray) -> dict[str, int]:
    """Count the cells of a text column that are a list as Python or JSON writes it, by the quote around items."""
    bracketed = column.filter(pc.starts_with(column, "["))
    if not len(bracketed):
        return {}
    found = {quote: pc.sum(pc.match_substring_regex(bracketed, lists)) for quote, lists in _WRITTEN_LISTS.items()}
    return {quote: number.as_py() for quote, number in found.items() if number.as_py()}


def _written_objects(column: pa.ChunkedArray) -> int:
    """Count the cells of a text column that are an object, or a list of objects, as Python or JSON writes it."""
    begun = column.filter(pc.or_(pc.starts_with(column, "{"), pc.starts_with(column, "[")))
    return pc.sum(pc.match_substring_regex(begun, _WRITTEN_OBJECT)).as_py() or 0


def _without_marks(field: str, quote: str) -> str:
    other = '"' if quote == "'" else "'"
    between = f"{other}{quote}, {quote}{other}"
    return f'{{{{ {field}[2:-2] | replace({between}, "; ") }}}}'


def _field_of(fields: FieldMap, column: str) -> str:
    return next(field for field in sorted(fields.tested) if fields.columns.get(field) == column)


def _most(words: Counter[str]) -> str:
    more = ", ..." if len(words) > _NAMED else ""
    return ", ".join(f"{word} {number:,}" for word, number in words.most_common(_NAMED)) + more


def _plain(text: str) -> str:
    return text.strip().lower()


def _short_words(column: pa.ChunkedArray) -> dict[str, int] | None:
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


_ASKED = pa.array([*NULL_WORDS, *_FALSE_WORDS], pa.string())
