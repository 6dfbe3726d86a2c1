"""The sampler draws from the distribution of transformers' own processors, by seed, step and token id only."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gxr_batch.engines.slots.token_sampling import Candidates, Seen, SeenIds, draw, nucleus, top_candidates
from gxr_batch.job.sampling import Sampling
from gxr_batch.models.gumbel_noise import gumbel

VOCAB = 4000


def seen(ids) -> Seen:
    """Return the ids that rows have seen, as the loop stores them."""
    kept = SeenIds(len(ids), 64, torch.device("cpu"))
    for slot, row in enumerate(ids):
        kept.start(slot, torch.as_tensor(row).tolist())
    return kept.of(range(len(ids)))


def reference(logits: torch.Tensor, prompt: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return transformers' own probabilities, [rows, vocab]."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return processors(prompt, logits.float()).softmax(dim=-1)


def ours(candidates: Candidates, sampling: Sampling, vocab: int = VOCAB) -> torch.Tensor:
    """Return the probabilities of `draw`, [rows, vocab]."""
    scores = candidates.values.double() / sampling.temperature
    if sampling.top_p < 1:
        scores = scores.masked_fill(~nucleus(scores, sampling.top_p), -torch.inf)
    probabilities = torch.zeros(scores.shape[0], vocab, dtype=torch.float64)
    return probabilities.scatter_add_(1, candidates.ids, scores.softmax(dim=-1))


SETTINGS = [
    Sampling(temperature=temperature, top_p=top_p, top_k=top_k, repetition_penalty=penalty)
    for temperature, top_p, top_k, penalty in itertools.product((0.4, 1.3), (0.5, 0.9, 1.0), (0, 1, 50), (1.0, 1.1))
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_tokens_and_probabilities_are_those_of_transformers(sampling, dtype):
    generator = torch.Generator().manual_seed(7)
    logits = (torch.randn(6, VOCAB, generator=generator) * 3).to(dtype)
    prompt = torch.randint(0, VOCAB, (6, 40), generator=generator)
    expected = reference(logits, prompt, sampling)
    got = ours(top_candidates(logits, seen(prompt), sampling), sampling)
    if sampling.top_p < 1 and dtype == torch.bfloat16:
        # bfloat16 logits tie; which of two equal tokens the nucleus cuts is undefined, how many is not.
        assert ((got > 0).sum(-1) == (expected > 0).sum(-1)).all()
        torch.testing.assert_close(got.sort(-1).values, expected.double().sort(-1).values, rtol=1e-4, atol=1e-7)
    else:
        assert ((got > 0) == (expected > 0)).all()
        torch.testing.assert_close(got, expected.double(), rtol=1e-4, atol=1e-7)


def test_every_tie_at_the_kth_value_stays():
    logits = torch.zeros(1, VOCAB)
    logits[0, 10:13] = 2.0
    logits[0, 100:400] = 1.0  # the 50th value is shared by 300 tokens, more than any margin
    candidates = top_candidates(logits, seen([[0]]), Sampling(top_k=50, repetition_penalty=1.0), thorough=True)
    kept = candidates.ids[0][candidates.values[0] > -torch.inf]
    assert sorted(kept.tolist()) == [10, 11, 12, *range(100, 400)]


def test_more_ties_than_the_margin_holds_are_detected():
    logits = torch.zeros(2, VOCAB)
    logits[0, 100:400] = 1.0
    logits[1, :60] = torch.arange(60.0)
    candidates = top_candidates(logits, seen([[0], [0]]), Sampling(top_k=50, repetition_penalty=1.0))
    assert candidates.complete.tolist() == [False, True]


def test_seen_ids_follow_their_row():
    kept = SeenIds(3, 10, torch.device("cpu"))
    kept.start(0, [7, 7, 8])
    kept.start(2, [1])
    kept.add([0, 2], [9, 1])
    kept.add([0, 2], [7, 2])
    kept.move(2, 1)
    found = kept.of([0, 1])
    assert found.counts.tolist() == [3, 2]
    assert [set(row) for row in found.ids.tolist()] == [{7, 8, 9}, {1, 2}]


def test_sampled_frequencies_follow_the_probabilities():
    sampling = Sampling(temperature=0.9, top_p=0.9, top_k=20, repetition_penalty=1.0)
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3)) * 2
    candidates = top_candidates(logits, seen([[0]]), sampling)
    draws = 20_000
    many = Candidates(candidates.values.expand(draws, -1), candidates.ids.expand(draws, -1), candidates.complete)
    drawn = draw(many, torch.arange(draws) * 7919, torch.zeros(draws, dtype=torch.long), sampling)
    expected = ours(candidates, sampling)[0] * draws
    kept = expected > 0
    observed = drawn.bincount(minlength=VOCAB).double()
    assert observed[~kept].sum() == 0
    chi_square = float(((observed[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    # 99.9 % of true chi-square samples with up to 19 degrees of freedom are below 43.8.
    assert chi_square < 43.8


def test_steps_of_one_seed_are_as_random_as_seeds():
    noise = gumbel(torch.full((5000,), 42), torch.arange(5000), torch.arange(4).expand(5000, 4))
    assert abs(float(noise.mean()) - 0.5772) < 0.03  # Euler's constant
    assert abs(float(noise.var()) - 1.6449) < 0.08  # pi squared / 6
    assert float(torch.corrcoef(noise.T).abs().fill_diagonal_(0).max()) < 0.06


def test_a_draw_does_not_depend_on_other_rows_or_on_the_order_of_candidates():
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=50)
    logits = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(5))
    known = [[1, 2, 3]] * 8
    seeds, steps = torch.arange(8) + 100, torch.arange(8)
    together = draw(top_candidates(logits, seen(known), sampling), seeds, steps, sampling)
    for row in range(8):
        alone = top_candidates(logits[row : row + 1], seen(known[:1]), sampling)
        shuffled = torch.randperm(alone.ids.shape[1])
        alone = Candidates(alone.values[:, shuffled], alone.ids[:, shuffled], alone.complete)
        assert draw(alone, seeds[row : row + 1], steps[row : row + 1], sampling) == together[row]


def test_greedy_takes_the_likeliest_token_after_the_penalty():
    logits = torch.zeros(2, VOCAB)
    logits[:, 5], logits[:, 6] = 2.0, 1.9
    candidates = top_candidates(logits, seen([[5], [9]]), Sampling(temperature=0))
    assert draw(candidates, torch.zeros(2), torch.zeros(2), Sampling(temperature=0)).tolist() == [6, 5]


def test_the_input_logits_are_not_modified():
    logits = torch.randn(2, VOCAB)
    before = logits.clone()
    top_candidates(logits, seen([[0, 1]] * 2), Sampling())
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_shows_in_its_first_candidate(bad):
    logits = torch.zeros(2, VOCAB)
    logits[0, 77] = bad
    for sampling in (Sampling(), Sampling(temperature=0), Sampling(top_k=0)):
        values = top_candidates(logits, seen([[0]] * 2), sampling).values
        assert values[:, 0].isfinite().tolist() == [False, True]
