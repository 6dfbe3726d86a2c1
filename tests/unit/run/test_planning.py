"""Planning is pure: seeds, order, deadlines, the circuit breaker."""

from __future__ import annotations

import time as clock
from collections import Counter
from datetime import datetime, time

from hypothesis import given
from hypothesis import strategies as st

from gxr_batch.job.units import seconds_until
from gxr_batch.run.planning import longest_first, row_seed, too_many_failed


def test_a_row_seed_has_31_bits_and_depends_on_every_part():
    seeds = {
        row_seed(0, "a", 1, 1),
        row_seed(1, "a", 1, 1),
        row_seed(0, "b", 1, 1),
        row_seed(0, "a", 2, 1),
        row_seed(0, "a", 1, 2),
    }
    assert len(seeds) == 5
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_row_seed_never_changes_between_versions():
    # Fixed values: another one would change the texts of every run resumed after an update.
    assert row_seed(0, "TC-0001", 1, 1) == 1036588856


@given(st.lists(st.integers(0, 50)), st.integers(1, 7))
def test_longest_first_keeps_every_item_and_sorts_within_windows(items, window):
    ordered = list(longest_first(items, window, lambda item: item))
    assert Counter(ordered) == Counter(items)
    for start in range(0, len(items), window):
        assert ordered[start : start + window] == sorted(items[start : start + window], reverse=True)


def test_longest_first_reads_no_further_ahead_than_its_window():
    read = []

    def source():
        for item in range(100):
            read.append(item)
            yield item

    next(longest_first(source(), 10, lambda item: item))
    assert len(read) == 10


def test_seconds_until_the_next_such_time_of_day():
    now = datetime(2026, 3, 1, 22, 30)
    assert seconds_until(time(23, 0), now) == 1800
    assert seconds_until(time(6, 0), now) == 7.5 * 3600
    assert seconds_until(time(22, 30), now) == 24 * 3600


def test_a_run_across_a_clock_change_ends_at_the_clock_time(monkeypatch):
    monkeypatch.setenv("TZ", "Europe/Berlin")
    clock.tzset()
    assert seconds_until(time(6, 0), datetime(2026, 10, 24, 22, 0)) == 9 * 3600
    monkeypatch.undo()
    clock.tzset()


def test_the_circuit_breaker_uses_a_share_from_the_50th_row_on():
    assert not too_many_failed(0.5, failed=49, done=49)
    assert too_many_failed(0.5, failed=26, done=50)
    assert not too_many_failed(0.5, failed=25, done=50)


def test_the_circuit_breaker_counts_rows_or_is_disabled():
    assert not too_many_failed(3, failed=3, done=3)
    assert too_many_failed(3, failed=4, done=4)
    assert not too_many_failed("off", failed=1000, done=1000)
