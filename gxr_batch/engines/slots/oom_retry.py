"""Keeps model calls running: fewer rows per call while memory is short, and isolation of a row that breaks the model.

If the engine is reproducible, splitting changes no text: a row's numbers do not depend on the rows computed with it.
models/device_memory computes this run's share of a device, models/read_weights handles running out of memory while
loading, and the generate engine halves its batches in its session.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from gxr_batch.errors import EngineFailed
from gxr_batch.models.device_memory import out_of_memory

T = TypeVar("T")
# Calls that must succeed before more rows are tried in one again; doubled after each attempt that came too early.
_CALM_CALLS = 64
_CALM_MOST = 4096


class NoMemory(Exception):
    """Not even the smallest call fits in memory now."""


class Splitter:
    """Runs a call over rows, in as many pieces as necessary.

    `splits` counts how often a call had to be made smaller for lack of memory.
    """

    def __init__(self, most: int, least: int, vocab: int, device: torch.device) -> None:
        """Begin with `most` rows per call; fewer than `least` rows would not take less memory.

        `vocab` and `device` are those of the logits.
        """
        self.most = self.now = max(most, 1)
        self.least = least
        self._nothing = torch.full((1, vocab), torch.nan, device=device)
        self.splits = 0
        self._good, self._calm = 0, _CALM_CALLS

    def run(
        self, rows: Sequence[T], call: Callable[[Sequence[T]], torch.Tensor]
    ) -> tuple[torch.Tensor, dict[int, str]]:
        """Return the logits [rows, vocab] of all rows, and by index why a row has none; its logits are NaN.

        Raises NoMemory, EngineFailed. Calling again with the same rows is harmless: it writes the same numbers.
        """
        if len(rows) <= self.now and (logits := self._try(rows, call)) is not None:
            self._grow(len(rows))
            return logits, {}
        pieces: list[torch.Tensor | None] = []  # None: a row that has no logits
        faults: dict[int, str] = {}
        start = 0
        while start < len(rows):
            piece = rows[start : start + self.now]
            logits = self._try(piece, call)
            if logits is None and len(piece) > self.now:
                continue  # memory: the next piece is smaller
            # Copies: a backend may hand out the same memory again in its next call.
            pieces += [logits.clone()] if logits is not None else self._one_by_one(piece, start, call, faults)
            start += len(piece)
        self._grow(len(rows))
        try:
            return self._joined(pieces), faults
        except Exception as error:
            if out_of_memory(error):
                raise NoMemory from None
            raise

    def _try(self, rows: Sequence[T], call: Callable[[Sequence[T]], torch.Tensor]) -> torch.Tensor | None:
        """Return the logits, None if the rows must be retried in smaller pieces. Raises NoMemory, EngineFailed."""
        try:
            return call(rows)
        except Exception as error:
            if isinstance(error, getattr(torch, "AcceleratorError", ())) and not out_of_memory(error):
                raise EngineFailed(
                    "The device reported an error and cannot compute any more.",
                    where=type(error).__name__,
                    next_step="run the same command again; if it happens again, restart the machine",
                ) from None
            if not out_of_memory(error):
                return None
        # Outside the handler, so that the error no longer keeps the tensors of the failed call alive.
        self.shrink(len(rows))
        return None

    def shrink(self, rows: int) -> None:
        """Use fewer rows per call from now on, since this many did not fit. Raises NoMemory if that cannot help."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if rows <= min(self.least, self.now):
            raise NoMemory
        self.splits += 1
        self._good, self._calm = 0, min(self._calm * 2, _CALM_MOST)
        self.now = max(rows // 2, self.least)

    def _one_by_one(
        self, rows: Sequence[T], start: int, call: Callable[[Sequence[T]], torch.Tensor], faults: dict[int, str]
    ) -> list[torch.Tensor | None]:
        """Find the row that breaks the model, so that it fails alone."""
        found: list[torch.Tensor | None] = []
        for offset in range(len(rows)):
            try:
                found.append(call(rows[offset : offset + 1]).clone())
            except Exception as error:
                if out_of_memory(error):
                    raise NoMemory from None
                faults[start + offset] = f"the model could not process this row ({type(error).__name__})"
                found.append(None)
        return found

    def _grow(self, rows: int) -> None:
        """Try larger calls again after a period without trouble."""
        if self.now >= self.most or rows < self.now:
            return
        self._good += 1
        if self._good >= self._calm:
            self._good, self.now = 0, min(self.now * 2, self.most)

    def _joined(self, pieces: Sequence[torch.Tensor | None]) -> torch.Tensor:
        like = next((piece for piece in pieces if piece is not None), self._nothing)
        nothing = self._nothing.to(like)
        return torch.cat([nothing if piece is None else piece for piece in pieces])
