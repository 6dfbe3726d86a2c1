"""When rows are admitted: the decode loop over steps that only note what they are asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_sessions import Ids, complete, info_of, prompts

from gxr_batch.engines.base import StopRequest
from gxr_batch.engines.slots.decode_loop import TransformersSession
from gxr_batch.engines.slots.decoding_row import RowState
from gxr_batch.engines.slots.row_steps import Drawn


class NotedSteps:
    """Draws each row's number of tokens so far, and notes the prompts of each prefill and how many rows waited."""

    device = torch.device("cpu")
    vocab, capacity, runs_ahead, splits = 1024, 4096, False, 0

    def __init__(self, *, chunk: float, most_new: int = 64, rows: int = 10**6) -> None:
        self.chunk, self.most_new, self.free = chunk, most_new, rows
        self.prefills: list[tuple[list[int], int]] = []
        self.decoded: list[int] = []
        self._drawn: list[Drawn] = []

    def reserve(self, row: RowState) -> bool:
        if not self.free:
            return False
        self.free -= 1
        return True

    def prefill(self, rows: Sequence[RowState], decoding: int) -> None:
        self.prefills.append(([len(row.known_ids) for row in rows], decoding))
        self._draw(rows)

    def decode(self, rows: Sequence[RowState]) -> None:
        self.decoded.append(len(rows))
        self._draw(rows)

    def _draw(self, rows: Sequence[RowState]) -> None:
        self._drawn += [Drawn(row, len(row.ids), 1.0) for row in rows]

    def drawn(self) -> list[Drawn]:
        found, self._drawn = self._drawn, []
        return found

    def release(self, row: RowState) -> None:
        self.free += 1

    def move(self, row: RowState, target: int) -> None:
        pass

    def close(self) -> None:
        pass


def ran(steps: NotedSteps, lengths: Sequence[int], new: Sequence[int], slots: int = 8) -> dict[str, Any]:
    """Generate `new` tokens for prompts of these lengths; return the texts."""
    work = [one._replace(max_new_tokens=count) for one, count in zip(prompts(lengths), new, strict=True)]
    return {
        name: done.text
        for name, done in complete(TransformersSession(info_of(slots), steps, Ids(), frozenset()), work).items()
    }


# Eight rows of which four end together, and four that take their slots.
LENGTHS, NEW = [30] * 8 + [30, 30, 30, 10], [2] * 4 + [9] * 4 + [3] * 4


def test_rows_that_decode_wait_for_a_chunk_of_prompt_tokens_at_a_time():
    steps = NotedSteps(chunk=64)
    ran(steps, LENGTHS, NEW)
    assert steps.prefills == [([30] * 8, 0), ([30, 30], 4), ([30, 10], 6)]
    assert steps.decoded[:3] == [8, 6, 8]  # a step between the two


def test_the_rest_of_an_admission_does_not_wait_until_more_slots_are_free():
    """With 32 slots, refills begin at four free ones; two of those four are left after the first chunk."""
    steps = NotedSteps(chunk=64)
    ran(steps, [30] * 36, [2] * 4 + [30] * 28 + [3] * 4, slots=32)
    assert steps.prefills == [([30] * 32, 0), ([30, 30], 28), ([30, 30], 30)]


def test_a_prompt_longer_than_a_chunk_is_admitted_alone():
    steps = NotedSteps(chunk=64)
    ran(steps, [30] * 8 + [20, 100, 20, 20], NEW)
    assert steps.prefills == [([30] * 8, 0), ([20], 4), ([100], 5), ([20, 20], 5)]


def test_the_first_fill_is_not_limited_though_it_takes_several_admissions():
    steps = NotedSteps(chunk=64, most_new=5)
    ran(steps, [30] * 13, [9] * 8 + [9] * 5)
    assert [lengths for lengths, _ in steps.prefills[:2]] == [[30] * 5, [30] * 3]


def test_a_fill_ends_when_there_is_no_memory_for_more():
    steps = NotedSteps(chunk=64, rows=6)
    ran(steps, LENGTHS, NEW)
    assert [lengths for lengths, _ in steps.prefills[:2]] == [[30] * 6, [30, 30]]


@pytest.mark.parametrize("chunk", [1, 64, float("inf")])
def test_texts_do_not_depend_on_the_chunk(chunk):
    assert ran(NotedSteps(chunk=chunk), LENGTHS, NEW) == ran(NotedSteps(chunk=100), LENGTHS, NEW)


def test_steps_without_a_chunk_refill_all_free_slots_at_once():
    steps = NotedSteps(chunk=float("inf"))
    ran(steps, LENGTHS, NEW)
    assert steps.prefills == [([30] * 8, 0), ([30, 30, 30, 10], 4)]


class AheadSteps(NotedSteps):
    """Steps whose tokens become known one call late, like those of a GPU."""

    runs_ahead = True
    _late: Sequence[Drawn] = ()

    def drawn(self) -> list[Drawn]:
        found, self._late = list(self._late), super().drawn()
        return found


def test_a_token_of_a_stopped_stream_does_not_reach_the_reader_of_the_next_one():
    session = TransformersSession(info_of(2), AheadSteps(chunk=64), Ids(), frozenset())
    stop, heard = StopRequest(), list[str]()

    def hear(text: str) -> None:
        heard.append(text)
        stop.now()

    [stopped, other] = prompts([5, 7], new=9)
    assert list(session.stream(iter([stopped._replace(on_text=hear)]), stop)) == []
    assert len(heard) == 1
    assert complete(session, [other])["r1"].new_tokens == 9
    assert len(heard) == 1
