"""A LoRA adapter: read from its folder, matched to a loaded model's modules, and applied to its weights.

An adapter names modules as the class that it was trained on does: Gemma 3 has three spellings, text-only, multimodal,
and multimodal of older libraries. Every tensor must match a module and every target module must have its tensors,
otherwise the adapter is refused by name: a base model without its adapter would look like a bad fine-tune.

Merging adds the product of the matrices in float32 and rounds once to the weights' number format, so the result is a
plain model that every forward pass can run. Merging into 4-bit weights would round them again, coarsely; there the
matrices stay separate (peft's layers), in the format that the 4-bit layers compute in. A probe before and after checks
that the adapter changes the model's output.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gxr_batch.errors import ModelUnavailable
from gxr_batch.models.lora_config import WEIGHTS, AdapterConfig, read_adapter_config
from gxr_batch.models.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    """Patches by the loaded model's module names, and names of the modules that are ignored."""

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
    text does not pass through it, so they are ignored, whether or not this model has one.
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


# ---------------------------------------------------------------------- on the weights

_PROBE_TOKENS = 16
_NAME = "default"


@dataclass(frozen=True, kw_only=True)
class Applied:
    """How an adapter was applied: the sentence for the manifest, and notices for the user."""

    how: str
    notices: tuple[str, ...] = ()


@torch.no_grad()
def apply_adapter(model: PreTrainedModel, adapter: Adapter) -> Applied:
    """Apply an adapter to a model without offloaded weights. Raises ModelUnavailable unless it has an effect.

    The model is changed in place.
    """
    modules = dict(model.named_modules())
    placed = place(adapter, modules)
    four_bit = {name: patch for name, patch in placed.patches.items() if _is_four_bit(modules[name])}
    _refuse_other_formats(adapter, [modules[name] for name in placed.patches if name not in four_bit])
    _refuse_in_four_bit(adapter, four_bit)
    before = _probe(model)
    _untie(model, placed.patches, modules)
    for name, patch in placed.patches.items():
        if name not in four_bit:
            _merge(modules[name], patch)
    if four_bit:
        _put_beside(model, four_bit, adapter)
    _compare(adapter, before, _probe(model), model.dtype)
    notices = []
    if placed.aside:
        notices.append(
            f"{len(placed.aside)} modules of the adapter are for images and are ignored: no text passes through them."
        )
    return Applied(how=_described(placed.patches, four_bit, model.dtype), notices=tuple(notices))


def _merge(module: Any, patch: Patch) -> None:
    """Merge one patch into a module's weight, in float32."""
    weight = module.weight
    if patch.weight is not None:
        weight.data.copy_(patch.weight)
    if patch.a is None or patch.b is None:
        return
    a, b = (tensor.to(weight.device, torch.float32) for tensor in (patch.a, patch.b))
    product = (b @ a) * patch.scale
    whole = weight.data.float() + (product.T if hasattr(module, "num_embeddings") else product)
    if patch.magnitude is not None:
        # DoRA: the rows keep their direction and get the trained length.
        length = torch.linalg.vector_norm(whole, dim=1)
        whole *= (patch.magnitude.to(weight.device, torch.float32) / length)[:, None]
    weight.data.copy_(whole)


