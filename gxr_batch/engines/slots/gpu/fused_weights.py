"""A model's weights as the GPU's forward pass reads them: one matrix for queries, keys and values, one for gate and up.

The library's own modules become views of the fused matrices, so that both forward passes work and no weight exists
twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gxr_batch.engines.slots import decoder_layout
from gxr_batch.engines.slots.decoder_layout import (
    activation,
    angles,
    decoder_of,
    head_counts,
    layer_kinds,
    norm_weight,
    query_scale,
    sizes,
)
from gxr_batch.engines.slots.gpu.float16_range import Range, in_range
from gxr_batch.engines.slots.gpu.launch import ACTIVATIONS

_HEAD_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer: matrices [outputs, inputs] in the model's type, norms in float32; None where Llama has no norm.

    `angles` [capacity, head size] as in `decoder_layout.angles`; `window` 0 = it sees all positions; `head_eps` is for
    the norms of queries and keys. `range` is for float16 alone, None in other types.
    """

    qkv: torch.Tensor
    out: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    before_attention: torch.Tensor
    after_attention: torch.Tensor | None
    before_mlp: torch.Tensor
    after_mlp: torch.Tensor | None
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    angles: torch.Tensor
    window: int
    score_scale: float
    head_eps: float
    range: Range | None = None


@dataclass(frozen=True, kw_only=True)
class Weights:
    """All layers, the embedding and the head [vocabulary, hidden], and the numbers that the kernels need."""

    layers: tuple[Layer, ...]
    embedding: torch.Tensor
    head: torch.Tensor
    last_norm: torch.Tensor
    embed_scale: float
    eps: float
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    gate: str
    round_first: bool

    @property
    def hidden(self) -> int:
        """The size of a token's vector."""
        return int(self.embedding.shape[1])

    @property
    def vocab(self) -> int:
        """How many tokens have logits."""
        return int(self.head.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """The type of matrices, cache and logits."""
        return self.head.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.device


def why_not(model: Any) -> str:
    """Return why the GPU's forward pass cannot run this model, empty if it can."""
    if reason := decoder_layout.why_not(model):
        return reason
    config = model.config.get_text_config()
    (heads, kv_heads), head_size = head_counts(config), sizes(config)[2]
    parameters = list(decoder_of(model).parameters())
    reasons = {
        "it is on several devices": len({one.device for one in parameters}) != 1,
        "its weights have several types": len({one.dtype for one in parameters if one.dim() == 2}) != 1,
        "its output layer has a bias": getattr(model.lm_head, "bias", None) is not None,
        f"it is in {model.dtype}": model.dtype not in ACTIVATIONS,
        f"its heads have {head_size} numbers": head_size not in _HEAD_SIZES,
        "its key-value heads do not divide its heads": kv_heads < 1 or heads % kv_heads != 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


@torch.no_grad()
def fuse(model: Any, capacity: int) -> Weights:
    """Return the weights of a model for which `why_not` is empty, for positions below `capacity`."""
    config = model.config.get_text_config()
    decoder = decoder_of(model)
    kinds = layer_kinds(config)
    of_kind = {kind: angles(decoder, config, kind, capacity).contiguous() for kind in set(kinds)}
    heads, kv_heads = head_counts(config)
    layers = []
    for layer, kind in zip(decoder.layers, kinds, strict=True):
        made = _layer(layer, of_kind[kind], config, config.sliding_window if kind == "sliding_attention" else 0)
        layers.append(in_range(made) if made.down.dtype == torch.float16 else made)
    scale = getattr(decoder.embed_tokens, "scalar_embed_scale", 1.0)
    head = model.lm_head.weight.detach()
    return Weights(
        layers=tuple(layers),
        embedding=decoder.embed_tokens.weight.detach(),
        head=head,
        last_norm=norm_weight(decoder.norm),
        embed_scale=float(torch.tensor(scale).to(head.dtype)),
        eps=config.rms_norm_eps,
        heads=heads,
        kv_heads=kv_heads,
        head_size=config.head_dim,
        inner=config.intermediate_size,
        gate="gelu" if activation(config) == "gelu_pytorch_tanh" else "silu",
        round_first=config.model_type == "llama",
    )


def _layer(layer: Any, of_kind: torch.Tensor, config: Any, window: int) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    gemma = hasattr(layer, "pre_feedforward_layernorm")  # a norm on each side of attention and feed-forward
    before_mlp = layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm
    return Layer(
        qkv=_fused([attention.q_proj, attention.k_proj, attention.v_proj]),
        out=attention.o_proj.weight.detach(),
        gate_up=_fused([mlp.gate_proj, mlp.up_proj]),
        down=mlp.down_proj.weight.detach(),
        before_attention=norm_weight(layer.input_layernorm),
        after_attention=norm_weight(layer.post_attention_layernorm) if gemma else None,
        before_mlp=norm_weight(before_mlp),
        after_mlp=norm_weight(layer.post_feedforward_layernorm) if gemma else None,
        query_norm=norm_weight(attention.q_norm) if gemma else None,
        key_norm=norm_weight(attention.k_norm) if gemma else None,
        angles=of_kind,
        window=window,
        score_scale=query_scale(config),
        head_eps=config.rms_norm_eps,
    )


def _fused(modules: Sequence[Any]) -> torch.Tensor:
    """Return the modules' weights below one another; each module then has a view of its part."""
    fused = torch.cat([module.weight.detach() for module in modules])
    start = 0
    for module in modules:
        rows = len(module.weight)
        module.weight.data = fused[start : start + rows]
        start += rows
    return fused
