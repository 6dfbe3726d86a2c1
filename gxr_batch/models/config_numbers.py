"""Checks the numbers of a model's configuration before a library or a kernel computes with them.

A size outside sense ends in a division by zero, in all of the memory, or in C in somebody else's memory, so it is
refused by name. What the numbers mean, and whether weights of these sizes exist, is left to those who load the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from gxr_batch.errors import ModelUnavailable
from gxr_batch.models.foreign import read_object

CONFIG = "config.json"


class _Range(NamedTuple):
    """The values that a number may have. `step`: whole numbers that are multiples of it; 0: any real number."""

    least: float
    most: float
    step: int = 1

    def __str__(self) -> str:
        kind = {0: "a number", 1: "a whole number", 2: "an even number"}[self.step]
        return f"{kind} from {self.least:,} to {self.most:,}"

    def holds(self, value: Any) -> bool:
        """Return whether a value of a JSON file is such a number."""
        kinds = int if self.step else int | float
        if isinstance(value, bool) or not isinstance(value, kinds) or not self.least <= value <= self.most:
            return False
        return not self.step or value % self.step == 0


_COUNT = 2**31 - 1
_HEADS, _LAYERS, _FEATURES = _Range(1, 2**12), _Range(1, 2**12), _Range(1, 2**20)
_ID, _SCALE, _CAP = _Range(-1, _COUNT), _Range(1e-6, 1e15, 0), _Range(1e-6, 1e9, 0)
# The bounds are far beyond any model, and within what the kernels can compute with (`gxr_sound` in forward.c). Families
# name some sizes differently; those that the library counts with while it reads the file are here under each name.
_NUMBERS = {
    "hidden_size": _FEATURES,
    "n_embd": _FEATURES,
    "intermediate_size": _FEATURES,
    "num_hidden_layers": _LAYERS,
    "num_layers": _LAYERS,
    "n_layer": _LAYERS,
    "n_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "n_head": _HEADS,
    "n_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "head_dim": _Range(2, 2**12, 2),
    "vocab_size": _Range(1, 2**24),
    "max_position_embeddings": _Range(1, _COUNT),
    "sliding_window": _Range(0, _COUNT),
    "rms_norm_eps": _Range(0, 1, 0),
    "query_pre_attn_scalar": _CAP,
    "attn_logit_softcapping": _CAP,
    "final_logit_softcapping": _CAP,
    "rope_theta": _SCALE,
    "rope_local_base_freq": _SCALE,
    "partial_rotary_factor": _Range(1e-6, 1, 0),
    "pad_token_id": _ID,
    "bos_token_id": _ID,
    "eos_token_id": _ID,
}
# These must not be null; in other families some are missing altogether.
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_ROPE = ("rope_parameters", "rope_scaling")
_ROPE_NUMBERS = {name: _NUMBERS[name] for name in ("rope_theta", "partial_rotary_factor")} | {"factor": _SCALE}
_ROPE_NUMBER = _Range(-1e15, 1e15, 0)
_LATENT = "kv_lora_rank"  # of families whose heads have several sizes; some write 0 as the common one
_LONGEST_SHOWN = 40
_ROPE_DEPTH = 3  # a dictionary for each kind of layer, and lists of factors in it


def refuse_odd_file(folder: Path) -> None:
    """Refuse a damaged config.json, and one with a number outside sense. A missing one is left to the library's loader.

    Raises ModelUnavailable.
    """
    path = folder / CONFIG
    if not path.exists() and not path.is_symlink():
        return
    read = read_object(path)
    for values in (read, read.get("text_config")):
        if isinstance(values, dict):
            _refuse(values, path)


def refuse_odd_config(config: Any, folder: Path) -> None:
    """Refuse a text configuration of transformers, with its defaults, whose numbers do not fit together.

    Raises ModelUnavailable.
    """
    fault = odd_number(config)
    if fault:
        raise _refusal(folder / CONFIG, *fault)


def odd_number(config: Any) -> tuple[str, Any, str] | None:
    """Return the first key of a text configuration with a number outside sense, its value, and what it must be."""
    # Not by getattr, which raises for sizes that differ between layers.
    held, names = vars(config), config.attribute_map
    keys = (*_NUMBERS, *_ROPE, _LATENT, "layer_types")
    values = {key: held[names.get(key, key)] for key in keys if names.get(key, key) in held}
    return next(chain(_faults(values), _contradictions(values)), None)


def _refuse(values: Mapping[str, Any], path: Path) -> None:
    for fault in _faults(values):
        raise _refusal(path, *fault)


def _refusal(path: Path, key: str, value: Any, wanted: str) -> ModelUnavailable:
    shown = ascii(value)
    if len(shown) > _LONGEST_SHOWN:
        shown = f"{shown[:_LONGEST_SHOWN]}..."
    return ModelUnavailable(
        "The model's configuration has a value that no model can have.",
        where=f"{path}: {key} = {shown}",
        next_step=f"it must be {wanted}; correct the file, or copy the folder again",
    )


def _faults(values: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    for key, allowed in _NUMBERS.items():
        if (value := values.get(key)) is None or (key == "head_dim" and value == 0 and values.get(_LATENT)):
            continue
        # In some families a list has a number for each layer; a model may have several end ids.
        for each in value if isinstance(value, list) else [value]:
            if not allowed.holds(each):
                yield key, each, str(allowed)
    for key in _ROPE:
        for name, value in _numbers_in(values.get(key), key, _ROPE_DEPTH):
            allowed = _ROPE_NUMBERS.get(name.rpartition(".")[2], _ROPE_NUMBER)
            if not allowed.holds(value):
                yield name, value, str(allowed)
    kinds = values.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        yield "layer_types", kinds, "a list with the kind of each layer"


def _numbers_in(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield the numbers in nested settings under their full names, and everything that should be a number."""
    if name.rpartition(".")[2] in _ROPE_NUMBERS:
        yield name, value
    elif isinstance(value, dict) and depth:
        for key, inner in value.items():
            yield from _numbers_in(inner, f"{name}.{key}", depth - 1)
    elif isinstance(value, list) and depth:
        for inner in value:
            yield from _numbers_in(inner, name, 0)
    elif value is not None and not isinstance(value, str | bool):
        yield name, value


def _contradictions(values: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Yield numbers that do not fit each other; all are in their ranges, or null."""
    for key in _NEEDED:
        if key in values and values[key] is None:
            yield key, None, str(_NUMBERS[key])
    layers, kinds = values.get("num_hidden_layers"), values.get("layer_types")
    if isinstance(layers, int) and kinds is not None and len(kinds) != layers:
        yield "layer_types", kinds, f"a list with the kind of each of the {layers} layers"
    if "sliding_attention" in (kinds or ()) and not values.get("sliding_window"):
        yield "sliding_window", values.get("sliding_window"), "at least 1 if layers use it"
    heads, groups = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        yield "num_key_value_heads", groups, f"a divisor of num_attention_heads, {heads}"
    vocabulary, pad = values.get("vocab_size"), values.get("pad_token_id")
    if isinstance(vocabulary, int) and isinstance(pad, int) and pad >= vocabulary:
        yield "pad_token_id", pad, f"below vocab_size, {vocabulary}"
