"""Draws every row's next token on the GPU, as token_sampling does, and leaves the row ready for its next step.

Two kernels. The first reads all logits and keeps the largest of every block of the vocabulary; many programs share a
row. The second, one program a row, reads only the blocks that can hold one of the k best tokens. What it draws is what
`token_sampling.top_candidates` and `token_sampling.draw` draw from the same logits, whatever rows are in the batch:
the same arithmetic in the same order, except for exp and log in float64, whose last bit differs between libraries.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from gxr_batch.engines.slots.gpu.launch import ACTIVATIONS, INDICES, WEIGHTS, Launcher, Operand

# Outcomes of a row in `results` that are no token; nothing else of such a row changes.
NOT_FINITE = -1  # a logit is NaN or infinite, or all are -inf
TOO_MANY_TIES = -2  # more tokens tie at the k-th value than fit: draw with token_sampling instead
IDLE = -3  # slots[row] is -1, or no slot

MOST_CANDIDATES = 256  # the largest top_k

_BLOCK = 256  # tokens under one maximum
_TILE = 16  # blocks that one program of the first kernel reads
_WORDS_A_PROGRAM = 64  # of a row's mask
_CHUNK = 16  # blocks that the second kernel reads at a time

# The same for the kernels, which count a block as groups of 32 tokens, one word of the bitmap of seen ids each.
_GROUPS = tl.constexpr(_BLOCK // 32)
_NOT_FINITE = tl.constexpr(NOT_FINITE)
_TOO_MANY_TIES = tl.constexpr(TOO_MANY_TIES)
_IDLE = tl.constexpr(IDLE)
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # of the finite float32
_NO_KEY = tl.constexpr(-(2**63))  # below the key of any token
_MOST_ID = tl.constexpr(2**31 - 1)


def blocks(vocab: int) -> int:
    """Return how many block maxima a row has."""
    return -(-vocab // _BLOCK)


def capacity(top_k: int) -> int:
    """Return how many candidates a row has space for: k, every tie at the k-th value, and some to spare."""
    return int(triton.next_power_of_2(2 * top_k + 64))


def draw(
    launch: Launcher,
    logits: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    seeds: torch.Tensor,
    steps: torch.Tensor,
    seen: torch.Tensor,
    *,
    penalty: float,
    temperature: float,
    top_k: int,
    top_p: float,
    greedy: bool,
    maxima: torch.Tensor,
    candidates: torch.Tensor | None,
    results: torch.Tensor,
) -> None:
    """Draw a token for every row of `logits` [rows, vocab], and advance the row's slot.

    `slots` [rows] int32 has every slot at most once, -1 for an idle row. For each slot: `tokens` and `positions` int32,
    `seeds` and `steps` int64 as for `token_sampling.draw`, and the bitmap `seen` [slots, ceil(vocab / 32)] int32, id i
    at bit i % 32 of word i // 32. `results` [rows] int32 gets the token, or NOT_FINITE, TOO_MANY_TIES or IDLE, and then
    nothing of the slot changes. With a token, it is written to `tokens` and `seen`; position and step grow by one.

    `maxima` [rows, blocks(vocab)] float32 and `candidates` [rows, capacity(top_k)] int64 (None if greedy) are scratch.
    `logits` are read only; their row stride may exceed the vocabulary. Raises ValueError for settings that are not made
    here: a `top_k` of 0 or above MOST_CANDIDATES.
    """
    if not (0 < penalty < math.inf) or not (greedy or (temperature > 0 and top_p > 0)):
        raise ValueError(f"no draw with penalty {penalty}, temperature {temperature}, top_p {top_p}")
    if not greedy and not 1 <= top_k <= MOST_CANDIDATES:
        raise ValueError(f"top_k is {top_k}, expected 1 to {MOST_CANDIDATES}")
    rows, vocab = logits.shape
    count, words = len(tokens), -(-vocab // 32)
    shared = {
        "logits": Operand(logits, (rows, vocab), ACTIVATIONS, stride="row_stride", wide=True),
        "slots": Operand(slots, (rows,), INDICES),
        "seen": Operand(seen, (count, words), INDICES, wide=True),
        "maxima": Operand(maxima, (rows, blocks(vocab)), WEIGHTS, wide=True),
    }
    sizes = {"VOCAB": vocab, "WORDS": words, "BLOCKS": blocks(vocab)}
    grid = (rows, -(-blocks(vocab) // _TILE))
    numbers: dict[str, int | float] = {"slot_count": count, "penalty": penalty}
    launch(block_maxima, grid, shared, numbers, {**sizes, "TILE": _TILE, "PENALISED": penalty != 1})
    space = capacity(top_k) if not greedy else 1
    own = {
        "candidates": candidates if candidates is None else Operand(candidates, (rows, space), (torch.int64,)),
        "tokens": Operand(tokens, (count,), INDICES),
        "positions": Operand(positions, (count,), INDICES),
        "seeds": Operand(seeds, (count,), (torch.int64,)),
        "steps": Operand(steps, (count,), (torch.int64,)),
        "results": Operand(results, (rows,), INDICES),
    }
    numbers |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    own_sizes = {"PADDED": triton.next_power_of_2(blocks(vocab)), "CHUNK": _CHUNK, "SPACE": space, "GREEDY": greedy}
    launch(draw_rows, (rows,), {**shared, **own}, numbers, {**sizes, **own_sizes}, warps=16)


def forbid(launch: Launcher, logits: torch.Tensor, masks: torch.Tensor) -> None:
    """Set the logits [rows, vocab] of ids that are not in `masks` to -inf.

    `masks` is [rows, ceil(vocab / 32)] int32, id i at bit i % 32 of word i // 32. The row stride of the logits may
    exceed the vocabulary.
    """
    rows, vocab = logits.shape
    words = -(-vocab // 32)
    tensors = {
        "logits": Operand(logits, (rows, vocab), ACTIVATIONS, stride="row_stride", wide=True),
        "masks": Operand(masks, (rows, words), INDICES, wide=True),
    }
    launch(forbid_ids, (rows, -(-words // _WORDS_A_PROGRAM)), tensors, {}, {
        "VOCAB": vocab, "WORDS": words, "TILE": _WORDS_A_PROGRAM,
    })  # fmt: skip


@triton.jit
def forbid_ids(logits, row_stride, masks, VOCAB: tl.constexpr, WORDS: tl.constexpr, TILE: tl.constexpr):
    """Write -inf where a bit of TILE words of a row is 0."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * TILE + tl.arange(0, TILE)
    words = tl.load(masks + row * WORDS + groups, mask=groups < WORDS, other=-1)
    forbidden = ((words[:, None] >> tl.arange(0, 32)[None, :]) & 1) == 0
    ids = _ids(groups)
    tl.store(logits + row * row_stride + ids, float("-inf"), mask=forbidden & (ids < VOCAB))


