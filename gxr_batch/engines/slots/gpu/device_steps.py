"""Steps that stay on the GPU: a step's tokens feed the next one there, and the host reads them one step late.

While the device computes a step, the host reads the tokens of the one before. A row's end is therefore found late: the
token after it was drawn for nothing and is dropped. What a row may write is reserved from its admission to its release,
and everything is in the order of one stream, so a late token never touches another row.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from gxr_batch.engines.slots.backend import PREFIX_SLOTS
from gxr_batch.engines.slots.cuda_graphs import Record
from gxr_batch.engines.slots.decoding_row import RowState, charge
from gxr_batch.engines.slots.gpu.forward import Forward, Packed, Piece, in_calls
from gxr_batch.engines.slots.gpu.kernels.sampling import NOT_FINITE, TOO_MANY_TIES, forbid
from gxr_batch.engines.slots.gpu.paged_cache import Prefix
from gxr_batch.engines.slots.gpu.slot_state import SlotState, bitmap
from gxr_batch.engines.slots.oom_retry import NoMemory
from gxr_batch.engines.slots.row_steps import Drawn, KernelsFailed, device_failed, in_words
from gxr_batch.engines.slots.slot_schedule import BUCKETS, bucket
from gxr_batch.errors import EngineFailed
from gxr_batch.job.sampling import Sampling
from gxr_batch.models.device_memory import is_lost, out_of_memory, release_cached
from gxr_batch.models.form_tokens import Masks, hold_rows

_PREFILL_ROWS = 64
_ALIGNED = 4  # int32 in 16 bytes
_LEAST_ROWS = 8  # a step computes at least so many rows: fewer cost the same


class _Call(NamedTuple):
    """A call whose tokens are on their way: its rows in the order of `results`, and when it was launched."""

    rows: tuple[RowState, ...]
    places: tuple[int, ...]
    results: torch.Tensor
    ready: torch.cuda.Event | None
    active: int


class DeviceSteps:
    """Steps of our forward pass for GPUs. Implements `row_steps.Steps`."""

    most_new = _PREFILL_ROWS

    def __init__(
        self,
        forward: Forward,
        sampling: Sampling,
        *,
        recorder: Callable[[], Record] | None = None,
        runs_ahead: bool = True,
    ) -> None:
        """`recorder` is for `record_steps`.

        For rows with a form, `runs_ahead` is False: what a row may draw depends on the token before it, which the host
        must know. It finds that out while the device computes the logits.
        """
        self.runs_ahead = runs_ahead
        weights = forward.weights
        self.device, self.vocab, self.capacity = weights.device, weights.vocab, forward.cache.capacity
        self.splits = 0
        self._forward, self._cache, self.chunk = forward, forward.cache, float(forward.chunk)
        self._state = SlotState(forward.cache.slots, weights.vocab, sampling, forward.launch, weights.device)
        self._recorder = recorder
        self._recorded: dict[int, tuple[torch.Tensor, Callable[[], None]]] = {}
        self._calls: deque[_Call] = deque()
        self._new_call = False
        # By row, not by slot: rows move, and tokens of a row that left its slot may still be on their way.
        self._launches: dict[RowState, int] = {}  # tokens drawn or on their way
        self._active: tuple[int, ...] = ()
        self._ties: set[RowState] = set()
        self._prefixes: dict[tuple[int, ...], Prefix] = {}
        self._shared: dict[RowState, Prefix] = {}  # until their prefill
        self._seen_at = time.monotonic()

    # ------------------------------------------------------------------ rows

    def reserve(self, row: RowState) -> bool:
        """Reserve the pages of a row's prompt and answer; return False if too few are free."""
        ids = row.prompt.encoded.token_ids or []
        tokens = len(ids) + row.prompt.max_new_tokens
        if not self._cache.has_room(tokens):
            for key in [key for key, prefix in self._prefixes.items() if not prefix.users]:
                self._cache.drop(self._prefixes.pop(key))
            if not self._cache.has_room(tokens):
                return False
        key = self._prefix_key(row, tokens)
        prefix = self._prefixes.get(key) if key else None
        self._cache.take(row.slot, tokens, prefix)
        if key and prefix is None and self._may_keep_another():
            prefix = self._prefixes[key] = self._cache.make_prefix(row.slot, len(key))
        if prefix:
            self._shared[row] = prefix
        return True

    def _prefix_key(self, row: RowState, tokens: int) -> tuple[int, ...]:
        """Return the ids of the whole pages that a row has in common with others of its template, () if none."""
        ids = row.prompt.encoded.token_ids or []
        shared = min(row.prompt.encoded.shared_tokens, len(ids) - 1)
        shared -= shared % self._cache.page_tokens
        return tuple(ids[:shared]) if shared > 0 and self._cache.may_share(tokens, shared) else ()

    def _may_keep_another(self) -> bool:
        if len(self._prefixes) < PREFIX_SLOTS:
            return True
        unused = next((key for key, prefix in self._prefixes.items() if not prefix.users), None)
        if unused is not None:
            self._cache.drop(self._prefixes.pop(unused))
        return unused is not None

    def release(self, row: RowState) -> None:
        """Take back a row's pages; what is still on its way for them stays in the stream before any other use."""
        self._cache.release(row.slot)
        self._shared.pop(row, None)
        self._launches.pop(row, None)
        self._ties.discard(row)

    def move(self, row: RowState, target: int) -> None:
        """Move a row to a free slot: its table and what the device knows of it, not its keys and values."""
        self._cache.move(row.slot, target)
        self._state.move(row.slot, target)
        self._upload_tables([target])

    # ------------------------------------------------------------------ prefill

    def prefill(self, rows: Sequence[RowState], decoding: int) -> None:
        """Launch the prompts of new rows, in as few calls as the chunk allows, and the draws of their first tokens."""
        self._begin()
        with self._failures(rows):
            self._upload_tables([row.slot for row in rows])
            self._upload_state(rows)
            of_slot = {row.slot: row for row in rows}
            for call in in_calls(self._pieces(rows), self._forward.chunk):
                self._prefill_call(call, of_slot, decoding)
            for row in rows:
                if prefix := self._shared.pop(row, None):
                    prefix.ready = True

    def _pieces(self, rows: Sequence[RowState]) -> list[Piece]:
        """Return what is to be computed of each row; who shares a prefix comes after who computes it."""
        computing: list[Prefix] = []
        found: list[Piece] = []
        for row in rows:
            ids = row.known_ids
            prefix = self._shared.get(row)
            if prefix and not prefix.ready and not any(prefix is one for one in computing):
                computing.append(prefix)
                prefix = None
            first = prefix.tokens if prefix else 0
            found.append(Piece(row.slot, ids[first:], first))
        return sorted(found, key=lambda piece: piece.first > 0)

    def _prefill_call(self, call: Sequence[Piece], of_slot: Mapping[int, RowState], decoding: int) -> None:
        packed = Packed.of(call, self._sent)
        logits = self._forward.prefill(packed)
        if logits is not None:
            drawing = [of_slot[piece.slot] for piece in call if piece.ends]
            self._hold(logits, drawing, range(len(drawing)))
            results = self._state.draw(logits, packed.end_slots)
            self._note(drawing, range(len(drawing)), results, decoding + len(drawing))

    def _upload_state(self, rows: Sequence[RowState]) -> None:
        """Tell the device what it must know of new rows before their first draw."""
        ids = [row.known_ids for row in rows]
        seeds = np.asarray([row.prompt.row_seed for row in rows], np.int64)
        (slots, tokens, positions, steps, seed_words, seen) = self._sent(
            [
                np.asarray([row.slot for row in rows]),
                np.asarray([own[-1] for own in ids]),
                np.asarray([len(own) - 1 for own in ids]),
                np.asarray([len(row.ids) for row in rows]),
                seeds.view(np.int32),
                np.concatenate([bitmap(own, self.vocab) for own in ids]),
            ]
        )
        at = slots.long()
        with torch.inference_mode():
            self._state.tokens[at] = tokens
            self._state.positions[at] = positions
            self._state.steps[at] = steps.long()
            self._state.seeds[at] = seed_words.clone().view(torch.int64)
            self._state.seen[at] = seen.view(len(rows), -1)
        for row in rows:
            self._launches[row] = len(row.ids)

    def _upload_tables(self, slots: Sequence[int]) -> None:
        tables = self._cache.row_tables(slots)
        at, *sent = self._sent([np.asarray(slots), *[table.ravel() for table in tables]])
        with torch.inference_mode():
            for group, table in zip(self._cache.groups, sent, strict=True):
                group.table[at.long()] = table.view(len(slots), -1)

    def _sent(self, arrays: Sequence[np.typing.NDArray[np.generic]]) -> list[torch.Tensor]:
        """Return int32 arrays as tensors on the device, after one copy that nothing waits for.

        Each begins at a multiple of 16 bytes: Triton compiles a kernel again for every alignment of its arguments.
        """
        places = np.cumsum([0, *(-(-len(array) // _ALIGNED) * _ALIGNED for array in arrays)])
        whole = np.zeros(places[-1], np.int32)
        for place, array in zip(places, arrays, strict=False):
            whole[place : place + len(array)] = array
        joined = torch.from_numpy(whole)
        if self.device.type == "cuda":
            joined = joined.pin_memory()  # else the copy would wait
        joined = joined.to(self.device, non_blocking=True)
        return [joined[place : place + len(array)] for place, array in zip(places, arrays, strict=False)]

    # ------------------------------------------------------------------ decode

    def decode(self, rows: Sequence[RowState]) -> None:
        """Launch one more token of every row that may have one."""
        going = [row for row in rows if self._launches[row] < row.prompt.max_new_tokens]
        if not going:
            return
        slots = tuple(sorted(row.slot for row in going))
        count = max(bucket(slots[-1] + 1, self._cache.slots), min(_LEAST_ROWS, self._cache.slots))
        self._begin()
        with self._failures():
            if slots != self._active:
                self._upload_active(slots)
        with self._failures(repeatable=False):  # some rows may have advanced on the device, and would do so twice
            results = self._ties_drawn(count, going) if self._ties else self._step(count, going)
            self._note(going, [row.slot for row in going], results, len(going))

    def _step(self, count: int, going: Sequence[RowState]) -> torch.Tensor:
        """Run the step over the first `count` slots, recorded if steps are; return its results."""
        if count not in self._recorded:
            return self._state.draw(self._held_logits(count, going), self._state.active[:count])
        results, replay = self._recorded[count]
        replay()
        return results

    def _launched(self, count: int) -> torch.Tensor:
        return self._state.draw(self._logits(count), self._state.active[:count])

    def _held_logits(self, count: int, going: Sequence[RowState]) -> torch.Tensor:
        """Return the logits of the first `count` slots, held to the rows' forms. No row has advanced by that."""
        with self._failures():
            logits = self._logits(count)
            self._hold(logits, going, [row.slot for row in going])
        return logits

    def _logits(self, count: int) -> torch.Tensor:
        state = self._state
        return self._forward.decode(state.tokens, state.positions, state.active[:count])

    def _hold(self, logits: torch.Tensor, rows: Sequence[RowState], places: Sequence[int]) -> None:
        """Hold rows that have a form to it; `places` are theirs in the logits."""
        forms = [row.form for row in rows if row.form is not None]  # all or none
        hold_rows(forms, logits, places, self._forbid)

    def _forbid(self, logits: torch.Tensor, masks: Masks) -> None:
        (sent,) = self._sent([masks.ravel()])
        forbid(self._forward.launch, logits, sent[: masks.size].view(masks.shape))

    def _ties_drawn(self, count: int, going: Sequence[RowState]) -> torch.Tensor:
        """Run a step in which some rows have more ties than the kernel holds."""
        logits = self._held_logits(count, going)
        results = self._state.draw(logits, self._state.active[:count])
        self._state.draw_ties(logits, self._state.active[:count])
        self._ties.clear()
        return results

    def _upload_active(self, slots: tuple[int, ...]) -> None:
        active = np.full(self._cache.slots, -1)
        active[list(slots)] = slots
        (sent,) = self._sent([active])
        with torch.inference_mode():
            self._state.active.copy_(sent)
        self._active = slots

    @contextmanager
    def _failures(self, new: Sequence[RowState] = (), *, repeatable: bool = True) -> Iterator[None]:
        """Tell apart what a failed call means. Raises NoMemory if it can be made again, EngineFailed, KernelsFailed.

        Tokens of `new` rows that are on their way are dropped: their prefill is made again.
        """
        try:
            yield
        except (NoMemory, KernelsFailed, EngineFailed):  # raised by an inner one
            raise
        except Exception as error:
            self._calls = deque(call for call in self._calls if not any(row in new for row in call.rows))
            memory = out_of_memory(error)
            if not memory and is_lost(self.device):
                raise device_failed(error) from None
            if not (memory and repeatable):
                raise KernelsFailed(f"a kernel failed ({in_words(error)})") from error
        else:
            memory = False
        if memory:  # outside the handler, so that the error no longer keeps the tensors of the failed call alive
            if self.device.type == "cuda":
                with suppress(RuntimeError):  # raised after a recording that failed
                    torch.cuda.empty_cache()
            self.splits += 1
            raise NoMemory

    def warm_up(self) -> None:
        """Run a step without rows and wait for it, so that every kernel of a step is compiled before the first row."""
        count = min(_LEAST_ROWS, self._cache.slots)
        logits = self._logits(count)
        if not self.runs_ahead:
            self._forbid(logits, np.full((count, -(-self.vocab // 32)), -1, np.int32))
        self._state.draw(logits, self._state.active[:count]).tolist()

    def record_steps(self) -> list[str]:
        """Record the decode step of every bucket, the largest first, whose memory the others use. No row may be in it.

        Return a notice if that failed: steps are then launched. Raises the error if the GPU is lost, or the allocator.
        """
        assert self._recorder is not None
        counts = sorted({bucket(size, self._cache.slots) for size in (_LEAST_ROWS, *BUCKETS)}, reverse=True)
        failed, record = "", self._recorder()
        try:
            for count in counts:
                self._recorded[count] = record(partial(self._launched, count))
        except Exception as error:
            if is_lost(self.device):
                raise
            failed = type(error).__name__
        if not failed:
            return []
        self._recorded.clear()
        with suppress(RuntimeError):  # the allocator may take the recording for unfinished
            release_cached()
        self.warm_up()  # raises if that is so
        return [f"Decode steps are not recorded: the recording failed ({failed})."]

    def grow(self, slots: int, pages: Sequence[int]) -> tuple[bool, list[str]]:
        """Enlarge cache and buffers between two steps; rows keep their slots and pages, to the last bit.

        Return whether there was memory for it, else all is used as before; and notices. Raises EngineFailed,
        KernelsFailed.
        """
        before, recorded = self._cache.pages, bool(self._recorded)
        grown, notices = False, []
        with self._failures(repeatable=False):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # what is on its way may be a recording
            self._recorded.clear()  # they use the old addresses
            try:
                self._cache.resize(pages)
                state = self._state.enlarged(slots)
                self._forward.reserve(slots)
                self._cache.extend(slots)
                self._state, self._active, grown = state, (), True
            except Exception as error:
                if not out_of_memory(error):
                    raise
            if not grown:  # outside the handler, so that the error no longer keeps the new tensors alive
                with suppress(torch.OutOfMemoryError):  # then some layers keep pages that nobody uses
                    self._cache.resize(before)
            if recorded:
                self._state.active.fill_(-1)
                self._active = ()
                notices = self.record_steps()
        return grown, notices

    def close(self) -> None:
        """Give back cache, buffers and recordings; the weights stay."""
        self._recorded.clear()
        self._calls.clear()
        for name in ("_forward", "_cache", "_state"):  # also after it was closed already
            vars(self).pop(name, None)

    # ------------------------------------------------------------------ tokens

    def _note(self, rows: Sequence[RowState], places: Sequence[int], results: torch.Tensor, active: int) -> None:
        """Start the copy of a call's results to the host."""
        ready = None
        if self.device.type == "cuda":
            host = torch.empty(len(results), dtype=torch.int32, pin_memory=True)
            host.copy_(results, non_blocking=True)
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        else:
            host = results.clone()
        for row in rows:
            self._launches[row] += 1
        self._calls.append(_Call(tuple(rows), tuple(places), host, ready, active))
        self._new_call = True

    def drawn(self) -> list[Drawn]:
        """Return the tokens of all calls but the newest, or of all if none was launched since the last time.

        Without running ahead, of all.
        """
        found: list[Drawn] = []
        while len(self._calls) > (1 if self._new_call and self.runs_ahead else 0):
            found += self._read(self._calls.popleft())
        self._new_call = False
        return found

    def _begin(self) -> None:
        """Charge no row for the time in which the device had nothing to compute."""
        if not self._calls:
            self._seen_at = time.monotonic()

    def _read(self, call: _Call) -> list[Drawn]:
        if call.ready is not None:
            with self._failures(repeatable=False):  # what went wrong on the device is reported here
                call.ready.synchronize()
        now = time.monotonic()
        charge([row for row in call.rows if not row.finish], now - self._seen_at, call.active)
        self._seen_at = now
        values: list[int] = call.results.tolist()
        found = []
        for row, place in zip(call.rows, call.places, strict=True):
            token = values[place]
            if token == TOO_MANY_TIES:
                if row in self._launches:  # nothing was drawn, and the next step computes the same again
                    self._launches[row] -= 1
                    self._ties.add(row)
            else:
                fault = "the model's logits are not finite numbers" if token == NOT_FINITE else ""
                found.append(Drawn(row, token, now, fault))
        return found
