"""Decides which worker gets which prompt, and what becomes of the rows of a lost worker. Does not use Ray.

Prompts are pulled from the job only for a worker with free slots, at first a small unit at a time, so that the first
worker does not empty a short table. Rows of a lost worker run last, each alone on a worker; one whose worker is lost
again fails (`engines.suspects`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from gxr_batch.engines.base import StopRequest
from gxr_batch.engines.ray.worker_clocks import Meter
from gxr_batch.engines.suspects import Suspects
from gxr_batch.records import Completion, Key, Prompt

# A worker of 64 slots is filled in this many units, so that others get theirs in between; after that it gets as many
# prompts as it has free slots, since calls take most of the driver's time.
_UNITS_TO_FILL = 8


@dataclass
class Taken:
    """A prompt that was pulled and is unanswered: when it was pulled, and when a worker got it."""

    prompt: Prompt
    taken_at: float
    handed: tuple[float, float]


@dataclass
class Hand:
    """What the driver knows of a worker's rows: its slots (0 = not open), the rows it holds, or one that runs alone.

    `dealt_at` is when it last got any (time.monotonic seconds); `filled` is True once its slots have all been in use.
    """

    slots: int = 0
    flight: dict[Key, Taken] = field(default_factory=dict)
    alone: bool = False
    rows: int = 0
    dealt_at: float = 0.0
    filled: bool = False


class Dealer:
    """Deals the prompts of one stream to the workers' hands."""

    def __init__(self, prompts: Iterator[Prompt], stop: StopRequest, hands: list[Hand]) -> None:
        self._prompts, self._stop, self._hands = prompts, stop, hands
        self._suspects, self._alone = Suspects(), deque[Taken]()
        self._meter = Meter()
        self._exhausted, self.again = False, 0
        # Pulled before any worker is asked: a stream without prompts ends at once.
        self._first = self._pull()

    @property
    def last(self) -> bool:
        """True if workers get no more prompts, except rows of a lost one."""
        return self._first is None and (self._exhausted or not self._stop.admitting)

    @property
    def over(self) -> bool:
        """True if nothing is in flight and nothing more may be dealt."""
        return self.last and not self.in_flight and not (self._alone and self._stop.admitting)

    @property
    def in_flight(self) -> int:
        """How many rows the workers hold."""
        return sum(len(hand.flight) for hand in self._hands)

    def wants_more(self, hand: Hand) -> bool:
        """Return whether this worker has free slots and there is something to deal."""
        return not self.last and not hand.alone and len(hand.flight) < hand.slots

    def deal(self, hand: Hand) -> tuple[Prompt, ...]:
        """Return the next unit for a worker, empty if it has no free slot or there is nothing to deal."""
        dealt: list[Taken] = []
        unit = hand.slots if hand.filled else max(1, hand.slots // _UNITS_TO_FILL)
        while len(dealt) < unit and self.wants_more(hand):
            prompt, self._first = self._first or self._pull(), None
            if prompt is not None:
                now = self._meter.mark()
                dealt.append(self._hand_over(hand, Taken(prompt, now[0], now)))
        if self.last and self._stop.admitting and self._alone and hand.slots and not hand.flight:
            hand.alone = True
            dealt.append(self._hand_over(hand, self._alone.popleft()))
        hand.filled = hand.filled or len(hand.flight) >= hand.slots
        self._count_busy()
        # The function that shows text stays in this process.
        return tuple(entry.prompt._replace(on_text=None) for entry in dealt)

    def settle(self, hand: Hand, completion: Completion) -> Completion | None:
        """Return a worker's completion, with its times in the pool; None if the row is no longer that worker's."""
        taken = hand.flight.pop(completion.key, None)
        if taken is None:
            return None
        self._suspects.settled(completion.key)
        part = self._meter.part(taken.handed)
        hand.alone, hand.rows = False, hand.rows + 1
        self._count_busy()
        if taken.prompt.on_text is not None and completion.text:
            taken.prompt.on_text(completion.text)
        return completion._replace(
            seconds_queued=taken.handed[0] - taken.taken_at + completion.seconds_queued,
            seconds_share=completion.seconds_share * part,
        )

    def lose(self, hand: Hand) -> list[Taken]:
        """Take back the rows of a lost worker; return those that were lost with their worker too often."""
        condemned = []
        self._suspects.died(hand.flight)
        for entry in list(hand.flight.values()):
            if self._suspects.is_condemned(entry.prompt.key):
                condemned.append(entry)
            else:
                self._alone.append(entry)
                self.again += 1
        hand.flight.clear()
        hand.slots, hand.alone, hand.filled = 0, False, False
        self._count_busy()
        return condemned

    def close(self) -> None:
        """Forget the rows in flight: they are still to do."""
        for hand in self._hands:
            hand.flight.clear()
            hand.alone = hand.filled = False

    def _pull(self) -> Prompt | None:
        prompt = next(self._prompts, None) if self._stop.admitting and not self._exhausted else None
        self._exhausted = self._exhausted or (prompt is None and self._stop.admitting)
        return prompt

    def _hand_over(self, hand: Hand, taken: Taken) -> Taken:
        taken.handed = self._meter.mark()
        hand.dealt_at = taken.handed[0]
        hand.flight[taken.prompt.key] = taken
        return taken

    def _count_busy(self) -> None:
        self._meter.busy(sum(bool(hand.flight) for hand in self._hands))
