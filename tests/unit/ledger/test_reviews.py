"""Which review counts: the newest of each reviewer of exactly this text."""

from __future__ import annotations

from datetime import date

import pytest

from gxr_batch.ledger.reviews import Reviews, judged_sha256
from gxr_batch.records import ERROR_COUNTS, Key, Review

KEY = Key("C1", 1)


def review(text: str, day: int, *, status: str = "approved", reviewer: str = "Dr. Ray") -> Review:
    none = (None,) * len(ERROR_COUNTS)
    return Review(KEY, judged_sha256(text, None), status, reviewer, date(2026, 1, day), None, none, None, None)


def counting(said: list[Review], text: str) -> list[tuple[str, int]]:
    return [(one.status, one.reviewed_at.day) for one in Reviews(said).valid(KEY, text, None)]


def test_the_newest_review_of_each_reviewer_counts():
    said = [review("a", 3), review("a", 5, status="rejected"), review("a", 4, reviewer="Dr. Sun")]
    assert counting(said, "a") == [("approved", 4), ("rejected", 5)]


@pytest.mark.parametrize("day", [2, 8])
def test_a_review_of_another_text_hides_no_review_of_this_one(day):
    said = [review("a", 5), review("another", day, status="rejected")]
    assert counting(said, "a") == [("approved", 5)]
    assert counting(said, "another") == [("rejected", day)]
    assert counting(said, "a third") == []
