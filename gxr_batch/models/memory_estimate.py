"""How much memory a model takes, as plain arithmetic on its configuration: no device is asked, no torch is needed."""

from __future__ import annotations

from typing import Any

# Rows for which there has to be room beside the weights before a model counts as fitting (the contract's eight).
ROWS_THAT_MUST_FIT = 8
# Of the free memory, what weights and rows may take: the rest is for activations, fragments and other programs.
_USABLE = 0.85
# nf4 with double quantisation: 4 bits a weight and its scales, while the embeddings stay in 16 bits.
_FOUR_BIT_SHARE = 0.4
# Float32 copies of one row's logits that alternate while a token is chosen.
_LOGITS_COPIES = 6


def row_bytes(config: Any, length: int, element_bytes: int, *, windowed: bool = False) -> int:
    """Return the bytes that one row of `length` tokens takes: keys and values of every layer, and its logits.

    `config` is a text configuration of transformers. `windowed` is for caches whose sliding layers keep no more than
    their window; ours keep whole rows.
    """
    window: int = (getattr(config, "sliding_window", None) or length) if windowed else length
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    sliding = sum(kind == "sliding_attention" for kind in kinds)
    positions = (len(kinds) - sliding) * length + sliding * min(length, window)
    return int(positions * _layer_bytes(config, element_bytes) + config.vocab_size * 4 * _LOGITS_COPIES)


def kv_bytes_a_token(config: Any, element_bytes: int) -> int:
    """Return the bytes that one token takes in the caches of all layers."""
    return int(config.num_hidden_layers * _layer_bytes(config, element_bytes))


def _layer_bytes(config: Any, element_bytes: int) -> int:
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads * head_dim * 2 * element_bytes


def fits(weight_bytes: int, bytes_a_row: int, free_bytes: int) -> bool:
    """Return whether weights and the rows that must fit find room in the free memory."""
    return bytes_needed(weight_bytes, bytes_a_row) <= free_bytes


def bytes_needed(weight_bytes: int, bytes_a_row: int) -> int:
    """Return the free bytes that weights and the rows that must fit ask for."""
    return int((weight_bytes + ROWS_THAT_MUST_FIT * bytes_a_row) / _USABLE)


def four_bit_bytes(weight_bytes: int) -> int:
    """Return about how many bytes 16-bit weights take in 4 bits."""
    return int(weight_bytes * _FOUR_BIT_SHARE)


def rows_that_fit(bytes_a_row: int, free_bytes: int, most: int) -> int:
    """Return how many rows go beside loaded weights into the free memory: at least 1, at most `most`."""
    return max(1, min(most, int(_USABLE * free_bytes) // max(1, bytes_a_row)))


def weight_bytes(config: Any) -> int:
    """Return about how many bytes a model's text side takes in 16 bits, by its sizes; norms are too small to count."""
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    attention = 2 * config.hidden_size * head_dim * (config.num_attention_heads + kv_heads)
    a_layer = attention + 3 * config.hidden_size * config.intermediate_size
    tables = 1 if getattr(config, "tie_word_embeddings", True) else 2
    return int(2 * (config.num_hidden_layers * a_layer + tables * config.vocab_size * config.hidden_size))
