"""The draw on a GPU is token_sampling's, to the token."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from gpu_checks import TYPES, indices

from gxr_batch.engines.slots import token_sampling
from gxr_batch.engines.slots.gpu.kernels import sampling as kernels
from gxr_batch.engines.slots.gpu.slot_state import SlotState
from gxr_batch.engines.slots.token_sampling import SeenIds
from gxr_batch.job.sampling import Sampling
from gxr_batch.models.gumbel_noise import gumbel

VOCAB = 13_001  # 51 blocks, the last one of few tokens
SLOTS = 24
PLAIN = Sampling(temperature=1.0, top_p=1.0, top_k=50, repetition_penalty=1.0)
INF, NAN = math.inf, math.nan


def random_logits(rows, vocab=VOCAB, *, dtype=torch.float32, seed=0, scale=3.0):
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def bitmap(seen, vocab, device):
    """Return what slots have seen, one bit an id."""
    bits = torch.zeros(len(seen), -(-vocab // 32) * 32, dtype=torch.long)
    for slot, ids in enumerate(seen):
        bits[slot, list(ids)] = 1
    words = (bits.view(len(seen), -1, 32) << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int().to(device)


class Rows:
    """Slots with their state, for the kernels and on the CPU."""

    def __init__(self, device, vocab=VOCAB, seed=1):
        generator = torch.Generator().manual_seed(seed)
        self.device, self.vocab = device, vocab
        self.ids = [set(torch.randint(vocab, (40,), generator=generator).tolist()) for _ in range(SLOTS)]
        self.seeds = torch.randint(-(2**63), 2**63 - 1, (SLOTS,), generator=generator)
        self.steps = torch.randint(300, (SLOTS,), generator=generator)
        self.state = SimpleNamespace(
            tokens=torch.full((SLOTS,), 7, dtype=torch.int32, device=device),
            positions=torch.arange(SLOTS, dtype=torch.int32, device=device) * 10,
            seeds=self.seeds.clone().to(device),
            steps=self.steps.clone().to(device),
            seen=bitmap(self.ids, vocab, device),
        )

    def draw(self, launch, logits, slots, sampling):
        """Return what the kernels draw."""
        rows, vocab = logits.shape
        wide = torch.full((rows, vocab + 13), NAN, dtype=logits.dtype, device=self.device)
        wide[:, :vocab] = logits
        results = torch.full((rows,), -99, dtype=torch.int32, device=self.device)
        space = (rows, kernels.capacity(sampling.top_k))
        kernels.draw(
            launch,
            wide[:, :vocab],
            indices(slots, self.device),
            **vars(self.state),
            penalty=sampling.repetition_penalty,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            greedy=sampling.greedy,
            maxima=torch.full((rows, kernels.blocks(vocab)), NAN, device=self.device),
            candidates=None if sampling.greedy else torch.full(space, -1, dtype=torch.long, device=self.device),
            results=results,
        )
        assert torch.equal(wide[:, :vocab].cpu().view(torch.uint8), logits.contiguous().view(torch.uint8))
        return results.tolist()

    def expected(self, logits, slots, sampling):
        """Return what token_sampling draws, sorting the whole vocabulary."""
        seen = SeenIds(len(slots), 400, torch.device("cpu"))
        for row, slot in enumerate(slots):
            seen.start(row, sorted(self.ids[slot]))
        known = seen.of(range(len(slots)))
        candidates = token_sampling.top_candidates(logits, known, sampling, thorough=True)
        drawn = token_sampling.draw(candidates, self.seeds[slots], self.steps[slots], sampling).tolist()
        finite = candidates.values[:, 0].isfinite().tolist()
        return [token if good else kernels.NOT_FINITE for token, good in zip(drawn, finite, strict=True)]


def state_of(rows):
    return {name: tensor.cpu().clone() for name, tensor in vars(rows.state).items()}


def drawn_as_on_the_cpu(launch, device, logits, sampling, slots=None):
    rows = Rows(device, logits.shape[1])
    slots = slots or list(range(len(logits)))
    drawn = rows.draw(launch, logits, slots, sampling)
    assert drawn == rows.expected(logits, slots, sampling)
    return drawn


SETTINGS = [
    (torch.bfloat16, Sampling()),
    (torch.float16, Sampling(temperature=0.3, top_p=1.0)),
    (torch.float32, Sampling(temperature=1.5, top_p=0.5, repetition_penalty=1.7)),
    (torch.bfloat16, Sampling(temperature=1.5, top_p=0.1)),
    (torch.bfloat16, Sampling(temperature=0.9, top_p=0.95, top_k=20, repetition_penalty=0.8)),
    (torch.float32, Sampling(top_k=1, top_p=1.0)),
    (torch.bfloat16, Sampling(temperature=2.0, top_p=0.98, top_k=256)),
    (torch.float32, Sampling(temperature=2.0, top_p=1.0, top_k=256, repetition_penalty=1.0)),
    *((dtype, Sampling(temperature=0, repetition_penalty=penalty)) for dtype in TYPES for penalty in (1.0, 1.3)),
]


@pytest.mark.parametrize(("dtype", "sampling"), SETTINGS, ids=str)
def test_draws_are_those_of_the_cpu_and_advance_their_slots_only(launch, device, dtype, sampling):
    rows = Rows(device)
    slots = [4, -1, 0, SLOTS, 23]
    live = [row for row, slot in enumerate(slots) if 0 <= slot < SLOTS]
    logits = random_logits(len(slots), dtype=dtype)
    own = [slots[row] for row in live]
    expected = rows.expected(logits[live], own, sampling)
    state = state_of(rows)

    drawn = rows.draw(launch, logits, slots, sampling)

    assert [drawn[row] for row in live] == expected
    assert [drawn[row] for row in (1, 3)] == [kernels.IDLE] * 2
    state["tokens"][own] = torch.tensor(expected, dtype=torch.int32)
    state["positions"][own] += 1
    state["steps"][own] += 1
    for slot, token in zip(own, expected, strict=True):
        rows.ids[slot].add(token)
    state["seen"] = bitmap(rows.ids, VOCAB, "cpu")
    assert all(torch.equal(tensor, state[name]) for name, tensor in state_of(rows).items())


@pytest.mark.parametrize("vocab", [1, 31, 257, 1000])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0)], ids=["sampled", "greedy"])
def test_small_vocabularies(launch, device, vocab, sampling):
    drawn_as_on_the_cpu(launch, device, random_logits(2, vocab), sampling)


def test_a_whole_answer_is_drawn_step_by_step(launch, device):
    rows, sampling, slots = Rows(device, 2000), Sampling(top_k=7, repetition_penalty=1.5), [3, 5]
    for step in range(6):
        logits = random_logits(2, 2000, dtype=torch.bfloat16, seed=step % 2)
        expected = rows.expected(logits, slots, sampling)
        assert rows.draw(launch, logits, slots, sampling) == expected
        rows.steps[slots] += 1
        for slot, token in zip(slots, expected, strict=True):
            rows.ids[slot].add(token)
    assert rows.state.steps.cpu().tolist() == rows.steps.tolist()


def test_a_draw_does_not_depend_on_other_rows(launch, device):
    logits, slots = random_logits(9, dtype=torch.bfloat16), list(range(9))
    together = Rows(device).draw(launch, logits, slots, PLAIN)
    for row in (0, 8):
        assert Rows(device).draw(launch, logits[row : row + 1], [row], PLAIN) == [together[row]]
    assert Rows(device).draw(launch, logits[[7, 3]], [7, 3], PLAIN) == [together[7], together[3]]


def test_the_noise_is_that_of_every_engine(device):
    @triton.jit
    def noise(seeds, steps, ids, out):
        place = tl.program_id(0) * 64 + tl.arange(0, 64)
        seed, step = tl.load(seeds + tl.program_id(0)), tl.load(steps + tl.program_id(0))
        tl.store(out + place, kernels._gumbel(seed, step, tl.load(ids + place)))

    generator = torch.Generator().manual_seed(2)
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 2**32, *torch.randint(2**62, (26,), generator=generator)])
    steps = torch.tensor([0, 1, 255, 2**31, *torch.randint(512, (28,), generator=generator)])
    ids = torch.randint(300_000, (32, 64), generator=generator)
    ids[:, :3] = torch.tensor([0, 1, 2**31 - 1])
    out = torch.empty(32, 64, dtype=torch.double, device=device)
    noise[(32,)](seeds.to(device), steps.to(device), ids.int().to(device), out)
    torch.testing.assert_close(out.cpu(), gumbel(seeds, steps, ids), rtol=1e-14, atol=1e-15)


# Ties


@pytest.mark.parametrize("tied", [3, 10, 49])
def test_equal_tokens_at_the_edge_of_the_nucleus(launch, device, tied):
    """The sum of equal shares meets top-p exactly, or misses it by the rounding of that many additions."""
    logits = torch.full((2, VOCAB), -INF)
    logits[:, 500 : 500 + 7 * tied : 7] = 2.0
    for top_p in (0.1, 0.3, 0.5, 1 - 1 / 3, 0.7, 0.9):
        drawn_as_on_the_cpu(launch, device, logits, Sampling(top_p=top_p, repetition_penalty=1.0))


def test_equal_logits_are_ranked_by_id(launch, device):
    logits = torch.zeros(2, VOCAB)
    logits[:, ::97] = (torch.arange(135) % 9).flip(0).float()  # 15 of each value
    for top_k, top_p in ((15, 0.4), (50, 0.3), (100, 0.8)):
        sampling = Sampling(temperature=2.0, top_k=top_k, top_p=top_p, repetition_penalty=1.0)
        drawn_as_on_the_cpu(launch, device, logits, sampling)


def test_zero_and_negative_zero_tie(launch, device):
    logits = torch.full((2, VOCAB), -1.0)
    logits[:, 100:160] = torch.tensor([0.0, -0.0]).repeat(30)
    drawn_as_on_the_cpu(launch, device, logits, PLAIN.replace(top_k=10, top_p=0.5))
    assert drawn_as_on_the_cpu(launch, device, logits.flip(1), PLAIN.replace(temperature=0)) == [VOCAB - 160] * 2


def test_the_lowest_id_wins_a_greedy_tie(launch, device):
    logits = random_logits(2)
    logits[:, [900, 300, 12_000, 301]] = 50.0
    assert Rows(device).draw(launch, logits, [0, 1], PLAIN.replace(temperature=0)) == [300, 300]


def test_every_tie_that_fits_is_kept_and_more_are_reported(launch, device):
    vocab, spare = 3000, kernels.capacity(50) - 3
    logits = torch.zeros(2, vocab)
    logits[:, 10:13] = 2.0
    logits[0, 100 : 100 + spare] = 1.0
    logits[1, 100 : 101 + spare] = 1.0
    rows = Rows(device, vocab)
    expected = rows.expected(logits[:1], [0], PLAIN)
    before = state_of(rows)
    assert rows.draw(launch, logits, [0, 1], PLAIN) == [*expected, kernels.TOO_MANY_TIES]
    after = state_of(rows)
    assert all(torch.equal(after[name][1:], before[name][1:]) for name in before)


@pytest.mark.parametrize("top_k", [1, 50, 256])
def test_the_best_tokens_in_a_few_blocks_are_found(launch, device, top_k):
    logits = random_logits(3, scale=0.1)
    logits[0, 256:1280] += 100  # four blocks, full of better tokens than any other
    logits[1, VOCAB - 700 :] += 100
    logits[2] = torch.arange(VOCAB).sub(6000.0) * 4e34
    drawn_as_on_the_cpu(launch, device, logits, PLAIN.replace(top_k=top_k, top_p=0.9))


# Values that are no logits


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0)], ids=["sampled", "greedy"])
def test_rows_that_are_not_finite_are_reported_and_not_advanced(launch, device, sampling):
    logits = random_logits(7)
    rows = Rows(device)
    seen = [sorted(ids)[0] for ids in rows.ids]
    logits[0, 77] = NAN
    logits[1, VOCAB - 1] = INF
    logits[2, seen[2]] = NAN
    logits[3, seen[3]] = INF
    logits[4] = -INF
    logits[5, 100:] = -INF
    expected = rows.expected(logits, range(7), sampling)
    assert expected[:5] == [kernels.NOT_FINITE] * 5
    before = state_of(rows)
    assert rows.draw(launch, logits, list(range(7)), sampling) == expected
    after = state_of(rows)
    assert all(torch.equal(after[name][:5], before[name][:5]) for name in before)


def test_tokens_at_minus_infinity_are_never_drawn(launch, device):
    logits = torch.full((3, VOCAB), -INF)
    logits[0, [5, 700]] = torch.tensor([1.0, 1.5])
    logits[1, VOCAB - 1] = -3.0e38
    logits[2, 1:4] = torch.tensor([-3.4e38, 3.4e38, 0.0])
    for penalty in (1.0, 1.1):
        drawn = drawn_as_on_the_cpu(launch, device, logits, PLAIN.replace(repetition_penalty=penalty))
        assert drawn[0] in (5, 700)
        assert drawn[1:] == [VOCAB - 1, 2]


@pytest.mark.parametrize(("dtype", "sampling"), SETTINGS, ids=str)
def test_rows_that_may_draw_few_tokens_draw_those_of_the_cpu(launch, device, dtype, sampling):
    """By the kernel, and from the sorted vocabulary as after TOO_MANY_TIES."""
    rows = Rows(device)
    seen = sorted(rows.ids[0])
    allowed = [
        seen[:1],
        [VOCAB - 1],
        [0, 31, 32, 255, 256, VOCAB - 1],
        range(300, 360),
        range(2, VOCAB, 9),
        range(VOCAB),
        [*seen, 5],
    ]
    slots = [*range(1, len(allowed)), 0]  # the last row has seen all that it may draw but one
    logits = random_logits(len(allowed), dtype=dtype, seed=3)
    logits[3] = 1.0  # ties, fewer than are kept of the best
    held = logits.to(device)
    kernels.forbid(launch, held, bitmap(allowed, VOCAB, device))
    logits = held.cpu()
    assert logits.isfinite().sum(dim=1).tolist() == [len({*ids}) for ids in allowed]
    expected = rows.expected(logits, slots, sampling)
    assert all(token in ids for token, ids in zip(expected, allowed, strict=True))
    state = SlotState(SLOTS, VOCAB, sampling, launch, device)
    for name, known in vars(rows.state).items():
        getattr(state, name).copy_(known)
    assert rows.draw(launch, logits, slots, sampling) == expected
    state.results.fill_(kernels.TOO_MANY_TIES)
    state.draw_ties(held, indices(slots, device))
    assert state.results[: len(slots)].tolist() == expected
    by_kernel, sorted_ = state_of(rows), {name: getattr(state, name).cpu() for name in vars(rows.state)}
    assert all(torch.equal(by_kernel[name], sorted_[name]) for name in by_kernel)


def test_ties_among_few_tokens_are_reported_and_drawn_from_the_sorted_vocabulary(launch, device):
    logits = torch.full((1, VOCAB), -INF)
    logits[0, 40 : 40 + 3 * 400 : 3] = 1.0  # more than the kernel holds
    rows = Rows(device)
    assert rows.draw(launch, logits, [0], PLAIN) == [kernels.TOO_MANY_TIES]
    state = SlotState(SLOTS, VOCAB, PLAIN, launch, device)
    for name, known in vars(rows.state).items():
        getattr(state, name).copy_(known)
    results = state.draw(logits.to(device), indices([0], device))
    state.draw_ties(logits.to(device), indices([0], device))
    assert results.tolist() == rows.expected(logits, [0], PLAIN)


def test_extreme_settings(launch, device):
    logits = random_logits(1)
    for temperature, top_p in ((1e-310, 1.0), (1e-310, 0.9), (1e300, 0.9), (0.7, 1e-300), (0.7, 1 - 2**-53)):
        drawn_as_on_the_cpu(launch, device, logits, Sampling(temperature=temperature, top_p=top_p))


def test_settings_that_are_drawn_elsewhere_are_refused(launch, device):
    for changes in ({"top_k": 0}, {"top_k": 257}, {"repetition_penalty": 0.0}, {"top_p": 0.0}, {"temperature": -1.0}):
        with pytest.raises(ValueError):
            Rows(device).draw(launch, random_logits(1), [0], Sampling().replace(**changes))
    assert not launch.launches


def test_no_rows_are_no_launch(launch, device):
    assert Rows(device).draw(launch, torch.empty(0, VOCAB), [], Sampling()) == []
    assert not launch.launches
