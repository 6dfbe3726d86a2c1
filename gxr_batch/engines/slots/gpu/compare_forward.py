"""Compares our forward pass with the library's on the GPU itself, before the first row.

Both compute the same prompts: short, longer than a page, across the window; alone and next to each other; and two
decode steps after each. The difference of bfloat16 logits of a sound pass is about one percent. The library overflows
in float16 where ours does not: with such weights it computes in float32, each layer's converted while it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from gxr_batch.engines.slots.decoder_layout import decoder_of
from gxr_batch.engines.slots.gpu.forward import Forward, Packed, Piece, in_calls

# |ours - theirs| / |theirs| over a token's logits, in the Euclidean norm.
_MOST_DIFFERENCE = {torch.bfloat16: 0.06, torch.float16: 0.02, torch.float32: 1e-3}
_STEPS = 2
_LENGTHS = (5, 70)
_ACROSS = 40  # tokens beyond the window
_HEAD_ROWS = 8192  # of the head that are in float32 at a time


class Comparison(NamedTuple):
    """How our logits differ from the library's, empty if they agree; and whether a row's bits are the same alone."""

    why: str
    same_bits: bool


def compare(model: Any, forward: Forward) -> Comparison:
    """Compare our logits with the library's, and those of rows next to others with those alone.

    The cache must hold no row.
    """
    prompts = _prompts(forward)
    most = _MOST_DIFFERENCE[forward.weights.dtype]
    theirs = [_library(model, ids, forward.weights.device) for ids in prompts]
    alone = [_ours(forward, [ids])[0] for ids in prompts]
    together = _ours(forward, prompts)
    same = all(torch.equal(own, other) for own, other in zip(alone, together, strict=True))
    for how, ours in (("alone", alone), ("together", together)):
        for ids, own, other in zip(prompts, ours, theirs, strict=True):
            if not bool(own.isfinite().all()):
                return Comparison(f"its logits of a prompt of {len(ids) - _STEPS} tokens {how} are not finite", same)
            worst = float(((own - other).norm(dim=-1) / other.norm(dim=-1)).max())
            if not worst <= most:
                return Comparison(
                    f"its logits of a prompt of {len(ids) - _STEPS} tokens {how} differ by {worst:.1%}", same
                )
    return Comparison("", same)


def _prompts(forward: Forward) -> list[list[int]]:
    """Return prompts with the tokens of the decode steps at their end."""
    window = max(layer.window for layer in forward.weights.layers)
    lengths = [*_LENGTHS, *([window + _ACROSS] if window else [])]
    most = forward.cache.capacity
    few = min(forward.weights.vocab - 2, 1000)
    lengths = sorted({min(length, most - _STEPS) for length in lengths})[: forward.cache.slots]
    while not forward.cache.has_room(*(length + _STEPS for length in lengths)):
        del lengths[0]  # the longest fits alone
    return [[2 + (7 * step + length) % few for step in range(length + _STEPS)] for length in lengths]


@torch.inference_mode()
def _library(model: Any, ids: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return the library's logits [1 + steps, vocab], float32, of the prompt's end and of the tokens after it."""
    arguments = {"input_ids": torch.tensor([ids], device=device), "use_cache": False}
    if model.dtype == torch.float16:
        with _in_float32(decoder_of(model)):
            last = decoder_of(model)(**arguments).last_hidden_state[0, -1 - _STEPS :]
        return torch.cat([last @ rows.float().T for rows in model.lm_head.weight.split(_HEAD_ROWS)], dim=-1)
    hidden = decoder_of(model)(**arguments).last_hidden_state
    logits: torch.Tensor = model.lm_head(hidden[0, -1 - _STEPS :]).float()
    return logits


@contextmanager
def _in_float32(decoder: Any) -> Iterator[None]:
    """Let a decoder compute in float32 from its embeddings on, with one layer's weights in float32 at a time."""
    stored: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    def widen(layer: Any, _: Any) -> None:
        for parameter in layer.parameters():
            stored.append((parameter, parameter.data))
            parameter.data = parameter.data.float()

    def restore(*_: Any) -> None:
        while stored:
            parameter, data = stored.pop()
            parameter.data = data

    hooks = [decoder.embed_tokens.register_forward_hook(lambda *call: call[-1].float())]
    for layer in decoder.layers:
        hooks += [layer.register_forward_pre_hook(widen), layer.register_forward_hook(restore)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        restore()


def _ours(forward: Forward, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return our logits of prompts that are computed side by side, each [1 + steps, vocab] float32."""
    slots = list(range(len(prompts)))
    for slot, ids in zip(slots, prompts, strict=True):
        forward.cache.take(slot, len(ids))
    try:
        _upload(forward, slots)
        found = [[row] for row in _prefilled(forward, prompts)]
        for step in range(_STEPS):
            for own, row in zip(found, _decoded(forward, prompts, step), strict=True):
                own.append(row)
    finally:
        for slot in slots:
            forward.cache.release(slot)
    return [torch.stack(own) for own in found]


def _upload(forward: Forward, slots: Sequence[int]) -> None:
    tables = forward.cache.row_tables(slots)
    for group, table in zip(forward.cache.groups, tables, strict=True):
        group.table[: len(slots)] = torch.from_numpy(table).to(group.table.device)


def _prefilled(forward: Forward, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Compute the prompts without their last tokens, at most a chunk of tokens in a call."""
    device = forward.weights.device
    pieces = [Piece(slot, ids[:-_STEPS], 0) for slot, ids in enumerate(prompts)]
    found: list[torch.Tensor] = []
    for call in in_calls(pieces, forward.chunk):
        logits = forward.prefill(Packed.of(call, lambda arrays: [_int32(array, device) for array in arrays]))
        if logits is not None:
            found += logits.to(torch.float32, copy=True)
    return found


def _decoded(forward: Forward, prompts: Sequence[Sequence[int]], step: int) -> list[torch.Tensor]:
    device = forward.weights.device
    at = [len(ids) - _STEPS + step for ids in prompts]
    tokens = [ids[place] for ids, place in zip(prompts, at, strict=True)]
    logits = forward.decode(_int32(tokens, device), _int32(at, device), _int32(range(len(prompts)), device))
    return list(logits.to(torch.float32, copy=True))


def _int32(values: Any, device: torch.device) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.int32, device=device)
