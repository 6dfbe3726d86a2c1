"""What the loop needs from a model: prefill rows, decode one token of many rows, copy a shared prefix, find candidates.

There are two backends: `native` (our forward pass, on CPUs with AVX-512 BF16) and `library_backend` (that of any causal
model).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from gxr_batch.engines.slots.token_sampling import Candidates, Seen
    from gxr_batch.job.sampling import Sampling
    from gxr_batch.models.form_tokens import Masks

# Shared prefixes kept at a time, one per template of a run; further templates get none.
PREFIX_SLOTS = 4


class Backend(Protocol):
    """A loaded model with a preallocated KV cache, column = position.

    Rows decode in slots 0 to `slots` - 1 of `capacity` tokens each; another PREFIX_SLOTS after them hold shared
    prefixes.
    """

    name: str
    slots: int
    least_rows: int  # a step with fewer rows computes, and takes memory for, this many
    capacity: int
    vocab: int
    device: torch.device

    def prefill(self, rows: Sequence[tuple[int, Sequence[int], int]]) -> torch.Tensor:
        """Run (slot, ids, first position) of each row through the model. Returns the last logits, [rows, vocab]."""
        ...

    def decode(self, slots: Sequence[int], ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Run one token of each row through the model. Returns the logits [rows, vocab] in the order of `slots`."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of one slot to another."""
        ...

    def clear(self, slot: int) -> None:
        """Reset a slot that holds NaN or infinity: masked columns still take part in sums, and 0 x NaN is NaN."""
        ...

    def forbid(self, logits: torch.Tensor, masks: Masks) -> None:
        """Set the logits [rows, vocab] of ids that are not in the masks (`models.form_tokens.Allowed`) to -inf."""
        ...

    def candidates(self, logits: torch.Tensor, seen: Seen, sampling: Sampling) -> Candidates:
        """Return what top-k keeps of each row; if a row is not finite, its first value is NaN or infinite."""
        ...

    def close(self) -> None:
        """Release the memory."""
        ...
