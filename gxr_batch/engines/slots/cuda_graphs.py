"""Decode steps recorded once per shape and then replayed, so that the host no longer launches every kernel.

Follows PyTorch's documentation of CUDA graphs: inputs and outputs live at fixed addresses, a few runs on a side stream
precede the recording, and all recordings share one memory pool. Off by default: it has not been run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# (tokens [rows, 1], columns [rows, 1], first slot, attended length) -> logits [rows, vocab]
Step = Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor]
# Records one run of a function; returns its output, at a fixed address, and a function that replays it.
Record = Callable[[Callable[[], torch.Tensor]], tuple[torch.Tensor, Callable[[], None]]]
_WARM_UP_RUNS = 3


class _Recorded(NamedTuple):
    tokens: torch.Tensor
    columns: torch.Tensor
    logits: torch.Tensor
    replay: Callable[[], None]


class StepGraphs:
    """The recordings of one model, made when a shape first occurs. Shapes are few: buckets of rows and of columns."""

    def __init__(self, step: Step, record: Record, logits: torch.Tensor) -> None:
        """`logits` [rows, vocab] is the output of all recordings: separate ones would add up to gigabytes."""
        self._step, self._record, self._logits = step, record, logits
        self._recorded: dict[tuple[int, int, int], _Recorded] = {}

    def run(self, tokens: torch.Tensor, columns: torch.Tensor, first: int, length: int) -> torch.Tensor:
        """Return the step's logits; the next step overwrites them."""
        key = (first, len(tokens), length)
        if key not in self._recorded:
            own_tokens, own_columns = tokens.clone(), columns.clone()
            out = self._logits[: len(tokens)]
            logits, replay = self._record(lambda: out.copy_(self._step(own_tokens, own_columns, first, length)))
            self._recorded[key] = _Recorded(own_tokens, own_columns, logits, replay)
        recorded = self._recorded[key]
        recorded.tokens.copy_(tokens)
        recorded.columns.copy_(columns)
        recorded.replay()
        return recorded.logits


def cuda_recorder() -> Record:
    """Return a recorder for the current GPU, which must be the model's."""
    pool: Any = torch.cuda.graph_pool_handle()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def record(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_RUNS):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=side):
            logits = run()
        return logits, graph.replay

    return record
