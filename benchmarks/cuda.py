"""Checks and times the slot engine on one GPU: tokens, reproducibility, speed, memory.

Uses random weights in the shapes of Gemma 3 270M, 1B and 4B, so it needs no network, bitsandbytes or tokenizer. It
checks that rows in a batch get the same tokens as alone and that sampled ids do not depend on slots or order, and
measures speed and memory. It does not cover texts, 4-bit weights or several GPUs.

    python benchmarks/cuda.py                       # all three shapes, under 8 minutes on a current GPU
    python benchmarks/cuda.py --device cpu --shapes tiny   # the same checks without a GPU
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from typing import Any

import torch
from shapes import SHAPES, make

from gxr_batch.engines.base import EngineInfo, Identity, StopRequest
from gxr_batch.engines.slots.cuda_graphs import cuda_recorder
from gxr_batch.engines.slots.decode_loop import TransformersSession
from gxr_batch.engines.slots.library_backend import LibraryModel
from gxr_batch.engines.slots.row_steps import LogitsSteps
from gxr_batch.job.sampling import Sampling
from gxr_batch.records import Completion, Encoded, Key, Messages, Prompt

CAPACITY = 1024
GREEDY = Sampling(temperature=0, repetition_penalty=1.0)


class Numbers:
    """Decodes ids to their numbers, in place of a tokenizer."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Return the ids, separated by spaces."""
        return " ".join(map(str, ids))


def prompts(count: int, vocabulary: int, lengths: tuple[int, int], new: tuple[int, int]) -> list[Prompt]:
    """Return prompts of random ids and lengths, longest first."""
    rng = random.Random(1)
    found = []
    for number in range(count):
        ids = [rng.randrange(3, vocabulary) for _ in range(rng.randint(*lengths))]
        found.append(Prompt(Key(str(number), 1), Messages((), "t"), Encoded(ids, len(ids)), number, rng.randint(*new)))
    return sorted(found, key=lambda prompt: -len(prompt.encoded.token_ids or ()))


def opened(model: Any, slots: int, sampling: Sampling, graphs: bool = False) -> TransformersSession:
    """Return a session with an empty cache, with or without recorded decode steps."""
    info = EngineInfo(
        identity=Identity(kind="transformers", model="random"),
        device=str(model.device),
        dtype=str(model.dtype),
        quantization=None,
        slots=slots,
        load_seconds=0,
        reproducible=True,
    )
    backend = LibraryModel(model, slots=slots, capacity=CAPACITY, record=cuda_recorder() if graphs else None)
    return TransformersSession(info, LogitsSteps(backend, sampling), Numbers(), frozenset())


def completions(session: TransformersSession, work: Sequence[Prompt]) -> dict[str, Completion]:
    """Return the completions by row."""
    events = session.stream(iter(work), StopRequest())
    return {event.key.row_id: event for event in events if isinstance(event, Completion)}


def generated(model: Any, slots: int, work: Sequence[Prompt], sampling: Sampling, graphs: bool = False) -> Any:
    """Return the completions of a new session."""
    return completions(opened(model, slots, sampling, graphs), work)


def tokens_agree(shape: str, device: torch.device) -> str:
    """Compare mixed rows in float32 with the library's unpadded generate, both greedy."""
    model = make(shape, torch.float32, device)
    torch.backends.cuda.matmul.allow_tf32 = False
    work = [prompt._replace(max_new_tokens=12) for prompt in prompts(6, SHAPES[shape][-1], (1, 700), (12, 12))]
    found = generated(model, 8, work, GREEDY)
    wrong = 0
    for prompt in work:
        ids = torch.tensor([prompt.encoded.token_ids], device=device)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=12,
                eos_token_id=None,
                pad_token_id=0,
            )
        wrong += found[prompt.key.row_id].text != Numbers().decode(out[0, ids.shape[1] :].tolist(), True)
    return "all equal" if not wrong else f"{wrong} of {len(work)} rows DIFFER"


def bits_agree(model: Any, shape: str) -> str:
    """Compare sampled ids at 8, 16 and 32 slots and in another order."""
    work = prompts(40, SHAPES[shape][-1], (1, 200), (4, 40))
    reference = {row: done.text for row, done in generated(model, 8, work, Sampling(temperature=1.0)).items()}
    for slots in (16, 32):
        other = generated(model, slots, random.Random(slots).sample(work, len(work)), Sampling(temperature=1.0))
        wrong = sum(done.text != reference[row] for row, done in other.items())
        if wrong:
            return f"{wrong} of {len(work)} rows DIFFER at {slots} slots"
    if model.device.type == "cuda":
        recorded = generated(model, 32, work, Sampling(temperature=1.0), graphs=True)
        wrong = sum(done.text != reference[row] for row, done in recorded.items())
        return f"all equal; with recorded steps {f'{wrong} rows DIFFER' if wrong else 'too'}"
    return "all equal"


def speed(model: Any, shape: str, slots: int, graphs: bool = False) -> str:
    """Time 64 rows of 60 to 120 prompt tokens and 32 to 256 new ones."""
    work = prompts(64, SHAPES[shape][-1], (60, 120), (32, 256))
    on_gpu = model.device.type == "cuda"
    session = opened(model, slots, Sampling(), graphs)
    completions(session, work)  # a first pass, so that every shape is recorded
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    tokens = sum(done.new_tokens for done in completions(session, work).values())
    seconds = time.perf_counter() - began
    memory = f"{torch.cuda.max_memory_allocated() / 2**30:6.2f} GiB" if on_gpu else "   n/a"
    return f"{slots:>4} slots{', recorded' if graphs else '          '} {tokens / seconds:>9.1f} tok/s {memory}"


def main() -> None:
    """Print checks and figures for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["270m", "1b", "4b"])
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 16, 32, 64])
    options = parser.parse_args()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}")
    for shape in options.shapes:
        print(f"\n{shape}")
        if shape != "4b":  # in float32 it does not fit on smaller GPUs
            print(f"  float32 tokens in a batch and alone: {tokens_agree(shape, device)}")
        model = make(shape, torch.bfloat16, device)
        print(f"  bfloat16 sampled ids at 8, 16, 32 slots: {bits_agree(model, shape)}")
        for slots in options.slots:
            print(f"  {speed(model, shape, slots)}", flush=True)
            if device.type == "cuda":
                print(f"  {speed(model, shape, slots, graphs=True)}", flush=True)
        del model


if __name__ == "__main__":
    main()
