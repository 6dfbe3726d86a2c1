"""A LoRA adapter: read from its folder, and matched to a model's modules by names and shapes.

An adapter names modules as the class that it was trained on does: Gemma 3 has three spellings, text-only, multimodal,
and multimodal of older libraries. Every tensor must match a module and every target module must have its tensors,
otherwise the adapter is refused by name: a base model without its adapter would look like a bad fine-tune.

Training may also have added tokens. The adapter then has to contain the rows of embedding and output layer for them.

`apply_lora` changes the weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from gxr_batch.cells import quoted
from gxr_batch.errors import ModelUnavailable
from gxr_batch.models.foreign import loading
from gxr_batch.models.lora_config import WEIGHTS, AdapterConfig, is_for_images, read_adapter_config, refuse_endless
from gxr_batch.models.lora_vocabulary import vocabulary_of
from gxr_batch.models.permissions import refuse_unreadable
from gxr_batch.models.source import Source

# Peft's prefix, its wrappers of a layer, and the adapter name that older versions left inside a tensor's name.
_TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)(?:\.token_adapter)?(?:\.base_layer|\.modules_to_save(?:\.default)?)?\."
    r"(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|trainable_tokens_delta|weight)"
    r"(?:\.default)?(?:\.weight)?"
)
_PREFIX = "base_model.model."
# What torch.compile and FSDP put around a layer.
_WRAPPERS = re.compile(r"(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Peft's copy of a weight as it was before training, which it saves if the embedding was resized.
_BEFORE_TRAINING = re.compile(r"\.original_module\.")
_KINDS = {
    "lora_A": "a",
    "lora_B": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "trainable_tokens_delta": "rows",
    "weight": "weight",
}
_FORMATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_TEXT_SPELLINGS = ("model.language_model.", "language_model.model.", "model.")
_HEAD = "lm_head"
_NAMED = 3  # tensors named in a message


@dataclass(kw_only=True)
class Patch:
    """What an adapter does to one module: adds `scale` x b x a to its weight, rescales it, or replaces it.

    `rows` replace those rows of the weight whose numbers are in `tokens`.
    """

    module: str
    scale: float
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    tokens: tuple[int, ...] = ()

    @property
    def is_lora(self) -> bool:
        """Whether it adds a product."""
        return self.a is not None


@dataclass(kw_only=True)
class Adapter:
    """An adapter's settings and tensors, read and checked as far as possible without its model.

    `aside` names its modules for images: no text passes through them.
    """

    source: Source
    config: AdapterConfig
    patches: dict[str, Patch]
    aside: set[str] = field(default_factory=set)

    def refuse(self, what: str, next_step: str = "") -> ModelUnavailable:
        """Return an error about this adapter."""
        named = f", {quoted(self.config.base)}," if self.config.base else ""
        base = f"use the model that it was trained on{named} as the base"
        return ModelUnavailable(what, where=str(self.source.folder), next_step=next_step or base)

    def refuse_format(self, formats: str) -> ModelUnavailable:
        """Return an error about weights in quantised formats that nothing can be added to."""
        step = "name a base model with full weights, or one in bitsandbytes' 4 bits"
        return self.refuse(f"The adapter cannot be applied to the model's quantised weights ({formats}).", step)


class Placed(NamedTuple):
    """Patches by the loaded model's module names.

    `vocabulary` is the number of tokens to resize the model to, None to leave it. `tied` means that embedding and
    output layer still share their weight afterwards.
    """

    patches: dict[str, Patch]
    embedding: str
    head: str
    vocabulary: int | None
    tied: bool


def read_adapter(source: Source) -> Adapter:
    """Read an adapter. Raises ModelUnavailable if it is damaged, untrained, or not supported."""
    config = read_adapter_config(source.folder)
    made = Adapter(source=source, config=config, patches={})
    again = "copy the adapter's folder again"
    files = source.adapter_files()
    refuse_unreadable(files)
    unreadable = f"The adapter's weights cannot be loaded: {WEIGHTS} is damaged or truncated, or in an unknown format"
    with loading(unreadable, files[1], next_step=again):
        tensors = load_file(files[1])
    if odd := [name for name, tensor in tensors.items() if tensor.dtype not in _FORMATS]:
        formats = sorted({str(tensors[name].dtype).removeprefix("torch.") for name in odd})
        raise made.refuse(
            f"The adapter's tensors have a number format that nothing can be computed in ({', '.join(formats)}): "
            f"{_some(odd)}.",
            "save it in bfloat16 or float32",
        )
    refuse_endless(config, [name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in tensors])
    unknown = []
    for saved_as, tensor in tensors.items():
        name = _WRAPPERS.sub("", saved_as)
        bare = name.removeprefix(_PREFIX)
        found = _TENSOR.fullmatch(name)
        if is_for_images(bare):
            made.aside.add(found["module"] if found else bare.rpartition(".")[0])
            continue
        if _BEFORE_TRAINING.search(name):
            continue
        if found is None:
            unknown.append(name)
            continue
        module = found["module"]
        patch = made.patches.setdefault(module, _patch(module, config))
        setattr(patch, _KINDS[found["kind"]], tensor)
    if unknown:
        raise made.refuse(f"The adapter contains tensors that are not part of LoRA: {_some(unknown)}.", again)
    if broken := [patch.module for patch in made.patches.values() if not _is_whole(patch, config)]:
        raise made.refuse(f"The adapter lacks some of the matrices of {_some(broken)}.", again)
    if wild := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise made.refuse(f"The adapter contains numbers that are not finite: {_some(wild)}.", again)
    lora = [patch for patch in made.patches.values() if patch.is_lora]
    if made.aside and not made.patches:
        raise made.refuse("The adapter changes no module that processes text.", "train it on the language model")
    if not lora and not made.aside and not any(patch.rows is not None for patch in made.patches.values()):
        raise made.refuse("The adapter contains no LoRA matrices.", again)
    if lora and not any(patch.b is not None and patch.b.any() for patch in lora):
        raise made.refuse(
            "The adapter changes nothing: all its B matrices are zero, as before the first step of training.",
            "train it, or set model.adapter to another one",
        )
    return made


def _patch(module: str, config: AdapterConfig) -> Patch:
    tokens = config.tokens(module)
    if tokens is None and module.endswith(_HEAD):
        tokens = config.tokens("embed_tokens")  # peft trains rows that both layers share for both
    return Patch(module=module, scale=config.scale(module), tokens=tuple(tokens or ()))


def _is_whole(patch: Patch, config: AdapterConfig) -> bool:
    """Return whether a patch has both matrices or none, and its magnitudes with DoRA."""
    parts = patch.a is not None, patch.b is not None, patch.magnitude is not None
    return parts in {(False, False, False), (True, True, config.uses_dora)}


def place(adapter: Adapter, model: Any) -> Placed:
    """Find the module of the model for every patch. Raises ModelUnavailable with the names of those that do not fit.

    Only the names and shapes of the model's modules matter; it may be on the device "meta".
    """
    modules = dict(model.named_modules())
    prefix = "model.language_model." if "model.language_model" in modules else "model."
    placed: dict[str, Patch] = {}
    unmatched = []
    for name, patch in adapter.patches.items():
        target = _target(name, prefix, modules)
        if target is not None and target not in placed:
            placed[target] = patch
        else:
            unmatched.append(name)
    if unmatched:
        count = f"{len(unmatched)} of the adapter's {len(adapter.patches)} modules are"
        raise adapter.refuse(f"The adapter belongs to another model: {count} missing here, {_some(unmatched)}.")
    vocabulary = vocabulary_of(adapter, placed, model)
    ends = (vocabulary.embedding, vocabulary.head)
    misfits = []
    for target, patch in placed.items():
        misfits += _misfits(adapter, patch, modules[target], vocabulary.rows if target in ends else None)
    if misfits:
        raise adapter.refuse(f"The adapter does not fit this model: {_some(misfits)}.")
    if missing := _missing(adapter, modules, placed, prefix):
        raise adapter.refuse(
            f"The adapter lacks the tensors of {len(missing)} modules that its settings name: {_some(missing)}.",
            "copy the adapter's folder again",
        )
    return Placed(placed, vocabulary.embedding, vocabulary.head, vocabulary.rows, vocabulary.tied)


def _target(name: str, prefix: str, modules: Mapping[str, Any]) -> str | None:
    """Return the module that an adapter's name means in this model."""
    spelled = [prefix + name.removeprefix(spelling) for spelling in _TEXT_SPELLINGS if name.startswith(spelling)]
    candidates = [name, *spelled, *(["lm_head"] if name == "language_model.lm_head" else [])]
    return next((candidate for candidate in candidates if hasattr(modules.get(candidate), "weight")), None)


