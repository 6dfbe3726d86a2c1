"""The slotted KV cache for a library model's forward pass: one slot per row, column = position; no step moves data.

Layers write in place and return views, so a step neither concatenates nor compacts. The mask alone decides what a row
attends to; stale columns beyond a row's position are masked out.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

# The attended length grows in steps, so that kernels see few shapes and bits do not depend on other rows' lengths.
STEP = 64


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # transformers types it not
    """Keys and values of one layer, [slots, kv_heads, capacity, head_dim]."""

    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate on the device and in the type of the first keys."""
        _, heads, _, dim = key_states.shape
        shape = (self._cache.slots, heads, self._cache.capacity)
        self.keys = torch.zeros(*shape, dim, dtype=key_states.dtype, device=key_states.device)
        self.values = torch.zeros(*shape, value_states.shape[-1], dtype=value_states.dtype, device=value_states.device)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [rows, kv_heads, tokens, head_dim] at the call's slots and columns; return the views to attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        rows, columns = self._cache.place(key_states.device)
        self.keys[rows, :, columns] = key_states.transpose(1, 2)
        self.values[rows, :, columns] = value_states.transpose(1, 2)
        first, last, length = self._cache.view
        return self.keys[first:last, :, :length], self.values[first:last, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the attended length; unused, since the model gets ready-made masks."""
        return self._cache.view[2], 0

    def get_seq_length(self) -> int:
        """Return 0: the model gets positions as an argument, the cache never counts them."""
        return 0

    def get_max_length(self) -> int:
        """Return the capacity in tokens."""
        return self._cache.capacity


class SlotCache(Cache):
    """All layers, and where the current call writes and reads."""

    def __init__(self, layers: int, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self.view = (0, slots, 0)
        self._rows = self._columns = torch.empty(0, dtype=torch.long)
        self._slot_layers = [SlotLayer(self) for _ in range(layers)]
        super().__init__(layers=list(self._slot_layers))

    def aim(self, rows: torch.Tensor, columns: torch.Tensor, view: tuple[int, int, int]) -> None:
        """Set where the next pass writes ([rows, 1] and [rows, tokens]) and which (first, last, length) it reads."""
        self._rows, self._columns, self.view = rows, columns, view

    def place(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return slots and columns of the current call on a layer's device."""
        if self._rows.device != device:
            return self._rows.to(device), self._columns.to(device)
        return self._rows, self._columns

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of one slot to another, in every layer."""
        for stored in self._stored():
            stored[target, :, :length] = stored[source, :, :length]

    def clear(self, slot: int) -> None:
        """Overwrite a slot with zeros, in every layer."""
        for stored in self._stored():
            stored[slot] = 0

    def release(self) -> None:
        """Give back the memory of all layers. They and the cache refer to each other, so it would stay otherwise."""
        for layer in self._slot_layers:
            layer.keys = layer.values = None

    def _stored(self) -> list[torch.Tensor]:
        tensors = [tensor for layer in self._slot_layers for tensor in (layer.keys, layer.values)]
        return [tensor for tensor in tensors if tensor is not None]


def attended(length: int, capacity: int) -> int:
    """Return the columns to attend to for rows of at most `length` tokens."""
    return min(-(-length // STEP) * STEP, capacity)
