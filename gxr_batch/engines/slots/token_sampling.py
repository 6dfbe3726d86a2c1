"""From logits to tokens: candidates, each row's own draw, and one read-back per step, in as many pieces as fit.

The same distribution as transformers' processors in their order, computed on a few candidates instead of the whole
vocabulary: the repetition penalty touches seen ids only, top-k comes first and is exact (all ties at the k-th value
stay, as there), top-p works within it. A draw depends only on (row seed, step, token id), never on other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from gxr_batch.engines.slots.backend import Backend
from gxr_batch.engines.slots.decoding_row import RowState
from gxr_batch.engines.slots.oom_retry import Splitter
from gxr_batch.job.sampling import Sampling
from gxr_batch.models.device_memory import out_of_memory
from gxr_batch.models.gumbel_noise import gumbel


class Chooser:
    """Draws the rows' next tokens and remembers which ids each row has seen."""

    def __init__(self, backend: Backend, sampling: Sampling, splitter: Splitter) -> None:
        self.seen = SeenIds(backend.slots, backend.capacity, backend.device)
        self._backend, self._sampling, self._splitter = backend, sampling, splitter

    def choose(self, rows: Sequence[RowState], logits: torch.Tensor) -> tuple[list[int], list[int]]:
        """Return a token for each row of the logits [rows, vocab], and whether that row was finite. Raises NoMemory."""
        tokens: list[int] = []
        finite: list[int] = []
        while len(tokens) < len(rows):
            piece = slice(len(tokens), len(tokens) + self._splitter.now)
            try:
                drawn = self._drawn(rows[piece], logits[piece])
            except Exception as error:
                if not out_of_memory(error):
                    raise
                self._splitter.shrink(len(rows[piece]))
            else:
                tokens += drawn[0]
                finite += drawn[1]
        self.seen.add([row.slot for row in rows], tokens)
        return tokens, finite

    def _drawn(self, rows: Sequence[RowState], logits: torch.Tensor) -> list[list[int]]:
        """Return tokens and whether logits were finite."""
        seen = self.seen.of([row.slot for row in rows])
        candidates = self._backend.candidates(logits, seen, self._sampling)
        tokens, finite, complete = self._read(rows, candidates)
        if not all(complete):  # more ties than candidates: rare enough to sort the whole vocabulary
            tokens, finite, _ = self._read(rows, top_candidates(logits, seen, self._sampling, thorough=True))
        return [tokens, finite]

    def _read(self, rows: Sequence[RowState], candidates: Candidates) -> list[list[int]]:
        """Return tokens, whether logits were finite, and whether all ties were kept: the step's only read-back."""
        device = candidates.ids.device
        keys = torch.tensor([[row.prompt.row_seed, len(row.ids)] for row in rows]).to(device)
        tokens = draw(candidates, keys[:, 0], keys[:, 1], self._sampling)
        read: list[list[int]] = torch.stack([tokens, candidates.values[:, 0].isfinite(), candidates.complete]).tolist()
        return read


# The vocabulary is scanned in blocks: the k best tokens are in the k blocks with the best maxima.
_BLOCK = 512
# Candidates kept beyond k: bfloat16 logits tie often, and every tie at the k-th value counts.
_MARGIN = 64


class Candidates(NamedTuple):
    """The tokens that top-k keeps of each row: penalised logits, descending, and their ids; both [rows, candidates].

    A row with fewer candidates is filled with -inf. `complete` [rows] is False if more tokens tie at the k-th value
    than were kept; such a row needs `top_candidates(..., thorough=True)`. Stays on the device, so that one read-back is
    enough.
    """

    values: torch.Tensor
    ids: torch.Tensor
    complete: torch.Tensor


class Seen(NamedTuple):
    """The ids that each row has seen, [rows, width]: the first `counts` [rows] of a row are all different, the rest
    repeat some of them.
    """

    ids: torch.Tensor
    counts: torch.Tensor