def _misfits(adapter: Adapter, patch: Patch, module: Any, vocabulary: int | None) -> list[str]:
    """Return which tensors do not have the shape that this module requires.

    `vocabulary` is the number of tokens that embedding and output layer are resized to, None for the module as it is.
    """
    rank = adapter.config.rank(patch.module)
    if hasattr(module, "num_embeddings"):
        inputs, outputs = vocabulary or module.num_embeddings, module.embedding_dim
        whole: tuple[int, ...] = (inputs, outputs)
        if patch.magnitude is not None:
            return [f"{patch.module} is an embedding, for which DoRA is not supported"]
    elif hasattr(module, "in_features"):
        inputs, outputs = module.in_features, vocabulary or module.out_features
        whole = (outputs, inputs)
    else:
        inputs, outputs, whole = 0, 0, tuple(module.weight.shape)
        if patch.is_lora:
            return [f"{patch.module} is not a linear layer"]
    wanted = {"a": (rank, inputs), "b": (outputs, rank), "magnitude": (outputs,), "weight": whole}
    wanted["rows"] = (len(patch.tokens), whole[-1])
    shapes = {kind: tuple(getattr(patch, kind).shape) for kind in wanted if getattr(patch, kind) is not None}
    return [
        f"{patch.module} {kind.upper()} is {_spelled(shape)}, not {_spelled(wanted[kind])}"
        for kind, shape in shapes.items()
        if shape != wanted[kind]
    ]


