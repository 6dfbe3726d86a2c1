"""How much memory the GPU's forward pass reserves at the start: buffers, what each slot needs, and pages.

Computed from the configuration alone, so that `check` can tell it without a device, and neither torch nor Triton is
imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gxr_batch.engines.slots.gpu.page_groups import PAGE_TOKENS, GroupShape, groups_of
from gxr_batch.engines.slots.slot_schedule import BUCKETS

SPLIT_TOKENS = 256  # positions that one program of the decode attention reads
MOST_SLOTS = 512
# The tokens that a row takes on average, for choosing the number of slots: rows that need more wait for pages.
_USUAL_TOKENS = 384
# Most tokens of a prefill call, largest first: enough to fill a GPU, few enough that decoding rows wait briefly.
_CHUNKS = (2048, 1024, 512)
# cuBLAS's workspace and what the caching allocator rounds up.
_SPARE_BYTES = 96 * 2**20


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The numbers of a model that decide its memory, and the bytes of an element.

    `wide_residual`: weights in float16, with which the residual is in float32.
    """

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    windows: tuple[int, ...]
    element_bytes: int
    wide_residual: bool = False


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What is reserved: `slots` rows of at most `capacity` tokens, `pages` of each group, prefills of `chunk` tokens.

    `bytes` counts all of it. `rows` of `capacity` tokens fit at the same time.
    """

    slots: int
    capacity: int
    chunk: int
    groups: tuple[GroupShape, ...]
    pages: tuple[int, ...]
    bytes: int

    @property
    def rows(self) -> int:
        """How many rows of the full capacity fit in the pages."""
        return min(pages // group.columns for pages, group in zip(self.pages, self.groups, strict=True))

    @property
    def reserved(self) -> int:
        """What of `bytes` is taken as soon as it is opened."""
        return self.bytes - _SPARE_BYTES


def plan(
    sizes: Sizes, *, capacity: int, budget: int, slots: int | None = None, chunk: int | None = None
) -> MemoryPlan | None:
    """Return the plan with the most slots within `budget` bytes, or with `slots`; None if not even one row fits.

    With the `chunk` of another plan, its buffers for prefills suffice for this one.
    """
    choices = [slots] if slots else [size for size in reversed(BUCKETS) if size <= MOST_SLOTS] + [4, 2, 1]
    for count in choices:
        for tokens in [chunk] if chunk else _CHUNKS:
            if chunk and count > chunk:
                continue
            found = _plan(sizes, count, capacity, min(tokens, max(capacity, count)), budget)
            if found is not None and (slots or _roomy(found, count)):
                return found
    return None


def _roomy(found: MemoryPlan, slots: int) -> bool:
    usual = min(found.capacity, _USUAL_TOKENS)
    needed = [min(-(-usual // PAGE_TOKENS), group.columns) for group in found.groups]
    return all(pages >= slots * need for pages, need in zip(found.pages, needed, strict=True))


def _plan(sizes: Sizes, slots: int, capacity: int, chunk: int, budget: int) -> MemoryPlan | None:
    groups = tuple(groups_of(sizes.windows, capacity, chunk))
    fixed = buffer_bytes(sizes, slots=slots, capacity=capacity, tokens=max(chunk, slots)) + _SPARE_BYTES
    a_page = 2 * sizes.kv_heads * sizes.head_size * PAGE_TOKENS * sizes.element_bytes
    group_bytes = [a_page * len(group.layers) for group in groups]
    # In proportion to what a full row needs of each group, and never more than all slots can use.
    full_row = sum(cost * group.columns for cost, group in zip(group_bytes, groups, strict=True))
    rows = min((budget - fixed) / full_row, slots + 1)
    if rows < 1:
        return None
    pages = tuple(int(rows * group.columns) for group in groups)
    total = fixed + sum(cost * count for cost, count in zip(group_bytes, pages, strict=True))
    return MemoryPlan(slots=slots, capacity=capacity, chunk=chunk, groups=groups, pages=pages, bytes=total)


def buffer_bytes(sizes: Sizes, *, slots: int, capacity: int, tokens: int) -> int:
    """Return the bytes of the buffers of `forward.Forward` and of what `slot_state.SlotState` knows of every slot.

    With those of the angles of every position, which `fused_weights.fuse` computes for each kind of layer.
    """
    element = sizes.element_bytes
    queries = sizes.heads * sizes.head_size
    qkv = queries + 2 * sizes.kv_heads * sizes.head_size
    a_token = 3 * sizes.hidden * element
    if sizes.wide_residual:
        a_token += sizes.hidden * (4 - element) + 4  # and a factor
    a_token += (qkv + 2 * queries + 3 * sizes.inner) * element + 4
    splits = -(-capacity // SPLIT_TOKENS)
    a_slot = sizes.heads * splits * (sizes.head_size + 2) * 4 + sizes.hidden * element
    a_slot += sizes.vocab * element  # logits
    a_slot += sizes.vocab // 8 + sizes.vocab // 256 * 4 + 1024 * 8 + 64  # seen ids, block maxima, candidates, numbers
    angles = len(set(sizes.windows)) * capacity * sizes.head_size * 4
    return tokens * a_token + slots * a_slot + angles


def windows_of(layer_kinds: Sequence[str], window: int) -> tuple[int, ...]:
    """Return each layer's window, 0 for one that sees all positions."""
    return tuple(window if kind == "sliding_attention" else 0 for kind in layer_kinds)