@triton.jit
def block_maxima(
    logits,
    row_stride,
    slots,
    seen,
    maxima,
    slot_count,
    penalty,
    VOCAB: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    PENALISED: tl.constexpr,
):
    """Write the largest penalised logit of TILE blocks of a row: inf if one of them is NaN."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row)
    if (slot < 0) | (slot >= slot_count):
        return
    groups = part * (TILE * _GROUPS) + tl.arange(0, TILE * _GROUPS)
    values, known = _read(logits + row * row_stride, seen + slot.to(tl.int64) * WORDS, groups, VOCAB, WORDS, PENALISED)
    values = tl.where(values <= float("inf"), values, float("inf"))  # NaN
    if PENALISED:
        # The penalty keeps the order of what it changes, so only the largest of the seen values needs it.
        top = tl.max(tl.where(known, float("-inf"), values), axis=1)
        of_seen = tl.max(tl.where(known, values, float("-inf")), axis=1)
        top = tl.maximum(top, _penalised(of_seen, penalty))
    else:
        top = tl.max(values, axis=1)
    top = tl.max(tl.reshape(top, [TILE, _GROUPS]), axis=1)
    block = part * TILE + tl.arange(0, TILE)
    tl.store(maxima + row * BLOCKS + block, top, mask=block < BLOCKS)


@triton.jit
def draw_rows(
    logits,
    row_stride,
    slots,
    seen,
    maxima,
    candidates,
    tokens,
    positions,
    seeds,
    steps,
    results,
    slot_count,
    penalty,
    temperature: tl.float64,
    top_p: tl.float64,
    top_k,
    VOCAB: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    SPACE: tl.constexpr,
    GREEDY: tl.constexpr,
):
    """Draw one row's token from its logits and block maxima. Overwrites the row's maxima."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if (slot < 0) | (slot >= slot_count):
        tl.store(results + row, _IDLE)
        return
    logits += row * row_stride
    seen += slot * WORDS
    maxima += row * BLOCKS
    block = tl.arange(0, PADDED)
    tops = tl.load(maxima + block, mask=block < BLOCKS, other=float("-inf"))
    best = tl.max(tops, axis=0)
    if (best == float("inf")) | (best == float("-inf")):
        tl.store(results + row, _NOT_FINITE)
        return

    if GREEDY:
        first = tl.min(tl.where(tops == best, block, PADDED), axis=0)
        groups = first * _GROUPS + tl.arange(0, _GROUPS)
        values, known = _read(logits, seen, groups, VOCAB, WORDS, True)
        values = tl.where(known, _penalised(values, penalty), values)
        token = tl.min(tl.min(tl.where(values == best, _ids(groups), _MOST_ID), axis=1), axis=0)
    else:
        # At least k tokens reach the k-th largest maximum, so no token below it is kept: nor below a lower floor.
        keys = _key(tops)
        lowest = tl.max(_key(tl.full([1], _LOWEST, tl.float32)), axis=0)
        floor = tl.min(tl.where(block < BLOCKS, keys, _MOST_ID), axis=0)
        floor = tl.where(top_k > BLOCKS, lowest, tl.maximum(floor, lowest)).to(tl.int64)
        ceiling = tl.max(keys, axis=0).to(tl.int64) + 1
        reached = tl.sum((keys >= floor).to(tl.int32), axis=0)
        while (reached > top_k + top_k // 4) & (ceiling - floor > 1):
            middle = floor + (ceiling - floor) // 2
            above = tl.sum((keys >= middle).to(tl.int32), axis=0)
            enough = above >= top_k
            floor = tl.where(enough, middle, floor)
            reached = tl.where(enough, above, reached)
            ceiling = tl.where(enough, ceiling, middle)

        # The list of these blocks replaces the maxima; a float32 holds any of their numbers exactly.
        hit = (keys >= floor).to(tl.int32)
        tl.debug_barrier()  # a warp may still be reading the maxima if all hold the same few
        tl.store(maxima + tl.cumsum(hit, axis=0) - 1, block.to(tl.float32), mask=hit != 0)
        tl.debug_barrier()
        candidates += row * SPACE
        found = _collect(logits, seen, maxima, reached, floor, penalty, candidates, VOCAB, WORDS, CHUNK, SPACE)
        # Too many if good tokens share few blocks: then look for a floor between, which only ties can prevent.
        missed = found > SPACE
        ceiling = _key(best).to(tl.int64) + 1
        while missed & (ceiling - floor > 1):
            middle = floor + (ceiling - floor) // 2
            found = _collect(logits, seen, maxima, reached, middle, penalty, candidates, VOCAB, WORDS, CHUNK, SPACE)
            missed = (found > SPACE) | (found < top_k)
            floor = tl.where(found > SPACE, middle, floor)
            ceiling = tl.where(found < top_k, middle, ceiling)
        if missed:
            tl.store(results + row, _TOO_MANY_TIES)
            return
        seed, step = tl.load(seeds + slot), tl.load(steps + slot)
        token = _drawn(_ranked(candidates, found, SPACE), found, seed, step, temperature, top_p, top_k, SPACE)

    tl.store(tokens + slot, token)
    tl.store(positions + slot, tl.load(positions + slot) + 1)
    tl.store(steps + slot, tl.load(steps + slot) + 1)
    word = tl.load(seen + token // 32)
    tl.store(seen + token // 32, word | (1 << (token % 32)))
    tl.store(results + row, token)


@triton.jit
def _ids(groups):
    """Return the token ids [n, 32] of `groups` [n] of 32 tokens."""
    return groups[:, None] * 32 + tl.arange(0, 32)[None, :]


@triton.jit
def _read(logits, seen, groups, VOCAB: tl.constexpr, WORDS: tl.constexpr, PENALISED: tl.constexpr):
    """Return a row's logits in groups of 32 tokens [n, 32], -inf past the vocabulary, and which ids are seen."""
    ids = _ids(groups)
    inside = ids < VOCAB
    values = tl.load(logits + ids, mask=inside, other=float("-inf")).to(tl.float32)
    if PENALISED:
        words = tl.load(seen + groups, mask=groups < WORDS, other=0)
        known = ((words[:, None] >> tl.arange(0, 32)[None, :]) & 1) != 0
    else:
        known = inside
    return values, known


@triton.jit
def _penalised(values, penalty):
    """Return what token_sampling.penalised returns.

    A division for each value would need too many registers. The float64 product is within 2**-52 of the quotient,
    and no quotient of two float32 is that near to the middle between two others: it is rounded as a quotient is.
    """
    inverse = 1 / tl.full([1], penalty, tl.float32).to(tl.float64)
    return tl.where(values > 0, (values.to(tl.float64) * inverse).to(tl.float32), values * penalty)


@triton.jit
def _key(values):
    """Return integers in the order of float32 `values`, the same for 0 and -0."""
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _collect(
    logits,
    seen,
    listed,
    count,
    floor,
    penalty,
    candidates,
    VOCAB: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPACE: tl.constexpr,
):
    """Return how many tokens of the `count` blocks in `listed` reach the key `floor`.

    `candidates` gets the first SPACE of them: the value's key above, the id below, so that larger is better, and of
    equal values the lower id.
    """
    found = 0
    first = 0
    while first < count:
        group = tl.arange(0, CHUNK * _GROUPS)
        entry = first + group // _GROUPS
        block = tl.load(listed + entry, mask=entry < count, other=0).to(tl.int32)
        groups = tl.where(entry < count, block * _GROUPS + group % _GROUPS, WORDS)  # WORDS: past the vocabulary
        values, known = _read(logits, seen, groups, VOCAB, WORDS, True)
        values = tl.where(known, _penalised(values, penalty), values)
        keys = _key(values)
        hit = (keys >= floor.to(tl.int32)).to(tl.int32)  # 64 bits for each key would be many registers
        counts = tl.sum(hit, axis=1)
        before = found + tl.cumsum(counts, axis=0) - counts
        place = before[:, None] + tl.cumsum(hit, axis=1) - hit
        packed = (keys.to(tl.int64) << 32) | (_ids(groups) ^ _MOST_ID).to(tl.int64)
        tl.store(candidates + place, packed, mask=(hit != 0) & (place < SPACE))
        found += tl.sum(counts, axis=0)
        first += CHUNK
    return found


@triton.jit
def _ranked(candidates, found, SPACE: tl.constexpr):
    """Return the `found` candidates in ascending order, _NO_KEY in front of them, [SPACE]: each is put at its rank."""
    tl.debug_barrier()
    place = tl.arange(0, SPACE)
    keys = tl.load(candidates + place, mask=place < found, other=_NO_KEY)
    rank = tl.full([SPACE], SPACE - 1, tl.int32)
    first = 0
    while first < found:
        other = first + tl.arange(0, 4)
        others = tl.load(candidates + other, mask=other < found, other=_NO_KEY)
        rank -= tl.sum((others[None, :] > keys[:, None]).to(tl.int32), axis=1)
        first += 4
    tl.debug_barrier()
    tl.store(candidates + rank, keys, mask=place < found)
    tl.debug_barrier()
    return tl.load(candidates + place, mask=place >= SPACE - found, other=_NO_KEY)


@triton.jit
def _drawn(ranked, found, seed, step, temperature, top_p, top_k, SPACE: tl.constexpr):
    """Return the token that top-k, top-p and the noise choose from the `found` candidates, `ranked` [SPACE]."""
    place = tl.arange(0, SPACE)
    keys = (ranked >> 32).to(tl.int32)
    ids = (ranked & _MOST_ID).to(tl.int32) ^ _MOST_ID
    kth = (tl.max(tl.where(place == SPACE - top_k, ranked, _NO_KEY), axis=0) >> 32).to(tl.int32)
    kept = (place >= SPACE - found) & (keys >= kth)
    values = (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    scores = tl.where(kept, values, 0.0).to(tl.float64) / tl.full([1], temperature, tl.float64)
    if top_p < 1:
        top = tl.max(tl.where(kept, scores, float("-inf")), axis=0)
        weights = tl.where(kept, tl.exp(scores - top), 0.0)
        shares = weights / tl.sum(weights, axis=0)
        rising = tl.cumsum(shares, axis=0)
        cut = 1 - tl.full([1], top_p, tl.float64)  # in the interpreter, top_p is a number without a type
        if tl.max((tl.abs(rising - cut) < 1e-11).to(tl.int32), axis=0) > 0:
            # So near that the order of the additions decides: one after the other, as on the CPU.
            total = tl.sum(shares, axis=0) * 0
            index = SPACE - found
            while index < SPACE:
                total += tl.sum(tl.where(place == index, shares, 0.0), axis=0)
                rising = tl.where(place == index, total, rising)
                index += 1
        kept &= (rising > cut) | (place == SPACE - 1)
    noisy = tl.where(kept, scores + _gumbel(seed, step, ids), float("-inf"))
    chosen = tl.max(tl.where(noisy == tl.max(noisy, axis=0), place, -1), axis=0)
    chosen = tl.where(chosen < 0, SPACE - 1, chosen)  # no score is a number, at an extreme temperature
    return tl.sum(tl.where(place == chosen, ids, 0), axis=0)


@triton.jit
def _gumbel(seed, step, ids):
    """Return the noise of gumbel_noise.gumbel for the ids of one row."""
    key = _mix(_mix(seed + 0x632BE59BD9B4E019) ^ step)
    bits = _mix(key ^ (ids.to(tl.int64) * -0x61C8864680B583EB))
    uniform = (((bits >> 11) & (2**53 - 1)).to(tl.float64) + 0.5) * 2.0**-53
    return -tl.log(-tl.log(uniform))


@triton.jit
def _mix(x):
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & (2**33 - 1))
