"""Notices about cells that may not be what they seem: words for a missing value, zeros as text, lists written as text.

Only columns that prompts use are counted, in the pass that copies the table. Cells are never shown, except the words
for a missing value.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from gxr_batch.cells import is_text, quoted
from gxr_batch.rows.columns import FieldMap, counted
from gxr_batch.rows.null_words import FALSE_WORDS, NULL_WORDS, plain, short_words, without

_NAMED = 3  # words that a notice names for each column

# A list with at least one quoted item, as Python and as JSON write it: quote -> pattern.
_WRITTEN_LISTS = {quote: rf"(?s)^\s*\[\s*{quote}.*{quote}\s*\]\s*$" for quote in ("'", '"')}
# An object with a quoted first key, or a list of such objects.
_WRITTEN_OBJECT = r"""(?s)^\[?\s*\{\s*(?:'[^']*'|"[^"]*")\s*:.*\}\s*\]?\s*$"""


class DoubtfulCells:
    """Counts doubtful cells in the columns that prompts use, batch by batch.

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
            if (found := short_words(column)) is None:
                continue
            if name in self._tested:
                self._zeros[name] += sum(number for word, number in found.items() if plain(word) in FALSE_WORDS)
            words = {word: number for word, number in found.items() if plain(word) in NULL_WORDS}
            if self._clears and words:
                values = pa.array(list(words), pa.string())
                chunks = [without(chunk, values) for chunk in column.chunks]
                table = table.set_column(place, table.schema.field(place), pa.chunked_array(chunks, column.type))
            elif used:
                for word, number in words.items():
                    self._words[name][NULL_WORDS[plain(word)]] += number
        return table

    def notices(self) -> Iterator[str]:
        """Yield notices about the cells of the whole table."""
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
                    "brackets and quotes, which appear in prompts; your own template can leave them out: "
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
                    f"counts as true in a condition of the template; write {_field_of(self._fields, name)} | number"
                )


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
