"""From logits to tokens: candidates, draws, and the one read-back of a step, in as many pieces as the memory bears."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gxr_batch.engines.transformers.driver import Driver
from gxr_batch.engines.transformers.row import RowState
from gxr_batch.engines.transformers.sampler import Candidates, SeenIds, draw, top_candidates
from gxr_batch.engines.transformers.splitting import Splitter
from gxr_batch.job.sampling import Sampling
from gxr_batch.models.device_memory import out_of_memory


class Chooser:
    """Draws the rows' next tokens and remembers which ids each row has seen."""

    def __init__(self, driver: Driver, sampling: Sampling, splitter: Splitter) -> None:
        self.seen = SeenIds(driver.slots, driver.capacity, driver.device)
        self._driver, self._sampling, self._splitter = driver, sampling, splitter

    def choose(self, rows: Sequence[RowState], logits: torch.Tensor) -> tuple[list[int], list[int]]:
        """Return a token for each row of the logits [rows, vocab], and whether that row was finite. Raises NoRoom."""
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
        candidates = self._driver.candidates(logits, seen, self._sampling)
        tokens, finite, complete = self._read(rows, candidates)
        if not all(complete):  # more ties than candidates: rare enough to sort everything once more
            tokens, finite, _ = self._read(rows, top_candidates(logits, seen, self._sampling, thorough=True))
        return [tokens, finite]

    def _read(self, rows: Sequence[RowState], candidates: Candidates) -> list[list[int]]:
        """Return tokens, whether logits were finite, and whether all ties were there: the step's one read-back."""
        device = candidates.ids.device
        keys = torch.tensor([[row.prompt.row_seed, len(row.ids)] for row in rows]).to(device)
        tokens = draw(candidates, keys[:, 0], keys[:, 1], self._sampling)
        read: list[list[int]] = torch.stack([tokens, candidates.values[:, 0].isfinite(), candidates.complete]).tolist()
        return read
