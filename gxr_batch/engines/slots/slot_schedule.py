"""Which rows are admitted, into which slots, and how many rows a decode step computes. Plain Python: no torch or clock.

Prompts arrive longest first. Free slots are refilled several at a time, because a prefill stops every row that decodes;
at the end the step shrinks to the bucket that holds the remaining rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

BUCKETS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def bucket(rows: int, slots: int) -> int:
    """Return how many rows a step computes for `rows` active ones: the next bucket, at most all slots."""
    return min(next((size for size in BUCKETS if size >= rows), slots), slots)


def slots_for_memory(budget_bytes: int, bytes_a_token: int, capacity: int, most: int) -> int:
    """Return how many slots of `capacity` tokens fit the budget: the largest bucket that fits, else as many as fit."""
    fit = min(budget_bytes // max(bytes_a_token * capacity, 1), most)
    return max((size for size in BUCKETS if size <= fit), default=max(int(fit), 1))


@dataclass
class SlotPlan:
    """Tracks the slots in use. Always assigns the lowest free one, so that active rows stay together."""

    slots: int
    refill: int  # admit only when this many slots are free, unless nothing is running
    taken: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, slots: int, most_new: int) -> SlotPlan:
        """Return an empty plan that refills in eighths of the slots, but waits for no more than `most_new` free ones.

        A prefill takes so many rows: waiting for more would leave slots empty and save no prefill.
        """
        return cls(slots=slots, refill=max(1, min(slots // 8, most_new)))

    @property
    def free(self) -> int:
        """How many slots hold no row."""
        return self.slots - len(self.taken)

    def to_admit(self) -> int:
        """Return how many rows to admit now."""
        return self.free if not self.taken or self.free >= self.refill else 0

    def take(self) -> int:
        """Take the lowest free slot."""
        slot = next(number for number in range(self.slots) if number not in self.taken)
        self.taken.add(slot)
        return slot

    def release(self, slot: int) -> None:
        """Release a slot."""
        self.taken.remove(slot)

    def moves(self) -> list[tuple[int, int]]:
        """Move rows down so that the active ones fit the first `bucket` slots; return (from, to) pairs."""
        limit = bucket(len(self.taken), self.slots)
        low = [number for number in range(limit) if number not in self.taken]
        pairs = list(zip(sorted((slot for slot in self.taken if slot >= limit), reverse=True), low, strict=False))
        for source, target in pairs:
            self.taken.remove(source)
            self.taken.add(target)
        return pairs
