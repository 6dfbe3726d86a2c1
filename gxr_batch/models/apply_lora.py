"""Applies a LoRA adapter to a loaded model's weights.

Merging adds the product of the matrices in float32 and rounds once to the weights' number format, so the result is a
plain model that every forward pass can run. Merging into 4-bit weights would round them again, coarsely; there the
matrices stay separate (peft's layers), in the format that the 4-bit layers compute in. A probe before and after checks
that the adapter changes the model's output.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gxr_batch.cells import quoted
from gxr_batch.models.library_output import quiet_transformers
from gxr_batch.models.lora import Adapter, Patch, place
from gxr_batch.models.lora_vocabulary import has_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    placed = place(adapter, model)
    modules = dict(model.named_modules())
    four_bit = {name: patch for name, patch in placed.patches.items() if _is_four_bit(modules[name])}
    _refuse_other_formats(adapter, [modules[name] for name in placed.patches if name not in four_bit])
    refuse_in_four_bit(adapter, four_bit)
    embedding: Any = model.get_input_embeddings()
    now = int(embedding.weight.shape[0])
    usable = min(now, placed.vocabulary or now, model.config.get_text_config().vocab_size)
    before = _probe(model, usable)
    if placed.vocabulary is not None:
        with quiet_transformers():
            model.resize_token_embeddings(placed.vocabulary, mean_resizing=False)
    if not placed.tied:
        _untie(model)
    for name, patch in placed.patches.items():
        if name not in four_bit:
            _merge(modules[name], patch)
    if four_bit:
        _put_beside(model, four_bit, adapter)
    _compare(adapter, before, _probe(model, usable), model.dtype)
    notices = []
    if adapter.aside:
        how_many = "1 module" if len(adapter.aside) == 1 else f"{len(adapter.aside)} modules"
        verb = "is" if len(adapter.aside) == 1 else "are"
        notices.append(f"{how_many} of the adapter {verb} for images and {verb} ignored: text does not pass through.")
    if placed.vocabulary is not None:
        notices.append(_resized(adapter, now, placed.vocabulary))
    return Applied(how=_described(placed.patches, four_bit, model.dtype), notices=tuple(notices))


def _resized(adapter: Adapter, before: int, after: int) -> str:
    sentence = f"The adapter changes the model's vocabulary from {before} to {after} tokens."
    if has_tokenizer(adapter.source.folder):
        return sentence
    return f"{sentence} Its folder has no tokenizer, so the base's is used, which does not know added tokens."


def _merge(module: Any, patch: Patch) -> None:
    """Merge one patch into a module's weight, in float32."""
    weight = module.weight
    if patch.weight is not None:
        weight.data.copy_(patch.weight)
    if patch.rows is not None:
        index = torch.tensor(patch.tokens, device=weight.device)
        weight.data.index_copy_(0, index, patch.rows.to(weight.device, weight.dtype))
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


def _untie(model: Any) -> None:
    """Give the output layer a separate copy of the embedding's weight, if it shares that one."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
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
        raise adapter.refuse_format(", ".join(odd))


def refuse_in_four_bit(adapter: Adapter, patches: Mapping[str, Patch]) -> None:
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
        raise adapter.refuse(
            f"peft could not apply the adapter to {len(odd)} modules, e.g. {quoted(odd[0])}.", "update peft"
        )
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


def _probe(model: PreTrainedModel, tokens: int) -> torch.Tensor:
    """Return the logits of the first `tokens` tokens after a fixed short prompt of them, float32 on the CPU."""
    embedding: Any = model.get_input_embeddings()
    usable = tokens - 3
    ids = torch.tensor([[3 + (131 * step) % usable for step in range(_PROBE_TOKENS)]], device=embedding.weight.device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0, -1, :tokens]
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
    replaced = sum(not patch.is_lora and patch.weight is not None for patch in patches.values())
    tokens = len({token for patch in patches.values() if patch.rows is not None for token in patch.tokens})
    if four_bit:
        how = f"beside the 4-bit weights, in {_short(dtype)}: {len(four_bit)} LoRA modules"
        how += f"; merged: {lora - len(four_bit)}" * (lora > len(four_bit))
    else:
        how = f"merged in float32, rounded once to {_short(dtype)}: {lora} LoRA modules"
    how += f"; weights replaced: {replaced}" * bool(replaced)
    return how + f"; rows of tokens replaced: {tokens}" * bool(tokens)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
