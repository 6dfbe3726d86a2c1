"""Checks which models the kernels can run, and packs their weights into the kernels' layout, with their memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from gxr_batch.engines.slots.backend import PREFIX_SLOTS
from gxr_batch.engines.slots.native.c_binding import Layer, Model, Shape
from gxr_batch.models.config_numbers import odd_number

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
        ropes = {kind: self._rope(decoder, config, kind) for kind in set(layer_kinds(config))}
        for entry, layer, kind in zip(layers, decoder.layers, layer_kinds(config), strict=True):
            self._fill(entry, layer, config)
            entry.rope = ropes[kind]
            entry.window = config.sliding_window if kind == "sliding_attention" else 0
        self._kept.append(layers)
        made.layers = layers
        embedding = decoder.embed_tokens.weight.detach()
        made.embedding = None if tied else self._keep(embedding, vocab, hidden)
        made.head = self._pack([head], vocab, hidden)
        made.final_norm = self._norm(decoder.norm, hidden)
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
        entry.before_attn = self._norm(layer.input_layernorm, hidden)
        if hasattr(layer, "pre_feedforward_layernorm"):  # Gemma 3: a norm on each side of attention and feed-forward
            entry.after_attn = self._norm(layer.post_attention_layernorm, hidden)
            entry.before_mlp = self._norm(layer.pre_feedforward_layernorm, hidden)
            entry.after_mlp = self._norm(layer.post_feedforward_layernorm, hidden)
            entry.query_norm, entry.key_norm = self._norm(attention.q_norm, dim), self._norm(attention.k_norm, dim)
        else:
            entry.before_mlp = self._norm(layer.post_attention_layernorm, hidden)
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

    def _norm(self, module: Any, size: int) -> int:
        weight = module.weight.detach().float()
        return self._keep(weight + 1 if "Gemma" in type(module).__name__ else weight, size)

    def _rope(self, decoder: Any, config: Any, kind: str) -> int:
        """Return the cosines and sines of every position, [capacity][head_dim], from the library's module."""
        example, positions = torch.zeros(1, 1), torch.arange(self._capacity)[None]
        arguments = (kind,) if config.model_type.startswith("gemma3") else ()
        cosines, sines = decoder.rotary_emb(example, positions, *arguments)
        half = config.head_dim // 2
        both = torch.cat([cosines[0, :, :half], sines[0, :, :half]], dim=-1)
        return self._keep(both, self._capacity, config.head_dim)

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


FAMILIES = frozenset({"gemma3_text", "gemma3", "llama"})


def why_not(model: Any) -> str:
    """Return why the kernels cannot run this model, empty if they can."""
    config = model.config.get_text_config()
    weight = model.lm_head.weight
    if odd := odd_number(config):
        return f"its {odd[0]} must be {odd[2]}"
    dims = (config.hidden_size, config.intermediate_size, getattr(config, "head_dim", 0) or 0, config.vocab_size)
    counts = (*dims, config.num_attention_heads, config.num_key_value_heads)
    if not all(isinstance(count, int) for count in counts):
        return "its layers have different sizes"
    reasons = {
        "it is not a Gemma 3 or Llama model": config.model_type not in FAMILIES,
        "it is not in bfloat16": weight.dtype != torch.bfloat16,
        "it is not on the CPU": weight.device.type != "cpu",
        "its sizes are not multiples of 32": any(size == 0 or size % 32 for size in dims),
        "it has biases": bool(getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)),
        "it caps its logits": any(getattr(config, f"{where}_logit_softcapping", None) for where in ("final", "attn")),
        "only a part of each head is rotated": _rotated_in_part(config),
        "its layers are not plain linear layers": not _plain(model),
        "its activation is not supported": _activation(config) not in {"gelu_pytorch_tanh", "silu"},
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


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
        slots=slots + PREFIX_SLOTS,
        capacity=capacity,
        most_tokens=ROWS,
        gelu=int(_activation(config) == "gelu_pytorch_tanh"),
        eps=config.rms_norm_eps,
        scale=scale**-0.5,
        embed_scale=float(torch.tensor(getattr(embedding, "scalar_embed_scale", 1.0)).bfloat16()),
    )
