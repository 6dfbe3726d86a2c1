"""gxr-batch's engine, opened through a job as in a run, with the time of each part."""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import (
    CAPACITY,
    REPETITION_PENALTY,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    WARM_UP_TOKENS,
    Task,
    check_lengths,
    read_task,
    report,
    timed,
)

from gxr_batch.engines.base import Pulse, StopRequest
from gxr_batch.engines.slots import TransformersEngine
from gxr_batch.job import Job
from gxr_batch.records import Encoded, Key, Messages, Prompt


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slots", type=lambda text: text if text == "auto" else int(text), default=32)
    parser.add_argument("--kernels", choices=["auto", "library"], default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--not-reproducible", action="store_true")
    parser.add_argument("--no-prefix", action="store_true")
    parser.add_argument("--nf4", action="store_true", help="4-bit weights with bitsandbytes")


class Meter:
    """Sums the seconds of the engine's parts and counts the work of decode steps."""

    def __init__(self, session: Any, config: dict[str, Any]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps = self.rows = self.cache_tokens = 0
        self.config = config
        self._layers = _layer_windows(config)
        backend = session._steps._backend
        backend.prefill = self._timing("prefill", backend.prefill)
        backend.copy = self._timing("prefill", backend.copy)
        backend.decode = self._timing("decode", backend.decode, self._count)
        chooser = session._steps._chooser
        chooser.choose = self._timing("sampler", chooser.choose)

    def reset(self) -> None:
        """Forget the warm-up."""
        self.seconds.clear()
        self.steps = self.rows = self.cache_tokens = 0

    def _timing(self, part: str, call: Callable[..., Any], look: Callable[..., None] | None = None) -> Any:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            done = call(*arguments, **named)
            self.seconds[part] += time.perf_counter() - began
            if look is not None:
                look(*arguments, **named)
            return done

        return wrapped

    def _count(self, slots: Any, ids: Any, positions: Any) -> None:
        self.steps += 1
        self.rows += len(slots)
        self.cache_tokens += sum(min(at + 1, window) for at in positions for window in self._layers)


def _layer_windows(config: dict[str, Any]) -> list[int]:
    """Return how many tokens each layer can attend to."""
    kinds = config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"]
    return [config["sliding_window"] if kind == "sliding_attention" else CAPACITY for kind in kinds]


def _job(task: Task, options: argparse.Namespace) -> Job:
    return Job.model_validate(
        {
            "name": "engines",
            "input": {"path": "none"},
            "model": {
                "path": str(task.model),
                "dtype": options.dtype,
                "max_seq_length": CAPACITY,
                "load_in_4bit": options.nf4,
            },
            "sampling": {
                "temperature": TEMPERATURE,
                "top_p": TOP_P,
                "top_k": TOP_K,
                "repetition_penalty": REPETITION_PENALTY,
            },
            "engine": {
                "kind": "transformers",
                "slots": options.slots,
                "kernels": options.kernels,
                "reproducible": not options.not_reproducible,
            },
        }
    )


def _prompt(row: int, ids: list[int], length: int, seed: int, shared: int) -> Prompt:
    return Prompt(Key(str(row), 1), Messages((), "clinical_case"), Encoded(ids, len(ids), shared), seed, length)


def _run(session: Any, prompts: list[Prompt]) -> dict[int, int]:
    """Return the number of new tokens of each row, generating longest prompts first as in a run."""
    ordered = sorted(prompts, key=lambda prompt: len(prompt.encoded.token_ids or ()), reverse=True)
    found = {}
    for event in session.stream(iter(ordered), StopRequest()):
        if not isinstance(event, Pulse):
            if event.error:
                raise SystemExit(event.error)
            found[int(event.key.row_id)] = event.new_tokens
    return found


def _details(meter: Meter, seconds: float, task: Task, slots: int, width: float) -> dict[str, Any]:
    """Return the shares of the parts, slot use, and decode's reads and products; `width`: bytes per weight."""
    config = meter.config
    parameters = sum(path.stat().st_size for path in task.model.glob("*.safetensors")) / 2
    a_token = 2 * config["num_key_value_heads"] * _head_dim(config) * width
    shares = {part: meter.seconds[part] / seconds for part in ("prefill", "decode", "sampler")}
    decode = meter.seconds["decode"]
    return {
        "shares": shares | {"host": 1 - sum(shares.values())},
        "slot_use": meter.rows / (meter.steps * slots),
        "rows_a_step": meter.rows / meter.steps,
        "step_ms": 1000 * decode / meter.steps,
        "decode_bytes_a_second": (meter.steps * parameters * width + meter.cache_tokens * a_token) / decode,
        "decode_flops_a_second": 2 * parameters * meter.rows / decode,
    }


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def main() -> None:
    """Run it."""
    task, options = read_task(__doc__, _options)
    config = json.loads(Path(task.model, "config.json").read_text())
    shared = [0] * len(task.ids) if options.no_prefix else task.shared
    with TransformersEngine(_job(task, options)).open() as session:
        session._end_ids = frozenset()
        meter = Meter(session, config)
        warm_up = task.warm_up()
        _run(session, [_prompt(row, ids, WARM_UP_TOKENS, row, 0) for row, ids in enumerate(warm_up)])
        meter.reset()
        rows = zip(task.ids, task.lengths, task.seeds, shared, strict=True)
        prompts = [_prompt(row, *each) for row, each in enumerate(rows)]
        with timed() as clock:
            found = _run(session, prompts)
        check_lengths([found[row] for row in range(len(prompts))], task.lengths)
        width = 0.5 if options.nf4 else 4 if options.dtype == "float32" else 2
        details = _details(meter, clock.seconds, task, session.info.slots, width)
        report(task.tokens, clock.seconds, f"{session.info.slots} slots, {session.info.versions['forward']}", **details)


if __name__ == "__main__":
    main()
