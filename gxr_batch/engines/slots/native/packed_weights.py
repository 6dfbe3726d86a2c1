"""Checks which models the kernels can run, and packs their weights into the kernels' layout, with their memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from gxr_batch.engines.slots import decoder_layout
from gxr_batch.engines.slots.backend import PREFIX_SLOTS
from gxr_batch.engines.slots.decoder_layout import (
    activation,
    angles,
    decoder_of,
    layer_kinds,
    norm_weight,
    query_scale,
    sizes,
)
from gxr_batch.engines.slots.native.c_binding import Layer, Model, Shape

ROWS = 256  # tokens per call; longer prompts are processed in pieces, with the same bits
_ADDRESSES = 2**46  # bytes; a size in C would lose the digits of a number that is much larger


class Packed:
    """The packed model. Its original weights are freed layer by layer, so the two are never both complete in memory."""

    def __init__(self, library: ctypes.CDLL, model: Any, *, slots: int, capacity: int) -> None:
        """Pack `model`, which is unusable afterwards. Raises MemoryError.

        Everything that the kernels read has the size that the configuration says, or this raises ValueError.
        """
        self.library = library
        self._slots, self._capacity = slots, capacity
        self._kept: list[Any] = []
        self.memory: list[tuple[int, int]] = []
        config = model.config.get_text_config()
        # One slot of one layer, keys or values.
        self.kv_bytes = config.num_key_value_heads * capacity * config.head_dim * 2
        self.model = self._assemble(model, config)

    def close(self) -> None:
        """Free all memory."""
        for pointer, size in self.memory:
            self.library.gxr_free(pointer, size)
        self.memory = []

    def _assemble(self, model: Any, config: Any) -> Model:
        decoder = decoder_of(model)
        head = model.lm_head.weight
        tied = head.data_ptr() == decoder.embed_tokens.weight.data_ptr()
        made = Model()
        made.shape = shape_of(config, self._slots, self._capacity, decoder.embed_tokens)
        if not self.library.gxr_sound(made.shape):
            raise ValueError("the kernels cannot compute with these sizes")
        hidden, vocab = config.hidden_size, config.vocab_size
        layers = (Layer * len(decoder.layers))()
        ropes = {
            kind: self._keep(angles(decoder, config, kind, self._capacity), self._capacity, config.head_dim)
            for kind in set(layer_kinds(config))
        }
        for entry, layer, kind in zip(layers, decoder.layers, layer_kinds(config), strict=True):
            self._fill(entry, layer, config)
            entry.rope = ropes[kind]
            entry.window = config.sliding_window if kind == "sliding_attention" else 0
        self._kept.append(layers)
        made.layers = layers
        embedding = decoder.embed_tokens.weight.detach()
        made.embedding = None if tied else self._keep(embedding, vocab, hidden)
        made.head = self._pack([head], vocab, hidden)
        made.final_norm = self._keep(norm_weight(decoder.norm), hidden)
        queries = config.num_attention_heads * config.head_dim
        width = queries + 2 * config.num_key_value_heads * config.head_dim
        for name, columns in {
            "residual": hidden,
            "normed": hidden,
            "qkv": width,
            "mixed": queries,
            "projected": hidden,
            "gate_up": 2 * config.intermediate_size,
            "inner": config.intermediate_size,
        }.items():
            setattr(made, name, self._allocate(ROWS * columns * 2))
        return made

    def _fill(self, entry: Layer, layer: Any, config: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
        queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
        projections = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        entry.qkv = self._pack(projections, queries + 2 * keys, hidden)
        entry.out = self._pack([attention.o_proj.weight], hidden, queries)
        entry.gate_up = self._pack([mlp.gate_proj.weight, mlp.up_proj.weight], 2 * inner, hidden)
        entry.down = self._pack([mlp.down_proj.weight], hidden, inner)
        entry.before_attn = self._keep(norm_weight(layer.input_layernorm), hidden)
        if hasattr(layer, "pre_feedforward_layernorm"):  # Gemma 3: a norm on each side of attention and feed-forward
            entry.after_attn = self._keep(norm_weight(layer.post_attention_layernorm), hidden)
            entry.before_mlp = self._keep(norm_weight(layer.pre_feedforward_layernorm), hidden)
            entry.after_mlp = self._keep(norm_weight(layer.post_feedforward_layernorm), hidden)
            entry.query_norm, entry.key_norm = (
                self._keep(norm_weight(attention.q_norm), dim),
                self._keep(norm_weight(attention.k_norm), dim),
            )
        else:
            entry.before_mlp = self._keep(norm_weight(layer.post_attention_layernorm), hidden)
        entry.keys = self._allocate((self._slots + PREFIX_SLOTS) * self.kv_bytes, streamed=False)
        entry.values = self._allocate((self._slots + PREFIX_SLOTS) * self.kv_bytes, streamed=False)

    def _pack(self, weights: Sequence[torch.Tensor], outputs: int, inputs: int) -> int:
        """Pack weights, one below the other, and free the originals."""
        stacked = _of_shape(torch.cat([weight.detach() for weight in weights]), outputs, inputs).contiguous()
        target = self._allocate(outputs * inputs * 2)
        self.library.gxr_pack(stacked.data_ptr(), target, outputs, inputs)
        for weight in weights:
            weight.data = torch.empty(0, dtype=weight.dtype)
        return target

    def _keep(self, tensor: torch.Tensor, *sizes: int) -> int:
        tensor = _of_shape(tensor, *sizes).contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _allocate(self, size: int, *, streamed: bool = True) -> int:
        pointer: int | None = self.library.gxr_allocate(size, streamed) if size < _ADDRESSES else None
        if not pointer:
            raise MemoryError(f"{size / 2**20:,.0f} MiB could not be reserved")
        self.memory.append((pointer, size))
        return pointer


def _of_shape(tensor: torch.Tensor, *sizes: int) -> torch.Tensor:
    """Return the tensor if it has these sizes, by which the kernels compute addresses."""
    if tuple(tensor.shape) != sizes:
        raise ValueError(f"a tensor has the sizes {tuple(tensor.shape)} instead of {sizes}")
    return tensor


def why_not(model: Any) -> str:
    """Return why the kernels cannot run this model, empty if they can."""
    weight = model.lm_head.weight
    reasons = {
        "it is not in bfloat16": weight.dtype != torch.bfloat16,
        "it is not on the CPU": weight.device.type != "cpu",
    }
    if reason := decoder_layout.why_not(model) or next((why for why, holds in reasons.items() if holds), ""):
        return reason
    odd = any(size == 0 or size % 32 for size in sizes(model.config.get_text_config()))
    return "its sizes are not multiples of 32" if odd else ""


def shape_of(config: Any, slots: int, capacity: int, embedding: Any) -> Shape:
    """Return the sizes that the kernels need."""
    return Shape(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        inner=config.intermediate_size,
        layers=config.num_hidden_layers,
        vocab=config.vocab_size,
        slots=slots + PREFIX_SLOTS,
        capacity=capacity,
        most_tokens=ROWS,
        gelu=int(activation(config) == "gelu_pytorch_tanh"),
        eps=config.rms_norm_eps,
        scale=query_scale(config),
        embed_scale=float(torch.tensor(getattr(embedding, "scalar_embed_scale", 1.0)).bfloat16()),
    )
