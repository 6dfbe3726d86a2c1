"""Which models this engine can drive, told from their configuration alone."""

from __future__ import annotations

from typing import Any

_KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})
# What marks a cache that is more than keys and values by position.
_OTHER_CACHES = ("ssm_state_size", "mamba_d_state", "linear_num_key_heads", "kv_lora_rank", "attention_chunk_size")


def why_not_drivable(config: Any) -> str:
    """Return why a model of this text configuration cannot be driven, empty where it can."""
    odd = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if odd:
        return f"its layers attend in ways that are not known here: {', '.join(sorted(odd))}"
    if any(getattr(config, name, None) for name in _OTHER_CACHES):
        return "its cache is more than keys and values by position"
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder"
    return ""
