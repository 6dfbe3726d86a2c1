"""Pages of the GPU's cache: none has two owners, and all come back; the plan of memory keeps its budget."""

from __future__ import annotations

import random

import pytest
import torch

from gxr_batch.engines.slots.gpu import paged_cache
from gxr_batch.engines.slots.gpu.memory_plan import Sizes, plan, windows_of
from gxr_batch.engines.slots.gpu.page_groups import groups_of
from gxr_batch.engines.slots.gpu.paged_cache import PagedCache

GEMMA_4B = Sizes(
    hidden=2560,
    inner=10240,
    heads=8,
    kv_heads=4,
    head_size=256,
    vocab=262_208,
    windows=windows_of(["sliding_attention"] * 5 + ["full_attention"], 1024) * 5 + (1024,) * 4,
    element_bytes=2,
)


def cache_of(
    windows: list[int], *, slots: int = 6, capacity: int = 200, chunk: int = 32, pages: int = 40
) -> PagedCache:
    groups = groups_of(windows, capacity, chunk)
    return PagedCache.of(
        groups,
        slots=slots,
        capacity=capacity,
        pages=[pages] * len(groups),
        kv_heads=1,
        head_size=16,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def owners(cache: PagedCache, taken: dict[int, int]) -> list[list[int]]:
    """Return, by group, the pages in the tables of the taken slots (slot -> tokens)."""
    return [
        [
            int(page)
            for slot, tokens in taken.items()
            for page in group.rows[slot, : min(-(-tokens // cache.page_tokens), group.shape.columns)]
        ]
        for group in cache.groups
    ]


@pytest.mark.parametrize("windows", [[0, 0], [0, 8, 8], [8, 8]])
def test_no_page_has_two_owners_and_all_come_back(windows):
    rng = random.Random(4)
    cache = cache_of(windows)
    everything = [set(group.free) for group in cache.groups]
    taken: dict[int, int] = {}
    for _ in range(2000):
        free = [slot for slot in range(cache.slots) if slot not in taken]
        action = rng.choice(["take", "take", "release", "move"])
        if action == "take" and free:
            tokens = rng.randint(1, cache.capacity)
            if cache.has_room(tokens):
                cache.take(free[0], tokens)
                taken[free[0]] = tokens
        elif action == "release" and taken:
            slot = rng.choice(list(taken))
            cache.release(slot)
            del taken[slot]
        elif action == "move" and taken and free:
            slot = rng.choice(list(taken))
            cache.move(slot, free[-1])
            taken[free[-1]] = taken.pop(slot)
        for group, owned, whole in zip(cache.groups, owners(cache, taken), everything, strict=True):
            assert len(owned) == len(set(owned))
            assert set(owned) | set(group.free) == whole
            assert not set(owned) & set(group.free)
    for slot in list(taken):
        cache.release(slot)
    assert [set(group.free) for group in cache.groups] == everything


def test_a_prefix_is_shared_and_comes_back_when_its_last_user_has_left():
    cache = cache_of([0, 8], capacity=40)
    everything = [set(group.free) for group in cache.groups]
    cache.take(0, 40)
    prefix = cache.make_prefix(0, 35)
    assert prefix.tokens == 32  # whole pages
    cache.take(1, 40, prefix)
    for group in cache.groups:
        assert (group.rows[0, :2] == group.rows[1, :2]).all()
        assert group.rows[0, 2] != group.rows[1, 2]
    cache.release(0)
    assert prefix.users == 1
    assert not set(prefix.pages[0]) & set(cache.groups[0].free)
    cache.release(1)
    assert prefix.users == 0
    cache.drop(prefix)
    assert [set(group.free) for group in cache.groups] == everything


def filled(cache: PagedCache) -> list[torch.Tensor]:
    """Write something into every page and table; return a copy of it."""
    for group in cache.groups:
        for layer in group.of_layer.values():
            layer.copy_(torch.rand_like(layer))
        group.table.copy_(torch.from_numpy(group.rows))
    return [one.clone() for group in cache.groups for one in (*group.of_layer.values(), group.table)]


def test_a_cache_that_grows_keeps_every_bit_and_page_number():
    cache = cache_of([0, 8, 8], slots=3, pages=30)
    cache.take(0, 100)
    cache.take(2, 40)
    before, rows = filled(cache), [group.rows.copy() for group in cache.groups]
    cache.resize([50, 35])
    assert cache.pages == [30, 30]  # nobody uses the others yet
    cache.extend(5)
    assert (cache.slots, cache.pages) == (5, [50, 35])
    after = [one for group in cache.groups for one in (*group.of_layer.values(), group.table)]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[: len(old)], old)
        assert not new[len(old) :].any()
    for group, old in zip(cache.groups, rows, strict=True):
        assert (group.rows[:3] == old).all()
    cache.take(4, 200)
    taken = {0: 100, 2: 40, 4: 200}
    for group, owned, count in zip(cache.groups, owners(cache, taken), cache.pages, strict=True):
        assert sorted([*owned, *group.free]) == list(range(count))


@pytest.mark.parametrize("fails_at", [1, 2, 3])
@pytest.mark.parametrize("gives_back", [True, False])
def test_a_cache_that_could_not_grow_is_used_as_before_and_grows_later(monkeypatch, fails_at, gives_back):
    cache = cache_of([0, 8, 8], slots=3, pages=30)
    cache.take(0, 100)
    before, resized, calls = filled(cache), paged_cache._resized, []

    def failing(tensor, rows):
        calls.append(rows)
        if len(calls) == fails_at or (len(calls) > fails_at and not gives_back):
            raise torch.OutOfMemoryError
        return resized(tensor, rows)

    with monkeypatch.context() as planted:
        planted.setattr(paged_cache, "_resized", failing)
        with pytest.raises(torch.OutOfMemoryError):
            cache.resize([50, 50])
        if gives_back:
            cache.resize([30, 30])
    layers = [layer for group in cache.groups for layer in group.of_layer.values()]
    assert (sum(map(len, layers)) == 90) == (gives_back or fails_at == 1)
    assert cache.pages == [30, 30]
    assert [len(group.free) for group in cache.groups] == [30 - 7, 30 - cache.groups[1].shape.columns]
    cache.resize([40, 40])
    cache.extend(4)
    assert cache.pages == [40, 40]
    after = [one for group in cache.groups for one in (*group.of_layer.values(), group.table)]
    assert all(torch.equal(new[: len(old)], old) for old, new in zip(before, after, strict=True))


def test_a_larger_plan_for_the_same_prefills_only_has_more_of_everything():
    for capacity in (64, 256, 2048):
        small = plan(GEMMA_4B, capacity=capacity, budget=2**30)
        for gib in (1, 2, 8, 100):
            large = plan(GEMMA_4B, capacity=capacity, budget=gib * 2**30, chunk=small.chunk)
            assert large.bytes <= gib * 2**30
            assert small.slots <= large.slots <= large.chunk == small.chunk
            assert large.groups == small.groups
            assert all(new >= old for new, old in zip(large.pages, small.pages, strict=True))


def test_a_ring_that_comes_round_shares_no_prefix():
    cache = cache_of([0, 8], capacity=400, chunk=16)
    assert cache.groups[1].shape.columns < cache.groups[0].shape.columns
    assert cache.may_share(cache.groups[1].shape.columns * 16, 16)
    assert not cache.may_share(cache.groups[1].shape.columns * 16 + 1, 16)
    assert not cache.may_share(100, 15)  # no whole page


def test_while_a_chunk_is_written_its_first_token_still_sees_a_whole_window():
    for window in (1, 8, 16, 100, 1024):
        for chunk in (1, 16, 512):
            (group,) = groups_of([window], 100_000, chunk)
            for first in range(0, 3 * window + 50, 7):
                oldest, newest = max(0, first - window + 1), first + chunk - 1
                assert newest // 16 - oldest // 16 < group.columns


@pytest.mark.parametrize("gib", [1, 2, 4, 8, 16, 30, 60, 120])
@pytest.mark.parametrize("capacity", [512, 2048, 8192])
def test_the_plan_keeps_its_budget_and_holds_a_whole_row(gib, capacity):
    found = plan(GEMMA_4B, capacity=capacity, budget=gib * 2**30)
    assert found is not None
    assert found.bytes <= gib * 2**30
    assert found.rows >= 1
    more = plan(GEMMA_4B, capacity=capacity, budget=2 * gib * 2**30)
    assert more is not None
    assert more.slots >= found.slots


def test_without_memory_for_one_row_there_is_no_plan():
    assert plan(GEMMA_4B, capacity=8192, budget=2**28) is None
    assert plan(GEMMA_4B, capacity=512, budget=2**28, slots=512) is None


def test_a_limit_of_16_gib_holds_many_times_the_rows_of_whole_slots():
    """The weights in bfloat16 take 7.3 GiB; slots of 2,048 tokens, as the library's cache has them, held 16 rows."""
    found = plan(GEMMA_4B, capacity=2048, budget=int(0.8 * (16 - 7.3) * 2**30))
    assert found is not None
    assert found.slots >= 96
