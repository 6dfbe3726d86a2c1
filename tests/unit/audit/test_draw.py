"""Which rows are drawn: at random, the same every time, and in continuation of what was drawn before."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pytest

from gxr_batch.audit.draw import FLAGGED, PLAIN, draw, frame_of, shares
from gxr_batch.errors import RunError


def table(rows: int, first: int = 0) -> pa.Table:
    numbers = range(first, first + rows)
    return pa.table(
        {
            "gxr_row_id": [f"{number:04d}" for number in numbers],
            "gxr_sample": pa.array([1] * rows, pa.int32()),
            "gxr_text": [f"text {number}" for number in numbers],
            "gxr_prompt_sha256": ["p"] * rows,
            "gxr_flags": pa.array(
                [["refusal"] if not number % 5 else ["stale_review"] for number in numbers], pa.list_(pa.string())
            ),
            "gxr_template": ["a" if number % 2 else "b" for number in numbers],
            "gxr_status": ["failed" if not number % 10 else "ok" for number in numbers],
        }
    )


def drawn(count, *, by=None, seed=0, before=None, readers=1, overlap=0, tables=None):
    frame = frame_of(tables or [table(500), table(500, 500)], by, seed, count + max((before or {"": 0}).values()))
    return draw(frame, count, readers=readers, overlap=overlap, seed=seed, before=before or {})


def test_a_draw_is_the_same_every_time_whatever_the_order_of_the_rows():
    rows = drawn(50)
    assert rows == drawn(50, tables=[table(1000)])
    assert {row.key for row in rows} != {row.key for row in drawn(50, seed=1)}
    assert len({row.key for row in rows}) == 50
    assert all(int(row.key.row_id) % 10 for row in rows), "failed rows have no text"


def test_later_draws_continue_the_first():
    first, whole = drawn(40, by="flags"), drawn(900, by="flags")
    before = Counter(row.stratum for row in first)
    second = drawn(860, by="flags", before=before)
    assert {row.key for row in first} | {row.key for row in second} == {row.key for row in whole}
    with pytest.raises(RunError, match="Only 860 generated rows"):
        drawn(861, by="flags", before=before)


def test_strata_are_drawn_in_proportion_but_no_stratum_is_forgotten():
    rows = Counter(row.stratum for row in drawn(300, by="flags"))
    assert rows == {PLAIN: 250, FLAGGED: 50}
    assert shares({"a": 5, "b": 1000, "c": 0}, 100) == {"a": 5, "b": 95}
    assert shares({"a": 10, "b": 10}, 3) == {"a": 2, "b": 1}
    assert {row.stratum for row in drawn(20, by="template")} == {"a", "b"}


def test_readers_share_the_first_rows_and_divide_the_rest():
    rows = drawn(50, readers=3, overlap=8)
    assert [row.readers for row in rows[:9]] == [(1, 2, 3)] * 8 + [(1,)]
    assert Counter(reader for row in rows for reader in row.readers) == {1: 22, 2: 22, 3: 22}


def test_every_row_is_drawn_as_often_as_any_other():
    times = Counter(row.key for seed in range(400) for row in drawn(90, seed=seed, tables=[table(1000)]))
    assert len(times) == 900
    assert 15 < min(times.values()) < 40 < max(times.values()) < 75, "40 on average"


def test_the_rows_read_first_are_of_every_stratum_even_of_one_that_is_drawn_whole():
    tables = [table(5000)]
    frame = frame_of(tables, "flags", 0, 1200)
    small = {**frame.rows, FLAGGED: 40}  # drawn whole, of thousands of other rows
    cut = frame._replace(rows=small, first={**frame.first, FLAGGED: sorted(frame.first[FLAGGED])[:40]})
    rows = draw(cut, 200, readers=2, overlap=100, seed=0, before={})
    whole = Counter(row.stratum for row in rows)
    first = Counter(row.stratum for row in rows[:100])
    assert whole[FLAGGED] >= 30
    assert whole[FLAGGED] / 4 < first[FLAGGED] < whole[FLAGGED] * 3 / 4
