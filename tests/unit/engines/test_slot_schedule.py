"""Slots and buckets: the schedule without a model."""

from __future__ import annotations

import random

import pytest

from gxr_batch.engines.slots import most_slots
from gxr_batch.engines.slots.native import compile_kernels
from gxr_batch.engines.slots.slot_schedule import SlotPlan, bucket, slots_for_memory
from gxr_batch.job import Job


def test_a_step_computes_the_next_bucket_and_never_more_than_all_slots():
    assert [bucket(rows, 32) for rows in (1, 8, 9, 16, 17, 32)] == [8, 8, 16, 16, 32, 32]
    assert bucket(3, 4) == 4


def test_rows_are_admitted_when_an_eighth_of_the_slots_is_free_or_nothing_runs():
    plan = SlotPlan.of(32, 8)
    assert plan.to_admit() == 32
    for _ in range(32):
        plan.take()
    plan.release(3)
    assert plan.to_admit() == 0
    for slot in (9, 1, 30):
        plan.release(slot)
    assert plan.to_admit() == 4
    assert [plan.take() for _ in range(4)] == [1, 3, 9, 30]


def test_many_slots_are_refilled_as_soon_as_a_prefill_is_full():
    plan = SlotPlan.of(128, 8)
    for _ in range(128):
        plan.take()
    for slot in range(7):
        plan.release(slot)
    assert plan.to_admit() == 0
    plan.release(7)
    assert plan.to_admit() == 8


def test_one_slot_is_refilled_at_once():
    plan = SlotPlan.of(1, 8)
    plan.take()
    plan.release(0)
    assert plan.to_admit() == 1


def test_the_last_rows_move_into_the_first_slots_of_their_bucket():
    plan = SlotPlan.of(32, 8)
    for _ in range(32):
        plan.take()
    for slot in range(32):
        if slot not in {2, 20, 31}:
            plan.release(slot)
    assert plan.moves() == [(31, 0), (20, 1)]
    assert plan.taken == {0, 1, 2}
    assert plan.moves() == []


def test_slots_are_never_lost_or_given_twice():
    plan, random_ = SlotPlan.of(16, 8), random.Random(1)
    for _ in range(500):
        for _ in range(plan.to_admit()):
            plan.take()
        assert len(plan.taken) + plan.free == 16
        for slot in random_.sample(sorted(plan.taken), random_.randint(0, len(plan.taken))):
            plan.release(slot)
        plan.moves()
        assert all(0 <= slot < 16 for slot in plan.taken)


def test_slots_fit_the_memory_budget():
    assert slots_for_memory(2**30, 18_432, 2048, 128) == 16
    assert slots_for_memory(2**40, 18_432, 2048, 64) == 64
    assert slots_for_memory(2**40, 18_432, 2048, 128) == 128
    assert slots_for_memory(3 * 18_432 * 2048, 18_432, 2048, 64) == 3
    assert slots_for_memory(0, 18_432, 2048, 64) == 1


@pytest.mark.parametrize(
    ("engine", "device", "dtype", "supported", "most"),
    [
        ({}, "cpu", "bfloat16", True, 128),
        ({}, "cpu", "bfloat16", False, 64),
        ({}, "cpu", "float32", True, 64),
        ({"kernels": "library"}, "cpu", "bfloat16", True, 64),
        ({"kind": "generate"}, "cpu", "bfloat16", True, 64),
        ({}, "cuda:0", "bfloat16", True, 64),
    ],
)
def test_auto_takes_more_slots_where_our_kernels_for_cpus_run(monkeypatch, *, engine, device, dtype, supported, most):
    monkeypatch.setattr(compile_kernels, "supported", lambda: supported)
    sections = {"name": "j", "input": {"path": "x"}, "engine": {"kind": "transformers", **engine}}
    assert most_slots(Job.model_validate(sections), device, dtype) == most
