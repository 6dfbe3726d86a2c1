"""The KV cache in pages: a row holds as many as its prompt and answer need, and shares those of its template's prefix.

Layers that see all positions and layers with a window are two groups with their own pages, since a row needs fewer of
the latter: their table is a ring in which page j of a row is at column j modulo the columns. A row gets all its pages
when it is admitted, so no step ever waits for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from gxr_batch.engines.slots.gpu.page_groups import PAGE_TOKENS, GroupShape


class _Pages:
    """The pages of one group: which are free, and the table on the host and on the device."""

    def __init__(
        self,
        shape: GroupShape,
        *,
        slots: int,
        pages: int,
        page: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`page` is (key-value heads, tokens, head size)."""
        self.shape, self.count = shape, pages
        self.free = list(range(pages))
        self.rows = np.zeros((slots, shape.columns), np.int32)
        self.table = torch.zeros(slots, shape.columns, dtype=torch.int32, device=device)
        # Zeros: a masked position still takes part in a product, and 0 x NaN is NaN.
        self.of_layer = {layer: torch.zeros(pages, 2, *page, dtype=dtype, device=device) for layer in shape.layers}

    def resize(self, pages: int) -> None:
        """Reserve so many pages, one layer after the other: at any time only one layer's are there twice."""
        for layer in self.of_layer:
            self.of_layer[layer] = _resized(self.of_layer[layer], pages)
            torch.cuda.empty_cache()  # what was freed is too small for the next layer; does nothing without CUDA

    def extend(self, table: torch.Tensor) -> None:
        """Use `table`, which holds the one before, and the pages that all layers have."""
        self.table, rows = table, self.rows
        self.rows = np.zeros(table.shape, np.int32)
        self.rows[: len(rows)] = rows
        before, self.count = self.count, min(map(len, self.of_layer.values()))
        self.free.extend(range(before, self.count))


def _resized(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the tensor with so many rows: as many of the old ones as fit, then zeros."""
    if len(tensor) == rows:
        return tensor
    made = torch.zeros(rows, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    kept = min(len(tensor), rows)
    made[:kept].copy_(tensor[:kept])
    return made


@dataclass
class Prefix:
    """A prompt's beginning that rows share: whole pages by group, how many rows use them, and if they are computed."""

    tokens: int
    pages: tuple[list[int], ...]
    users: int = 0
    ready: bool = False


@dataclass
class _Held:
    pages: tuple[list[int], ...]
    prefix: Prefix | None = None


@dataclass
class PagedCache:
    """The pages of all layers. Slot and row are as in the loop; the caller uploads the tables of changed slots."""

    slots: int
    capacity: int
    groups: tuple[_Pages, ...]
    page_tokens: int
    _held: dict[int, _Held] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        shapes: Sequence[GroupShape],
        *,
        slots: int,
        capacity: int,
        pages: Sequence[int],
        kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
        page_tokens: int = PAGE_TOKENS,
    ) -> PagedCache:
        """Reserve `pages` of each group."""
        page = (kv_heads, page_tokens, head_size)
        groups = [
            _Pages(shape, slots=slots, pages=most, page=page, dtype=dtype, device=device)
            for shape, most in zip(shapes, pages, strict=True)
        ]
        return cls(slots, capacity, tuple(groups), page_tokens)

    @property
    def pages(self) -> list[int]:
        """How many pages each group has, free or not."""
        return [group.count for group in self.groups]

    def resize(self, pages: Sequence[int]) -> None:
        """Reserve `pages` of each group, no fewer than it has; those of rows keep numbers and contents.

        If it raises for lack of memory, the cache is used as before, and another call sets the number of pages again.
        """
        for group, count in zip(self.groups, pages, strict=True):
            group.resize(count)

    def extend(self, slots: int) -> None:
        """Use the pages that `resize` reserved, and so many slots."""
        tables = [_resized(group.table, slots) for group in self.groups]
        for group, table in zip(self.groups, tables, strict=True):
            group.extend(table)
        self.slots = slots

    def layer(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's pages [pages, 2, heads, tokens, size] and its table [slots, columns]."""
        group = next(one for one in self.groups if number in one.of_layer)
        return group.of_layer[number], group.table

    def has_room(self, *tokens: int) -> bool:
        """Return whether a row of so many tokens, or several, get their pages now, without a shared prefix."""
        needs = zip(*map(self._columns, tokens), strict=True)
        return all(sum(need) <= len(group.free) for need, group in zip(needs, self.groups, strict=True))

    def take(self, slot: int, tokens: int, prefix: Prefix | None = None) -> None:
        """Give a free slot the pages for a row of so many tokens, the first of them those of `prefix`.

        `has_room` was asked. A row whose ring would overwrite the prefix must not share it: see `may_share`.
        """
        own = []
        for group, need, index in zip(self.groups, self._columns(tokens), range(len(self.groups)), strict=True):
            shared = prefix.pages[index] if prefix else []
            pages = [group.free.pop() for _ in range(need - len(shared))]
            group.rows[slot, :need] = [*shared, *pages]
            own.append(pages)
        if prefix:
            prefix.users += 1
        self._held[slot] = _Held(tuple(own), prefix)

    def release(self, slot: int) -> None:
        """Take back a slot's pages, if it has any."""
        held = self._held.pop(slot, None)
        if held is None:
            return
        for group, pages in zip(self.groups, held.pages, strict=True):
            group.free.extend(reversed(pages))
        if held.prefix:
            held.prefix.users -= 1

    def move(self, slot: int, target: int) -> None:
        """Give a slot's pages to a free slot."""
        self._held[target] = self._held.pop(slot)
        for group in self.groups:
            group.rows[target] = group.rows[slot]

    def full_pages(self, tokens: int) -> int:
        """Return how many whole pages so many tokens fill: what a prefix can share."""
        return tokens // self.page_tokens

    def may_share(self, tokens: int, prefix_tokens: int) -> bool:
        """Return whether a row of so many tokens leaves a prefix's pages alone: no ring comes round to them."""
        whole = -(-tokens // self.page_tokens)
        return all(whole <= group.shape.columns for group in self.groups) and prefix_tokens >= self.page_tokens

    def make_prefix(self, slot: int, tokens: int) -> Prefix:
        """Return a prefix of the first pages of a slot that holds them; they no longer belong to the slot."""
        count = self.full_pages(tokens)
        held = self._held[slot]
        shared = tuple(pages[:count] for pages in held.pages)
        made = Prefix(count * self.page_tokens, shared, users=1)
        self._held[slot] = _Held(tuple(pages[count:] for pages in held.pages), made)
        return made

    def drop(self, prefix: Prefix) -> None:
        """Take back the pages of a prefix without users."""
        for group, pages in zip(self.groups, prefix.pages, strict=True):
            group.free.extend(reversed(pages))

    def row_tables(self, slots: Sequence[int]) -> list[npt.NDArray[np.int32]]:
        """Return the tables of these slots by group, [slots, columns]."""
        return [group.rows[list(slots)] for group in self.groups]

    def _columns(self, tokens: int) -> list[int]:
        whole = -(-tokens // self.page_tokens)
        return [min(whole, group.shape.columns) for group in self.groups]