class SeenIds:
    """What every slot's row has seen, prompt and answer, on the logits' device and extended by one write per step."""

    def __init__(self, slots: int, capacity: int, device: torch.device) -> None:
        self._ids = torch.zeros(slots, capacity + 1, dtype=torch.long, device=device)
        self._known: list[set[int]] = [set() for _ in range(slots)]

    def start(self, slot: int, ids: Sequence[int]) -> None:
        """Begin a row with its prompt."""
        unique = list(dict.fromkeys(ids))
        self._known[slot] = set(unique)
        row = torch.full((self._ids.shape[1],), unique[0])
        row[: len(unique)] = torch.tensor(unique)
        self._ids[slot] = row.to(self._ids.device)

    def add(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Add one token to each row. A token that was seen already is written after the others and not counted."""
        columns = [len(self._known[slot]) for slot in slots]
        device = self._ids.device
        at = torch.tensor([slots, columns], device=device)
        self._ids[at[0], at[1]] = torch.tensor(tokens, device=device)
        for slot, token in zip(slots, tokens, strict=True):
            self._known[slot].add(token)

    def move(self, source: int, target: int) -> None:
        """Move a row to another slot."""
        self._ids[target] = self._ids[source]
        self._known[target] = self._known[source]
        self._known[source] = set()

    def of(self, slots: Sequence[int]) -> Seen:
        """Return what the rows in these slots have seen."""
        counts = [len(self._known[slot]) for slot in slots]
        device = self._ids.device
        return Seen(self._ids[torch.tensor(slots, device=device), : max(counts)], torch.tensor(counts, device=device))


def top_candidates(logits: torch.Tensor, seen: Seen, sampling: Sampling, *, thorough: bool = False) -> Candidates:
    """Return the candidates of every row.

    `logits` is [rows, vocab] in any float type and is not modified. Greedy sampling has one candidate. `thorough` sorts
    the whole vocabulary, so that any number of ties is kept.
    """
    scores = logits.float() if logits.dtype != torch.float32 else logits.clone()
    if sampling.repetition_penalty != 1:
        scores.scatter_(1, seen.ids, penalised(scores.gather(1, seen.ids), sampling.repetition_penalty))
    everything = torch.ones(scores.shape[0], dtype=torch.bool, device=scores.device)
    if sampling.greedy:
        best = scores.argmax(dim=-1, keepdim=True)
        return Candidates(scores.gather(1, best), best, everything)
    if sampling.top_k == 0:
        return Candidates(*scores.sort(dim=-1, descending=True, stable=True), everything)
    k = min(sampling.top_k, scores.shape[1])
    values, ids, complete = _whole(scores) if thorough else _in_blocks(scores, k)
    return Candidates(values.masked_fill(values < values[:, k - 1 : k], -torch.inf), ids, complete)


def penalised(values: torch.Tensor, penalty: float) -> torch.Tensor:
    """Return logits of seen ids: divided by the penalty where positive, multiplied where negative."""
    return torch.where(values > 0, values / penalty, values * penalty)


def _whole(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values, ids = scores.sort(dim=-1, descending=True, stable=True)
    return values, ids, torch.ones(scores.shape[0], dtype=torch.bool, device=scores.device)


def _in_blocks(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the best k tokens and a margin, descending, equal ones by id; and whether the margin held all ties."""
    rows, vocab = scores.shape
    wanted = min(k + _MARGIN, vocab)
    blocks = -(-vocab // _BLOCK)
    padded = torch.nn.functional.pad(scores, (0, blocks * _BLOCK - vocab), value=-torch.inf)
    chosen = padded.view(rows, blocks, _BLOCK).amax(dim=-1).topk(min(wanted, blocks), dim=-1).indices
    chosen = chosen.sort(dim=-1).values  # ascending ids, so that equal values keep the order of their ids
    ids = (chosen[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=scores.device)).view(rows, -1)
    values, order = padded.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    values, ids = values[:, :wanted], ids.gather(1, order[:, :wanted])
    few = values[:, k - 1] == -torch.inf  # fewer than k that can be drawn
    complete = (values[:, -1] < values[:, k - 1]) | few if wanted < vocab else values[:, 0] == values[:, 0]
    return values, ids, complete


def draw(candidates: Candidates, seeds: torch.Tensor, steps: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return one token id for each row, [rows] int64.

    `seeds` and `steps` are [rows] int64: the row's seed, and how many tokens it has so far.
    """
    values, ids, _ = candidates
    if sampling.greedy:
        return ids[:, 0]
    scores = values.double() / sampling.temperature
    if sampling.top_p < 1:
        scores = scores.masked_fill(~nucleus(scores, sampling.top_p), -torch.inf)
    return ids.gather(1, (scores + gumbel(seeds, steps, ids)).argmax(dim=-1, keepdim=True))[:, 0]


def nucleus(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return which of the descending `scores` [rows, n] top-p keeps: all but the least likely whose sum is <= 1 - p."""
    rising = scores.flip(-1).softmax(dim=-1).cumsum(dim=-1)
    kept = (rising > 1 - top_p).flip(-1)
    kept[:, 0] = True
    return kept
