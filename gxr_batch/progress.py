"""Where an invocation stands, as the runner counts it and the command line shows it."""

from __future__ import annotations

from dataclasses import dataclass

from gxr_batch.engines.base import Pulse, Workers
from gxr_batch.ledger import Counts
from gxr_batch.records import Result


@dataclass(kw_only=True)
class Progress:
    """Where an invocation stands: `counts` is about the whole table, everything else about this invocation.

    `wanted` keys are to be generated; `done` and `failed` came out of the engine, `rejected` could not become a prompt,
    `withheld` were kept from the engine by identifier screening, `cut` prompts lost the end of their longest cell.
    """

    counts: Counts
    wanted: int = 0
    done: int = 0
    failed: int = 0
    rejected: int = 0
    withheld: int = 0
    cut: int = 0
    new_tokens: int = 0
    rows_in_flight: int = 0
    memory_bytes: int = 0
    splits: int = 0
    retries: int = 0
    workers: Workers | None = None
    seconds: float = 0.0

    def book(self, result: Result) -> None:
        """Count a row that came out of the engine."""
        self.done += 1
        self.failed += result.status == "failed"
        self.new_tokens += result.new_tokens or 0

    def pulse(self, pulse: Pulse) -> None:
        """Take over what the engine says of itself."""
        self.rows_in_flight, self.memory_bytes = pulse.rows_in_flight, pulse.memory_bytes
        self.splits, self.retries, self.workers = pulse.splits, pulse.retries, pulse.workers
