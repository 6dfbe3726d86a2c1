"""One step of many rows: run a model and draw each row's next token.

The loop knows rows and slots; `Steps` know the model. `LogitsSteps` are those of a `Backend`, which returns logits: one
call, one draw, one read-back.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from gxr_batch.engines.slots.backend import PREFIX_SLOTS, Backend
from gxr_batch.engines.slots.decoding_row import RowState, charge
from gxr_batch.engines.slots.oom_retry import Splitter
from gxr_batch.engines.slots.token_sampling import Chooser
from gxr_batch.errors import EngineFailed
from gxr_batch.job.sampling import Sampling
from gxr_batch.models.form_tokens import hold_rows

# Rows prefilled in one call: enough to fill a call of the kernels, few enough that decoding rows wait briefly.
_PREFILL_ROWS = 8
# A shared prefix shorter than this is recomputed faster than it is copied.
_LEAST_PREFIX = 16
_MOST_WORDS = 200  # characters of an error


class KernelsFailed(Exception):
    """Our forward pass cannot continue, for the reason in the message; the library's can."""


def in_words(error: Exception) -> str:
    """Return what is said about an error of a kernel: its type, and the words of torch, CUDA or Triton.

    Those do not know any row's text; an error of another type may.
    """
    of_libraries = type(error) is RuntimeError or isinstance(error, getattr(torch, "AcceleratorError", ()))
    words = str(error).strip().partition("\n")[0][:_MOST_WORDS] if of_libraries else ""
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def device_failed(error: Exception) -> EngineFailed:
    """Return the error for a GPU that cannot compute any more after `error`, until the process has ended."""
    return EngineFailed(
        "The device reported an error and cannot compute any more.",
        where=in_words(error),
        next_step='run the same command again; if it happens again, set engine.kernels = "library"',
    )


class Drawn(NamedTuple):
    """The next token of a row, when it was drawn (monotonic seconds), or why there is none."""

    row: RowState
    token: int
    at: float
    fault: str = ""


class Steps(Protocol):
    """A model, its cache and its draws.

    Calls raise NoMemory if they do not fit in memory now, KernelsFailed, EngineFailed.
    """

    device: torch.device
    vocab: int
    capacity: int  # tokens of prompt and answer
    most_new: int  # rows in one prefill
    chunk: float  # prompt tokens in one call of the model
    runs_ahead: bool  # tokens become known one call late, so that the device need not wait for the host

    @property
    def splits(self) -> int:
        """How often a call had to be made smaller for lack of memory."""
        ...

    def reserve(self, row: RowState) -> bool:
        """Reserve memory for a row in its slot until its `release`; return False if there is none now."""
        ...

    def prefill(self, rows: Sequence[RowState], decoding: int) -> None:
        """Run the prompts of new rows and draw their first tokens, while `decoding` others wait."""
        ...

    def decode(self, rows: Sequence[RowState]) -> None:
        """Draw the next token of every row that may have another one."""
        ...

    def drawn(self) -> list[Drawn]:
        """Return tokens that have become known. If no call was made since the last time, wait for all calls."""
        ...

    def release(self, row: RowState) -> None:
        """Give back what a row that ended holds in its slot."""
        ...

    def move(self, row: RowState, target: int) -> None:
        """Move a row to a free slot; the caller notes it."""
        ...

    def close(self) -> None:
        """Release the memory."""
        ...


