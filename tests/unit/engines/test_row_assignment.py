"""The ray engine's decisions without Ray: placement, clocks, which worker gets which row, the rows of a lost worker."""

from __future__ import annotations

import socket

import pytest

from gxr_batch import errors
from gxr_batch.engines.base import StopRequest
from gxr_batch.engines.ray.cluster import Node, Placing, place
from gxr_batch.engines.ray.pool import Head
from gxr_batch.engines.ray.row_assignment import Dealer, Hand
from gxr_batch.engines.ray.worker_clocks import Meter, Offset
from gxr_batch.engines.ray.worker_messages import Failure
from gxr_batch.errors import ApiOutage, EngineFailed, EngineUnavailable, GxrError, ModelUnavailable
from gxr_batch.job import Job, RaySection
from gxr_batch.records import Completion, Encoded, Key, Messages, Prompt
from gxr_batch.run.messages import of_kind

TWO_HOSTS = [Node(16, 4), Node(8, 2), Node(0, 0)]


@pytest.mark.parametrize(
    ("section", "nodes", "on_gpu", "placing"),
    [
        ({}, TWO_HOSTS, True, Placing(6, 0, 1)),
        ({"workers": 3, "cpus_per_worker": 2}, TWO_HOSTS, True, Placing(3, 2, 1)),
        ({}, TWO_HOSTS, False, Placing(2, 8, 0)),
        ({"cpus_per_worker": 3}, TWO_HOSTS, False, Placing(7, 3, 0)),
        ({"workers": 2}, [Node(2, 0)], True, Placing(2, 1, 0)),
        ({"workers": 8}, [Node(2, 0)], False, Placing(8, 1, 0)),
        ({"workers": 1}, TWO_HOSTS, False, Placing(1, 8, 0)),
        ({}, [], False, Placing(1, 1, 0)),
    ],
)
def test_there_is_one_worker_per_gpu_else_one_per_host(section, nodes, on_gpu, placing):
    assert place(RaySection(**section), nodes, on_gpu=on_gpu) == placing


def test_an_offset_is_within_half_the_transit_time_and_small_ones_count_as_none():
    offset = Offset()
    offset.heard(100.0, 107.02, 107.52, 100.53)  # 30 ms in transit
    assert offset.seconds == pytest.approx(7.005)
    assert offset.within == pytest.approx(0.015)
    offset.heard(200.0, 207.0, 207.1, 200.9)  # long in transit: less precise than what is known
    assert offset.seconds == pytest.approx(7.005)
    assert offset.here(1_000_000) == 1_000_000 - 7005
    same_host = Offset()
    same_host.heard(100.0, 100.004, 100.404, 100.405)
    assert same_host.here(1_000_000) == 1_000_000


def test_time_is_divided_among_busy_workers():
    meter = Meter()
    meter.busy(4)
    since = meter.mark()
    assert meter.part((since[0] - 1.0, since[1] - 0.25)) == pytest.approx(0.25, abs=0.02)


