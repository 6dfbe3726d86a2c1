"""What our forward passes need to know of a model of transformers: whether they can run it, and where its parts are."""

from __future__ import annotations

from typing import Any

import torch

from gxr_batch.models.config_numbers import odd_number

FAMILIES = frozenset({"gemma3_text", "gemma3", "llama"})


def why_not(model: Any) -> str:
    """Return why none of our forward passes can run this model, empty if one may."""
    config = model.config.get_text_config()
    if odd := odd_number(config):
        return f"its {odd[0]} must be {odd[2]}"
    if not all(isinstance(count, int) for count in (*sizes(config), *head_counts(config))):
        return "its layers have different sizes"
    reasons = {
        "it is not a Gemma 3 or Llama model": config.model_type not in FAMILIES,
        "it has biases": bool(getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)),
        "it caps its logits": any(getattr(config, f"{where}_logit_softcapping", None) for where in ("final", "attn")),
        "only a part of each head is rotated": _rotated_in_part(config),
        "its layers are not plain linear layers": not _plain(model),
        "its activation is not supported": activation(config) not in {"gelu_pytorch_tanh", "silu"},
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def sizes(config: Any) -> tuple[int, int, int, int]:
    """Return the hidden, the inner and the head size, and the vocabulary."""
    return config.hidden_size, config.intermediate_size, getattr(config, "head_dim", 0) or 0, config.vocab_size


def head_counts(config: Any) -> tuple[int, int]:
    """Return the numbers of query heads and of key and value heads."""
    return config.num_attention_heads, config.num_key_value_heads


def _rotated_in_part(config: Any) -> bool:
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return any(kind.get("partial_rotary_factor") not in {None, 1} for kind in kinds)


def _plain(model: Any) -> bool:
    layers = decoder_of(model).layers
    return all(type(module) is torch.nn.Linear for name, module in layers.named_modules() if name.endswith("_proj"))


def decoder_of(model: Any) -> Any:
    """Return the module with embed_tokens, layers, norm and rotary_emb, also inside a multimodal model."""
    inner = model.model
    return getattr(inner, "language_model", inner)


def activation(config: Any) -> str:
    """Return the name of the activation between gate and up."""
    return str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", ""))


def layer_kinds(config: Any) -> list[str]:
    """Return "full_attention" or "sliding_attention" for each layer."""
    return list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)


def angles(decoder: Any, config: Any, kind: str, capacity: int) -> torch.Tensor:
    """Return cosines, then sines, of every position [capacity, head size] float32, as the library computes them."""
    device = decoder.embed_tokens.weight.device
    example, positions = torch.zeros(1, 1, device=device), torch.arange(capacity, device=device)[None]
    arguments = (kind,) if config.model_type.startswith("gemma3") else ()
    cosines, sines = decoder.rotary_emb(example, positions, *arguments)
    half = config.head_dim // 2
    return torch.cat([cosines[0, :, :half], sines[0, :, :half]], dim=-1)


def norm_weight(module: Any) -> torch.Tensor:
    """Return a norm's weight in float32; Gemma's counts from one."""
    weight: torch.Tensor = module.weight.detach().float()
    return weight + 1 if "Gemma" in type(module).__name__ else weight


def query_scale(config: Any) -> float:
    """Return what the products of queries and keys are multiplied with."""
    return float((getattr(config, "query_pre_attn_scalar", None) or config.head_dim) ** -0.5)
