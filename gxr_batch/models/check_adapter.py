"""Finds out without the model's weights whether an adapter can be applied: `check` uses it, and so does vllm.

Names and shapes come from a model on torch's device "meta", which the configuration decides.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from gxr_batch.job import ModelSection
from gxr_batch.models.apply_lora import refuse_in_four_bit
from gxr_batch.models.load_weights import load_config, load_tokenizer
from gxr_batch.models.lora import Adapter, Placed, place, read_adapter
from gxr_batch.models.lora_vocabulary import has_tokenizer, refuse_unknown_tokens
from gxr_batch.models.placement import NO_KERNELS, refuse_float16
from gxr_batch.models.quantization import quantised_otherwise
from gxr_batch.models.read_weights import check_whole, refuse_misfit, without_weights
from gxr_batch.models.source import Source, find


class Fitting(NamedTuple):
    """An adapter, and where it belongs in its model."""

    adapter: Adapter
    placed: Placed


def check_weights(section: ModelSection, *, four_bit: bool, own_kernels: bool = False) -> Fitting | None:
    """Check the weights that are on this machine; return how the adapter fits, None if there is none.

    An adapter on the hub is downloaded, a model is not. `four_bit` tells how the model will be loaded, `own_kernels`
    that its engine may have kernels for GPUs. Raises ModelUnavailable, JobFileError.
    """
    sources = find(section, weights=False, adapter_weights=True)
    config = load_config(section)
    if not own_kernels:
        refuse_float16(section, config.get_text_config(), NO_KERNELS)
    if not sources.base.revision:
        check_whole(sources.base.weight_files())
        refuse_misfit(sources.base, config)
    if sources.adapter is None:
        return None
    own = load_tokenizer(section) if has_tokenizer(sources.adapter.folder) else None
    fitting = fit_adapter(sources.adapter, sources.base, config, own)
    patches = fitting.placed.patches
    if other := quantised_otherwise(config):
        raise fitting.adapter.refuse_format(other)
    if four_bit:
        # bitsandbytes leaves embedding and output layer as they are.
        ends = (fitting.placed.embedding, fitting.placed.head)
        refuse_in_four_bit(fitting.adapter, {name: each for name, each in patches.items() if name not in ends})
    return fitting


def fit_adapter(source: Source, base: Source, config: Any, tokenizer: Any) -> Fitting:
    """Read an adapter and match it to a model of this configuration. Raises ModelUnavailable.

    `tokenizer` is the one that the run uses, it is not looked at if the adapter has none.
    """
    adapter = read_adapter(source)
    model = without_weights(base, config)
    placed = place(adapter, model)
    rows = placed.vocabulary or model.get_input_embeddings().weight.shape[0]
    refuse_unknown_tokens(adapter, tokenizer, base.folder, rows)
    return Fitting(adapter, placed)
