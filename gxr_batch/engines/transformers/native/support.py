"""Which models the kernels can drive, and how to read one: its decoder, its layers' kinds, its sizes."""

from __future__ import annotations

from typing import Any

import torch

from gxr_batch.engines.transformers.native.binding import Shape

FAMILIES = frozenset({"gemma3_text", "gemma3", "llama"})


def why_not(model: Any) -> str:
    """Return why the kernels cannot drive this model, empty where they can."""
    config = model.config.get_text_config()
    weight = model.lm_head.weight
    dims = (config.hidden_size, config.intermediate_size, getattr(config, "head_dim", 0) or 0, config.vocab_size)
    reasons = {
        "it is not a Gemma 3 or Llama model": config.model_type not in FAMILIES,
        "it is not in bfloat16": weight.dtype != torch.bfloat16,
        "it is not on the CPU": weight.device.type != "cpu",
        "its sizes are no multiples of 32": any(size == 0 or size % 32 for size in dims),
        "it has biases": bool(getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)),
        "it caps its logits": bool(getattr(config, "final_logit_softcapping", None)),
        "its layers are not plain linear ones": not _plain(model),
        "its activation is another": _activation(config) not in {"gelu_pytorch_tanh", "silu"},
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _plain(model: Any) -> bool:
    layers = decoder_of(model).layers
    return all(type(module) is torch.nn.Linear for name, module in layers.named_modules() if name.endswith("_proj"))


def decoder_of(model: Any) -> Any:
    """Return the module with embed_tokens, layers, norm and rotary_emb, also inside a multimodal model."""
    inner = model.model
    return getattr(inner, "language_model", inner)


def _activation(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", ""))


def layer_kinds(config: Any) -> list[str]:
    """Return "full_attention" or "sliding_attention" for each layer."""
    return list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)


def shape_of(config: Any, slots: int, capacity: int, embedding: Any) -> Shape:
    """Return the sizes that the kernels need."""
    scale = getattr(config, "query_pre_attn_scalar", None) or config.head_dim
    return Shape(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        inner=config.intermediate_size,
        layers=config.num_hidden_layers,
        vocab=config.vocab_size,
        slots=slots,
        capacity=capacity,
        gelu=int(_activation(config) == "gelu_pytorch_tanh"),
        eps=config.rms_norm_eps,
        scale=scale**-0.5,
        embed_scale=float(torch.tensor(getattr(embedding, "scalar_embed_scale", 1.0)).bfloat16()),
    )
