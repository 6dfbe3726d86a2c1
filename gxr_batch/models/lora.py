"""A LoRA adapter: read from its folder, and matched to a model's modules by names and shapes.

An adapter names modules as the class that it was trained on does: Gemma 3 has three spellings, text-only, multimodal,
and multimodal of older libraries. Every tensor must match a module and every target module must have its tensors,
otherwise the adapter is refused by name: a base model without its adapter would look like a bad fine-tune.

`apply_lora` changes the weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gxr_batch.errors import ModelUnavailable
from gxr_batch.models.lora_config import WEIGHTS, AdapterConfig, read_adapter_config
from gxr_batch.models.source import Source

# Peft's prefix, and the adapter name that older versions left inside a tensor's name.
_TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)(?:\.base_layer)?\."
    r"(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|weight)(?:\.default)?(?:\.weight)?"
)
_KINDS = {
    "lora_A": "a",
    "lora_B": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "weight": "weight",
}
_TEXT_SPELLINGS = ("model.language_model.", "language_model.model.", "model.")
_VISION = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\.")
_NAMED = 3  # tensors named in a message


@dataclass(kw_only=True)
class Patch:
    """What an adapter does to one module: adds `scale` x b x a to its weight, rescales it, or replaces it."""

    module: str
    scale: float
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    weight: torch.Tensor | None = None

    @property
    def is_lora(self) -> bool:
        """Whether it adds a product."""
        return self.a is not None


@dataclass(kw_only=True)
class Adapter:
    """An adapter's settings and tensors, read and checked as far as possible without its model."""

    source: Source
    config: AdapterConfig
    patches: dict[str, Patch]

    def refuse(self, what: str, next_step: str = "") -> ModelUnavailable:
        """Return an error about this adapter."""
        base = f"use the model that it was trained on{f', {self.config.base},' * bool(self.config.base)} as the base"
        return ModelUnavailable(what, where=str(self.source.folder), next_step=next_step or base)


class Placed(NamedTuple):
    """Patches by the loaded model's module names, and names of the modules that are set aside."""

    patches: dict[str, Patch]
    aside: list[str]


def read_adapter(source: Source) -> Adapter:
    """Read an adapter. Raises ModelUnavailable if it is damaged, untrained, or not supported."""
    config = read_adapter_config(source.folder)
    made = Adapter(source=source, config=config, patches={})
    again = "copy the adapter's folder again"
    try:
        tensors = load_file(source.adapter_files()[1])
    except (SafetensorError, OSError):
        raise made.refuse(
            f"The adapter's weights cannot be loaded: {WEIGHTS} is damaged or truncated.", again
        ) from None
    unknown = []
    for name, tensor in tensors.items():
        found = _TENSOR.fullmatch(name)
        if found is None:
            unknown.append(name)
            continue
        module = found["module"]
        patch = made.patches.setdefault(module, Patch(module=module, scale=config.scale(module)))
        setattr(patch, _KINDS[found["kind"]], tensor)
    if unknown:
        raise made.refuse(f"The adapter contains tensors that are not part of LoRA: {_some(unknown)}.", again)
    if broken := [patch.module for patch in made.patches.values() if not _is_whole(patch, config)]:
        raise made.refuse(f"The adapter lacks some of the matrices of {_some(broken)}.", again)
    if wild := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise made.refuse(f"The adapter contains numbers that are not finite: {_some(wild)}.", again)
    lora = [patch for patch in made.patches.values() if patch.is_lora]
    if not lora:
        raise made.refuse("The adapter contains no LoRA matrices.", again)
    if not any(patch.b is not None and patch.b.any() for patch in lora):
        raise made.refuse(
            "The adapter changes nothing: all its B matrices are zero, as before the first step of training.",
            "train it, or set model.adapter to another one",
        )
    return made


def _is_whole(patch: Patch, config: AdapterConfig) -> bool:
    """Return whether a patch has both matrices or none, and its magnitudes with DoRA."""
    parts = patch.a is not None, patch.b is not None, patch.magnitude is not None
    return parts in {(False, False, False), (True, True, config.uses_dora)}