def _missing(adapter: Adapter, modules: Mapping[str, Any], placed: Mapping[str, Patch], prefix: str) -> list[str]:
    """Return the modules that the adapter's settings target but its file lacks."""
    config = adapter.config
    # Peft writes out the names of what it trained, so an adapter without them was made by other means.
    named = config.settings.get("target_modules") not in (None, [], "", "all-linear")
    spoken = (name for name in adapter.patches if name.startswith(_TEXT_SPELLINGS))
    trained_as = next(spoken, prefix)
    spelling = next(each for each in _TEXT_SPELLINGS if trained_as.startswith(each))
    found = []
    for name, module in modules.items():
        linear = hasattr(module, "in_features") or hasattr(module, "num_embeddings")
        own = _as_trained(name, prefix, spelling)
        if not own or name in placed:
            continue
        # Several names of one output layer and embedding may mean a weight that both share.
        ends = hasattr(module, "num_embeddings") or name == _HEAD
        saved = hasattr(module, "weight") and config.saves(own) and not (ends and config.ties_weights)
        rows = hasattr(module, "num_embeddings") and config.tokens(own)
        if (linear and named and config.targets(own)) or saved or rows:
            found.append(own)
    return found


def _as_trained(name: str, prefix: str, spelling: str) -> str | None:
    """Return a name of the model in the spelling that the adapter was trained with; None on the vision side."""
    if is_for_images(name):
        return None
    if name == "lm_head" and spelling == "language_model.model.":
        return "language_model.lm_head"
    return spelling + name.removeprefix(prefix) if name.startswith(prefix) else name


def _spelled(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(quoted, names[:_NAMED])) + more