def test_a_head_is_gone_only_after_many_failed_attempts(monkeypatch):
    monkeypatch.setattr("gxr_batch.engines.ray.pool._EVERY_SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        head = Head(f"127.0.0.1:{server.getsockname()[1]}")
        assert not any(head.gone for _ in range(10))
    looks = [head.gone for _ in range(6)]
    assert looks == [False] * 5 + [True]
    with socket.create_server(("127.0.0.1", head._at[1])):
        assert not head.gone


def test_the_notice_of_a_slower_engine_names_the_key_that_chose_it():
    asked = Job.model_validate({"name": "j", "input": {"path": "f.csv"}, "engine": {"kind": "ray"}})
    (notice,) = of_kind(asked, asked.with_values({"ray.worker": "generate"}))
    assert notice.startswith('ray.worker = "auto" chose "generate"')
    assert of_kind(asked, asked.with_values({"ray.worker": "transformers"})) == []


def prompt(number: int) -> Prompt:
    return Prompt(Key(f"C{number}", 1), Messages((), "t"), Encoded(None, 5), number, 8)


def completion(key: Key) -> Completion:
    return Completion(key, "text", "stop", None, 5, 4, 0.0, 0.1, 0.2, 0.2, 1.0, 0, 0)


class Table:
    """A dealer for some hands, and the prompts that it pulled."""

    def __init__(self, rows: int, *slots: int) -> None:
        self.hands = [Hand(slots=number) for number in slots]
        self.stop = StopRequest()
        self.pulled = 0
        self.dealer = Dealer(self._rows(rows), self.stop, self.hands)

    def _rows(self, rows: int):
        for number in range(rows):
            self.pulled += 1
            yield prompt(number)

    def deal(self, hand: int) -> list[str]:
        return [given.key.row_id for given in self.dealer.deal(self.hands[hand])]

    def settle(self, hand: int, row: str) -> Completion | None:
        return self.dealer.settle(self.hands[hand], completion(Key(row, 1)))


def test_prompts_are_pulled_for_free_slots_only_and_in_small_units():
    table = Table(100, 16, 16)
    assert table.deal(0) == ["C0", "C1"]
    assert table.deal(1) == ["C2", "C3"]
    while table.dealer.wants_more(table.hands[0]):
        table.deal(0)
    assert (len(table.hands[0].flight), table.pulled) == (16, 18)
    assert table.deal(0) == []
    assert table.settle(0, "C0") is not None
    assert table.deal(0) == ["C18"]


def test_a_worker_that_was_full_is_refilled_at_once():
    table = Table(100, 16)
    while table.dealer.wants_more(table.hands[0]):
        table.deal(0)
    for number in range(10):
        table.settle(0, f"C{number}")
    assert len(table.deal(0)) == 10
    table.dealer.lose(table.hands[0])
    table.hands[0].slots = 16
    assert len(table.deal(0)) == 2, "its next process starts small again"


def test_rows_of_a_lost_worker_run_last_one_at_a_time_and_a_killer_is_condemned():
    table = Table(4, 2, 2)
    assert table.deal(0) + table.deal(0) == ["C0", "C1"]
    assert table.dealer.lose(table.hands[0]) == []
    assert (table.hands[0].slots, table.dealer.again) == (0, 2)
    assert table.deal(1) + table.deal(1) == ["C2", "C3"], "fresh rows go first"
    assert table.settle(1, "C2") is not None
    assert table.deal(1) == [], "a suspect waits until its worker has no other rows"
    assert table.settle(1, "C3") is not None
    assert table.deal(1) == ["C0"]
    assert table.deal(1) == []
    assert [entry.prompt.key.row_id for entry in table.dealer.lose(table.hands[1])] == ["C0"]
    table.hands[0].slots = 2
    assert not table.dealer.over
    assert table.deal(0) == ["C1"]
    assert table.settle(0, "C1") is not None
    assert table.dealer.over


def test_an_answer_to_a_row_that_its_worker_no_longer_has_is_ignored():
    table = Table(2, 2, 2)
    table.deal(0)
    table.dealer.lose(table.hands[0])
    assert table.settle(0, "C0") is None


def test_while_draining_no_prompts_are_pulled_and_no_suspects_are_dealt():
    table = Table(9, 2, 2)
    table.deal(0)
    table.deal(1)
    table.dealer.lose(table.hands[0])
    table.hands[0].slots = 2
    table.stop.drain(float("inf"))
    pulled = table.pulled
    assert table.deal(0) + table.deal(1) == []
    assert table.pulled == pulled
    assert not table.dealer.over
    table.settle(1, next(iter(table.hands[1].flight)).row_id)
    assert table.dealer.over


@pytest.mark.parametrize(
    "kind",
    [ModelUnavailable, EngineFailed, EngineUnavailable, ApiOutage, errors.OutOfDeviceMemory, errors.JobFileError],
)
def test_an_error_of_a_worker_is_the_same_error_here(kind):
    made = Failure.of(kind("What is wrong.", where="a.key", next_step="do this")).error("worker 2 on n1")
    assert type(made) is kind
    assert (made.what, made.where, made.next_step) == ("What is wrong.", "a.key (worker 2 on n1)", "do this")


def test_only_the_place_of_a_bug_in_a_worker_is_reported():
    try:
        raise ValueError("zebrafish")
    except ValueError as error:
        made = Failure.of(error).error("worker 1")
    assert isinstance(made, GxrError)
    assert "ValueError, test_row_assignment.py line" in str(made)
    assert "zebrafish" not in str(made)