class LogitsSteps:
    """Steps of a backend that returns logits. Implements `Steps`."""

    most_new = _PREFILL_ROWS
    chunk = float("inf")
    runs_ahead = False

    def __init__(self, backend: Backend, sampling: Sampling) -> None:
        self.device, self.vocab, self.capacity = backend.device, backend.vocab, backend.capacity
        self._backend = backend
        self._prefixes: dict[tuple[int, ...], int] = {}
        self._splitter = Splitter(backend.slots, backend.least_rows, backend.vocab, backend.device)
        self._prefills = Splitter(_PREFILL_ROWS, 1, backend.vocab, backend.device)
        self._chooser = Chooser(backend, sampling, self._splitter)
        self._drawn: list[Drawn] = []

    @property
    def splits(self) -> int:
        """How often a call had to be made smaller for lack of memory."""
        return self._splitter.splits + self._prefills.splits

    def reserve(self, row: RowState) -> bool:
        """Return True: every slot has the memory of the longest row."""
        return True

    def prefill(self, rows: Sequence[RowState], decoding: int) -> None:
        """Run the prompts of new rows through the model and draw their first tokens."""
        began = time.monotonic()
        calls = []
        for row in rows:
            ids = row.known_ids
            calls.append((row.slot, *self._after_prefix(row, ids)))
            self._chooser.seen.start(row.slot, ids)
        logits, faults = self._prefills.run(calls, self._backend.prefill)
        charge(rows, self._sample(rows, logits, faults) - began, len(rows) + decoding)

    def _after_prefix(self, row: RowState, ids: list[int]) -> tuple[list[int], int]:
        """Copy the template's shared prefix into the row's slot; return the remaining ids and where they start."""
        length = min(row.prompt.encoded.shared_tokens, len(ids) - 1)
        if length < _LEAST_PREFIX:
            return ids, 0
        prefix = tuple(ids[:length])
        if prefix not in self._prefixes:
            # If all prefix slots are taken, make the same two calls in the row's own slot: its bits must not depend on
            # which templates came first.
            full = len(self._prefixes) == PREFIX_SLOTS
            slot = row.slot if full else self._backend.slots + len(self._prefixes)
            _, faults = self._prefills.run([(slot, prefix, 0)], self._backend.prefill)
            if faults:  # a half-written prefix must not be copied into any row
                self._backend.clear(slot)
                return ids, 0
            if full:
                return ids[length:], length
            self._prefixes[prefix] = slot
        self._backend.copy(self._prefixes[prefix], row.slot, length)
        return ids[length:], length

    def decode(self, rows: Sequence[RowState]) -> None:
        """Feed each row's newest token and draw its next one."""
        began = time.monotonic()
        rows = sorted(rows, key=lambda row: row.slot)  # adjacent rows of the cache are computed in one piece
        inputs = [(row.slot, row.ids[-1], row.position) for row in rows]
        logits, faults = self._splitter.run(inputs, self._decode_call)
        charge(rows, self._sample(rows, logits, faults) - began, len(rows))

    def _decode_call(self, inputs: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        slots, ids, positions = zip(*inputs, strict=True)
        return self._backend.decode(slots, ids, positions)

    def _sample(self, rows: Sequence[RowState], logits: torch.Tensor, faults: Mapping[int, str]) -> float:
        """Draw one token per row and return the time; a row whose logits are not finite fails alone."""
        forms = [row.form for row in rows if row.form is not None]  # all or none
        hold_rows(forms, logits, write=self._backend.forbid)
        tokens, finite = self._chooser.choose(rows, logits)
        now = time.monotonic()
        for index, (row, token, good) in enumerate(zip(rows, tokens, finite, strict=True)):
            if good:
                self._drawn.append(Drawn(row, token, now))
            else:
                fault = faults.get(index, "the model's logits are not finite numbers")
                self._drawn.append(Drawn(row, token, now, fault))
                self._backend.clear(row.slot)
        return now

    def drawn(self) -> list[Drawn]:
        """Return the tokens of the calls since the last time."""
        found, self._drawn = self._drawn, []
        return found

    def release(self, row: RowState) -> None:
        """Do nothing: the next row of the slot overwrites it."""

    def move(self, row: RowState, target: int) -> None:
        """Copy a row's cache and what it has seen to another slot."""
        self._backend.copy(row.slot, target, row.position)
        self._chooser.seen.move(row.slot, target)

    def close(self) -> None:
        """Release the backend, and what it knows of the rows."""
        self._backend.close()
        self._prefixes.clear()
        self._drawn.clear()
