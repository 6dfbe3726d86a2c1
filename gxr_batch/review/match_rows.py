"""Finds the case of a sheet's row whose id does not lead to its text, or the reason why there is none without doubt.

A spreadsheet that opens a CSV file turns ids into numbers: leading zeros and digits are lost. Such a row is matched by
prompt hash and text, if its id is one that the spreadsheet could have made. A column that was sorted alone leaves rows
with the id, text or prompt hash of other rows: these are refused. If id, text and hash agree, nothing is changed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from decimal import ROUND_DOWN, ROUND_HALF_EVEN, Context, Decimal, InvalidOperation
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from gxr_batch.records import Key
from gxr_batch.review.parse_row import Generated, lost_letters, same_text, shown_forms
from gxr_batch.review.row_text import InvalidRow, squeezed

# A spreadsheet shows numbers of more digits than this rounded.
_MOST_DIGITS = 11
# As spreadsheets show numbers and dates: 1,2E+10, 02.01.2026, 2-Jan, Jan 26.
_NUMBER_OR_DATE = re.compile(r"[\d.,:/ +E-]*\d[\d.,:/ +E-]*|\d{1,2}[-. ]+[^\W\d]{3,}|[^\W\d]{3,}[-. ]+\d{2,4}")
COLUMNS = ("gxr_row_id", "gxr_sample", "gxr_status", "gxr_text", "gxr_prompt_sha256", "gxr_attempt")


class Case(NamedTuple):
    """A generated row of the run."""

    key: Key
    generated: Generated


def cases(table: pa.Table) -> Iterable[Case]:
    """Yield the rows of a table of results."""
    for row_id, sample, *rest in zip(*(table[name].to_pylist() for name in COLUMNS), strict=True):
        yield Case(Key(row_id, sample), Generated(*rest))


def leads_to_its_text(generated: Generated | None, cells: Mapping[str, Any]) -> bool:
    """Return whether text and prompt hash of a row are those of its id, or nothing can be compared."""
    if generated is None:
        return False
    if generated.text is None or "gxr_text" not in cells:
        return True
    return _hash(cells) in {"", generated.prompt_sha256} and same_text(generated.text, cells["gxr_text"])


class Elsewhere:
    """The cases of a run that have the texts or prompts of some rows of a sheet."""

    def __init__(self, tables: Iterable[pa.Table], rows: Sequence[Mapping[str, Any]]) -> None:
        """Look for the cases in `tables`; `rows` are the cells of the sheet's rows."""
        hashes = pa.array({_hash(cells) for cells in rows} - {""}, pa.string())
        texts = pa.array({_text(cells) for cells in rows} - {""}, pa.string())
        self._by_hash: dict[str, list[Case]] = defaultdict(list)
        self._by_text: dict[str, list[Case]] = defaultdict(list)
        for table in tables:
            shown = pc.utf8_trim_whitespace(pc.replace_substring_regex(table["gxr_text"], r"[\s\p{Z}]+", " "))
            wanted = pc.or_(pc.is_in(table["gxr_prompt_sha256"], value_set=hashes), pc.is_in(shown, value_set=texts))
            for case in cases(table.filter(wanted)):
                self._by_hash[case.generated.prompt_sha256 or ""].append(case)
                for form in shown_forms(case.generated.text or ""):
                    self._by_text[form].append(case)

    def holds(self, cells: Mapping[str, Any]) -> bool:
        """Return whether a row shows the text of some case."""
        return _text(cells) in self._by_text

    def place(self, key: Key, generated: Generated | None, cells: Mapping[str, Any]) -> Case | None:
        """Return the case that a row is about if it is another one than its id names, None to leave it as it is.

        `generated` is what the run has for `key`. Raises InvalidRow if the row has parts of different cases.
        """
        hashed, shown = _hash(cells), _text(cells)
        of_hash = self._by_hash.get(hashed, []) if hashed else []
        of_text = self._by_text.get(shown, []) if shown else []
        whole = [case for case in of_text if case in of_hash] if hashed else of_text
        lost = [case for case in of_hash if lost_letters(case.generated.text or "", cells.get("gxr_text"))]
        possible = [case for case in whole or lost if case.key.sample == key.sample]
        changed = [case for case in possible if may_show(key.row_id, case.key.row_id)]
        if len(changed) == 1:
            return changed[0]
        if changed:
            raise InvalidRow("gxr_row_id was changed by a spreadsheet, and several rows have this text; restore the id")
        if generated is None and possible and _NUMBER_OR_DATE.fullmatch(key.row_id.strip()):
            raise InvalidRow(
                "gxr_row_id is not in this run, but the text is: a spreadsheet changed the id, e.g. into a date, or a "
                "column was sorted alone; restore the column"
            )
        if generated is not None:
            _refuse_moved(generated, cells, of_hash, of_text)
        return None


def _refuse_moved(generated: Generated, cells: Mapping[str, Any], of_hash: list[Case], of_text: list[Case]) -> None:
    """Raise InvalidRow if text or prompt hash of a row are those of another row than its id."""
    own_text = same_text(generated.text or "", cells.get("gxr_text"))
    own_hash = _hash(cells) in {"", generated.prompt_sha256}
    other_text, other_hash = bool(of_text) and not own_text, bool(of_hash) and not own_hash
    if other_text and other_hash:
        together = any(case in of_hash for case in of_text)
        column = "gxr_row_id" if together else "gxr_row_id, gxr_text or gxr_prompt_sha256"
    elif other_text:
        column = "gxr_text"
    elif other_hash and own_text:
        column = "gxr_prompt_sha256"
    else:
        return
    raise InvalidRow(f"{column} is that of another row, as if a column was sorted alone; restore it, or export again")


def may_show(shown: str, row_id: str) -> bool:
    """Return whether a spreadsheet may show an id in this way: as a number, without its zeros, or rounded."""
    try:
        number, exact = Decimal(shown.strip().replace(",", ".")), Decimal(row_id.strip())
    except InvalidOperation:
        return False
    if not (number.is_finite() and exact.is_finite()) or shown.strip() == row_id:
        return False
    if number == exact:
        return True
    if len(re.sub(r"\D", "", row_id).lstrip("0")) <= _MOST_DIGITS:
        return False
    digits = len(number.normalize().as_tuple().digits)
    return any(
        Context(prec=digits, rounding=rounding).plus(exact) == number for rounding in (ROUND_HALF_EVEN, ROUND_DOWN)
    )


def _hash(cells: Mapping[str, Any]) -> str:
    value = cells.get("gxr_prompt_sha256")
    return "" if value is None else str(value).strip()


def _text(cells: Mapping[str, Any]) -> str:
    return squeezed(str(cells.get("gxr_text") or ""))