def _untie(model: Any, patches: Mapping[str, Patch], modules: Mapping[str, Any]) -> None:
    """Untie the output layer's weight if the adapter changes only it or only the embedding.

    In training peft changes just one of the two, even if the model ties them.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    touched = any(modules[name] in (head, embedding) for name in patches)
    if not touched or head is None or head.weight is not embedding.weight:
        return
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False


# ---------------------------------------------------------------------- 4 bits


def _is_four_bit(module: Any) -> bool:
    return type(module).__name__ == "Linear4bit"


def _refuse_other_formats(adapter: Adapter, modules: Iterable[Any]) -> None:
    """Refuse to add to weights in other quantised formats: 8 bits, GPTQ, AWQ. Raises ModelUnavailable."""
    odd = sorted({type(module).__name__ for module in modules if not module.weight.is_floating_point()})
    if odd:
        raise adapter.refuse(
            f"The adapter cannot be applied to the model's quantised weights ({', '.join(odd)}).",
            "name a base model with full weights, or one in bitsandbytes' 4 bits",
        )


def _refuse_in_four_bit(adapter: Adapter, patches: Mapping[str, Patch]) -> None:
    """Refuse what cannot be applied next to 4-bit weights. Raises ModelUnavailable."""
    step = "set model.load_in_4bit = false (with a base model that is not stored in 4 bits)"
    if any(patch.weight is not None for patch in patches.values()):
        raise adapter.refuse("The adapter replaces whole weights (modules_to_save) that are loaded in 4 bits.", step)
    if any(patch.magnitude is not None for patch in patches.values()):
        raise adapter.refuse("A DoRA adapter needs full weights, and the model is loaded in 4 bits.", step)


def _put_beside(model: PreTrainedModel, patches: Mapping[str, Patch], adapter: Adapter) -> None:
    """Wrap 4-bit layers in peft's layers, with the adapter's matrices."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    ranks = {name: adapter.config.rank(patch.module) for name, patch in patches.items()}
    config = LoraConfig(target_modules=list(patches), rank_pattern=ranks, inference_mode=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's advice for training
        inject_adapter_in_model(config, model, _NAME)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    if layers.keys() != patches.keys():
        odd = sorted(layers.keys() ^ patches.keys())
        raise adapter.refuse(f"peft could not apply the adapter to {len(odd)} modules, e.g. {odd[0]}.", "update peft")
    for name, layer in layers.items():
        patch = patches[name]
        layer.scaling[_NAME] = patch.scale
        base: Any = layer.get_base_layer().weight
        for mine, theirs in ((layer.lora_A, patch.a), (layer.lora_B, patch.b)):
            weight = mine[_NAME].weight
            assert theirs is not None  # patches without matrices were refused
            weight.data = theirs.to(base.device, model.dtype)
    model.eval()  # type: ignore[no-untyped-call]


# ---------------------------------------------------------------------- proof


def _probe(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits after a fixed short prompt of token ids, float32 on the CPU."""
    embedding: Any = model.get_input_embeddings()
    usable = min(embedding.num_embeddings, model.config.get_text_config().vocab_size) - 3
    ids = torch.tensor([[3 + (131 * step) % usable for step in range(_PROBE_TOKENS)]], device=embedding.weight.device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0, -1]
    return logits.float().cpu()


def _compare(adapter: Adapter, before: torch.Tensor, after: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise ModelUnavailable if the adapter breaks the model or changes nothing."""
    if bool(before.isfinite().all()) and not bool(after.isfinite().all()):
        raise adapter.refuse(
            "With the adapter the model's logits are not finite numbers.",
            'try model.dtype = "float32", or train it again',
        )
    if torch.equal(before, after):
        raise adapter.refuse(
            f"The adapter changes nothing: the model's logits are the same with it and without it in {_short(dtype)}.",
            'its matrices may be too small for this format: try model.dtype = "float32", or train it longer',
        )


def _described(patches: Mapping[str, Patch], four_bit: Mapping[str, Patch], dtype: torch.dtype) -> str:
    lora = sum(patch.is_lora for patch in patches.values())
    replaced = sum(not patch.is_lora for patch in patches.values())
    if four_bit:
        how = f"beside the 4-bit weights, in {_short(dtype)}: {len(four_bit)} LoRA modules"
        how += f"; merged: {lora - len(four_bit)}" * (lora > len(four_bit))
    else:
        how = f"merged in float32, rounded once to {_short(dtype)}: {lora} LoRA modules"
    return how + (f"; weights replaced: {replaced}" if replaced else "")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
