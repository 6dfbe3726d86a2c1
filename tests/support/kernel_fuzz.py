"""Runs the C kernels with hostile numbers; under sanitizers, in a separate process, as `kernel_builds` starts it.

    python tests/support/kernel_fuzz.py FIRST_SEED CASES PRODUCT=LIBRARY ...

Prints a JSON object that counts how the cases ended; each uses one of the libraries. An access outside memory ends the
process before that.
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
import time
from collections import Counter
from typing import Any

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from gxr_batch.engines.slots.native import native_backend
from gxr_batch.engines.slots.native.c_binding import declared
from gxr_batch.engines.slots.native.compile_kernels import Kernels, NativeUnavailable
from gxr_batch.engines.slots.native.native_backend import NativeModel
from gxr_batch.engines.slots.token_sampling import SeenIds
from gxr_batch.job.sampling import Sampling
from gxr_batch.models.config_numbers import odd_number

SMALL: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
}
GEMMA = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 32}
ODD: list[Any] = [
    *(-(2**63), -(2**31), -(2**31) - 1, -513, -32, -5, -1, 0, 1, 2, 3, 5, 7, 15, 16, 17, 31, 32, 33, 48, 64, 96, 160),
    *(
        1000,
        1024,
        4096,
        65_535,
        2**20,
        2**24,
        2**31 - 1,
        2**31,
        2**32 - 1,
        2**32,
        2**32 + 32,
        2**33 + 64,
        2**63,
        10**30,
    ),
    *(0.0, -0.5, 0.5, 1e-30, 8.5, 32.0, 1e30, float("nan"), float("inf"), -float("inf")),
    *(None, True, False, "", "8", "x" * 100, [], [8], [32, 64], [-1], {}, {"a": 1}),
]
SENSIBLE = (1, 2, 3, 4, 5, 7, 8, 32, 64, 96, 128, 160, 1024, 1.0, 1e-5, 32.0)
INTS = [value for value in ODD if (type(value) is int and abs(value) < 2**31) or value == -(2**31)]
MOST_PARAMETERS = 3_000_000
CAPACITIES = (16, 17, 31, 64, 100)


def config_values(rng: random.Random, *, gemma: bool) -> dict[str, Any]:
    """Return the values of a small configuration with one to three of them replaced."""
    values = SMALL | (GEMMA if gemma else {})
    for key in rng.sample(sorted(values), rng.choice((1, 1, 2, 3))):
        values[key] = rng.choice(SENSIBLE if rng.random() < 0.4 else ODD)
    if rng.random() < 0.2:
        kinds = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
        rope = {
            "rope_type": rng.choice(kinds),
            "rope_theta": rng.choice([1e4, *ODD]),
            "factor": rng.choice([2.0, *ODD]),
        }
        rope["partial_rotary_factor"] = rng.choice([1.0, 0.5, 0.25, *ODD])
        values["rope_parameters"] = dict.fromkeys(GEMMA["layer_types"], rope) if gemma else rope
    return values


def parameters(values: dict[str, Any]) -> int:
    """Return about how many numbers a model of these sizes has."""
    heads = values["num_attention_heads"] + 2 * values["num_key_value_heads"]
    layer = heads * values["head_dim"] + 3 * values["intermediate_size"]
    return values["hidden_size"] * (values["num_hidden_layers"] * layer + values["vocab_size"])


class Case:
    """One model that was accepted, and calls of the kernels."""

    def __init__(self, native: NativeModel, rng: random.Random) -> None:
        self.native, self.rng = native, rng

    def ids(self, count: int) -> list[int]:
        return [self.rng.randrange(self.native.vocab) for _ in range(count)]

    def use(self) -> None:
        """Generate as the engine does: prompts of any length, full slots, shared prefixes, sampling."""
        native, rng = self.native, self.rng
        lengths = [rng.choice((1, 2, 9, native.capacity - 1)) for _ in range(native.slots)]
        logits = native.prefill([(slot, self.ids(length), 0) for slot, length in enumerate(lengths)])
        seen = SeenIds(native.slots, native.capacity, torch.device("cpu"))
        for slot in range(native.slots):
            seen.start(slot, self.ids(rng.choice((1, 7, native.capacity))))
        for sampling in (
            Sampling(),
            Sampling(temperature=0),
            Sampling(top_k=1),
            Sampling(top_k=rng.choice((0, 2, 50))),
        ):
            native.candidates(logits, seen.of(range(native.slots)), sampling)
        native.copy(0, native.slots + 3, native.capacity)
        native.decode(range(native.slots), self.ids(native.slots), lengths)

    def misuse(self) -> None:
        """Call the kernels with numbers that no caller should give; every call ends in a refusal or in a result."""
        rng, library, model = self.rng, self.native._library, self.native._model
        for _ in range(6):
            shape = type(model.shape).from_buffer_copy(model.shape)
            layer = rng.randrange(shape.layers)
            window = model.layers[layer].window
            columns = [torch.zeros(4, dtype=torch.int32) for _ in range(3)]
            count = 4
            kind = rng.choice(("size", "place", "count", "window"))
            match kind:
                case "size":  # a size that cannot be; one that could be, but is not this model's, cannot be noticed
                    name = rng.choice(
                        [name for name, kind in shape._fields_ if kind is ctypes.c_int and name != "gelu"]
                    )
                    bad = [value for value in INTS if value < 1 or value > 2**24 or (value % 32 and name in IN_32S)]
                    setattr(model.shape, name, rng.choice(bad))
                case "place":
                    rng.choice(columns)[rng.randrange(4)] = rng.choice(
                        [value for value in INTS if value < 0 or value > 2**23]
                    )
                case "count":
                    count = rng.choice([value for value in INTS if value < 1 or value > 256])
                case "window":
                    model.layers[layer].window = rng.choice(INTS)
            call = ctypes.byref(model)
            refused = refuses(library.gxr_forward, call, count, *(column.data_ptr() for column in columns))
            assert refused == (kind != "window"), "a window is harmless, whatever it is"
            which = torch.tensor([rng.choice([value for value in INTS if value < 0 or value > 255])], dtype=torch.int32)
            pointers = (self.native._gathered.data_ptr(), self.native._logits.data_ptr())
            assert refuses(library.gxr_logits, call, 1, which.data_ptr(), *pointers, self.native._stride)
            model.shape, model.layers[layer].window = shape, window
        self.misuse_candidates()

    def misuse_candidates(self) -> None:
        rng, width = self.rng, 1024
        logits = torch.zeros(2, width, dtype=torch.bfloat16)
        values, ids, counts = torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
        good = {"stride": width, "rows": 2, "vocab": width, "k": 1, "seen": 0, "count": 1, "seen_stride": 1, "most": 8}
        for name in rng.sample(sorted(good), 3):
            # A larger k or longer rows of seen ids are no mistakes, and a larger number of rows cannot be noticed.
            most = {"stride": 0, "rows": 0, "k": 0, "seen_stride": 0, "most": 0}.get(name, 2**31)
            bad = [value for value in INTS if value < (0 if name in {"seen", "count", "seen_stride"} else 1)]
            bad += [value for value in INTS if width < value <= most and name != "vocab"]
            it = good | {name: rng.choice(bad)}
            seen = torch.full((2, 1), it["seen"], dtype=torch.int32)
            lengths = torch.full((2,), it["count"], dtype=torch.int32)
            assert refuses(
                self.native._library.gxr_candidates,
                *(logits.data_ptr(), max(it["stride"], 0), it["rows"], it["vocab"], it["k"]),
                *(seen.data_ptr(), lengths.data_ptr(), it["seen_stride"], 1.1, it["most"]),
                *(values.data_ptr(), ids.data_ptr(), counts.data_ptr()),
            ), it


IN_32S = {"hidden", "inner", "head_dim", "vocab", "most_tokens"}


def refuses(function: Any, *arguments: Any) -> bool:
    """Return whether a kernel refuses its numbers."""
    try:
        function(*arguments)
    except ValueError:
        return True
    return False


def try_case(seed: int, product: str) -> str:
    """Run one case; return how it ended."""
    rng = random.Random(seed)
    gemma = rng.random() < 0.6
    values = config_values(rng, gemma=gemma)
    config_class, model_class = (Gemma3TextConfig, Gemma3ForCausalLM) if gemma else (LlamaConfig, LlamaForCausalLM)
    try:
        config = config_class(**values)
    except Exception:  # the library checks the types of values, and computes with some of them
        return "the library refuses the configuration"
    if odd_number(config):
        return "its numbers are refused"
    if parameters({key: getattr(config, key) for key in SMALL}) > MOST_PARAMETERS:
        return "too large to try"
    torch.manual_seed(seed)
    try:
        model = model_class(config).to(torch.bfloat16).eval()
    except Exception:  # settings of the rotation that contradict each other
        return "the library cannot make it"
    try:
        native = NativeModel(model, slots=rng.choice((1, 2, 5)), capacity=rng.choice(CAPACITIES), product=product)
    except NativeUnavailable:
        return "the kernels cannot run it"
    case = Case(native, rng)
    case.use()
    case.misuse()
    case.use()
    native.close()
    return "generated"


def main(first: int, cases: int, libraries: list[str]) -> None:
    kernels = {}
    for product, _, path in (each.partition("=") for each in libraries):
        kernels[product] = Kernels(ctypes.CDLL(path), product)
        assert declared(kernels[product].library)
    native_backend.load_with = kernels.__getitem__
    torch.set_num_threads(2)
    ends: Counter[str] = Counter()
    slowest = 0.0
    for seed in range(first, first + cases):
        began = time.monotonic()
        ends[try_case(seed, sorted(kernels)[seed % len(kernels)])] += 1
        slowest = max(slowest, time.monotonic() - began)
    print(json.dumps({"ends": ends, "slowest": round(slowest, 2)}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