def place(adapter: Adapter, modules: Mapping[str, Any]) -> Placed:
    """Find the module of the model for every patch. Raises ModelUnavailable with the names of those that do not fit.

    `modules` are the loaded model's, by name. An adapter trained with images may contain parts for the vision tower;
    text does not pass through it, so they are set aside, whether or not this model has one.
    """
    prefix = "model.language_model." if "model.language_model" in modules else "model."
    placed: dict[str, Patch] = {}
    aside, unmatched = [], []
    for name, patch in adapter.patches.items():
        target = _target(name, prefix, modules)
        if _VISION.match(name):
            aside.append(name)
        elif target is not None and target not in placed:
            placed[target] = patch
        else:
            unmatched.append(name)
    if unmatched:
        count = f"{len(unmatched)} of the adapter's {len(adapter.patches)} modules are"
        raise adapter.refuse(f"The adapter belongs to another model: {count} missing here, {_some(unmatched)}.")
    if misfits := [text for target, patch in placed.items() for text in _misfits(adapter, patch, modules[target])]:
        raise adapter.refuse(f"The adapter does not fit this model: {_some(misfits)}.")
    if missing := _missing(adapter, modules, placed, prefix):
        raise adapter.refuse(
            f"The adapter lacks the matrices of {len(missing)} modules that its settings name: {_some(missing)}.",
            "copy the adapter's folder again",
        )
    if not any(patch.is_lora for patch in placed.values()):
        raise adapter.refuse("The adapter changes no module that processes text.", "train it on the language model")
    return Placed(placed, aside)


def _target(name: str, prefix: str, modules: Mapping[str, Any]) -> str | None:
    """Return the module that an adapter's name means in this model."""
    spelled = [prefix + name.removeprefix(spelling) for spelling in _TEXT_SPELLINGS if name.startswith(spelling)]
    candidates = [name, *spelled, *(["lm_head"] if name == "language_model.lm_head" else [])]
    return next((candidate for candidate in candidates if hasattr(modules.get(candidate), "weight")), None)


def _misfits(adapter: Adapter, patch: Patch, module: Any) -> list[str]:
    """Return which tensors do not have the shape that this module requires."""
    rank = adapter.config.rank(patch.module)
    if hasattr(module, "num_embeddings"):
        inputs, outputs = module.num_embeddings, module.embedding_dim
        whole: tuple[int, ...] = (inputs, outputs)
        if patch.magnitude is not None:
            return [f"{patch.module} is an embedding, for which DoRA is not supported"]
    elif hasattr(module, "in_features"):
        inputs, outputs = module.in_features, module.out_features
        whole = (outputs, inputs)
    else:
        inputs, outputs, whole = 0, 0, tuple(module.weight.shape)
        if patch.is_lora:
            return [f"{patch.module} is not a linear layer"]
    wanted = {"a": (rank, inputs), "b": (outputs, rank), "magnitude": (outputs,), "weight": whole}
    shapes = {kind: tuple(getattr(patch, kind).shape) for kind in wanted if getattr(patch, kind) is not None}
    return [
        f"{patch.module} {kind.upper()} is {_spelled(shape)}, not {_spelled(wanted[kind])}"
        for kind, shape in shapes.items()
        if shape != wanted[kind]
    ]


def _missing(adapter: Adapter, modules: Mapping[str, Any], placed: Mapping[str, Patch], prefix: str) -> list[str]:
    """Return the modules that the adapter's settings target but its file lacks."""
    config = adapter.config
    if config.settings.get("target_modules") in (None, [], "", "all-linear"):
        return []  # peft writes out the names of what it trained, so this was made by other means
    spoken = (name for name in adapter.patches if name.startswith(_TEXT_SPELLINGS) and not _VISION.match(name))
    trained_as = next(spoken, prefix)
    spelling = next(each for each in _TEXT_SPELLINGS if trained_as.startswith(each))
    found = []
    for name, module in modules.items():
        linear = hasattr(module, "in_features") or hasattr(module, "num_embeddings")
        own = _as_trained(name, prefix, spelling)
        if linear and own and name not in placed and config.targets(own):
            found.append(own)
    return found


def _as_trained(name: str, prefix: str, spelling: str) -> str | None:
    """Return a name of the model in the spelling that the adapter was trained with; None on the vision side."""
    if _VISION.match(name):
        return None
    if name == "lm_head" and spelling == "language_model.model.":
        return "language_model.lm_head"
    return spelling + name.removeprefix(prefix) if name.startswith(prefix) else name


def _spelled(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
