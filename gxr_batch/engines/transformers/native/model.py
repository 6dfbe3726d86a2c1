"""Hands a Gemma 3 or Llama model of transformers to the C kernels: packs its weights once, keeps its KV cache.

The packed weights replace the model's own, whose memory is given back. Checked against the library's forward in tests.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from gxr_batch.engines.transformers.driver import PREFIX_SLOTS
from gxr_batch.engines.transformers.native.build import NativeUnavailable, load
from gxr_batch.engines.transformers.sampler import Candidates, Seen, top_candidates
from gxr_batch.settings import Sampling

_POINTER = ctypes.c_void_p
_ROWS = 256  # tokens a call; longer prompts go through in pieces, with the same bits
_ROOM = 2048  # candidates a row that the kernel may return before the row is sorted in full
_BLOCK = 512  # tokens that the candidate scan looks at together
_PADDING = 64  # columns that keep the rows of logits out of each other's cache sets
_NOT_FINITE, _TOO_MANY = -1, -2  # as in kernels.c
_FAMILIES = frozenset({"gemma3_text", "gemma3", "llama"})


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("hidden", "heads", "kv_heads", "head_dim", "inner", "layers", "vocab")),
        *((name, ctypes.c_int) for name in ("slots", "capacity", "gelu")),
        *((name, ctypes.c_float) for name in ("eps", "scale", "embed_scale")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("qkv", "out", "gate_up", "down")),
        *((name, _POINTER) for name in ("before_attn", "after_attn", "before_mlp", "after_mlp")),
        *((name, _POINTER) for name in ("query_norm", "key_norm", "rope", "keys", "values")),
        ("window", ctypes.c_int),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        ("shape", _Shape),
        ("layers", ctypes.POINTER(_Layer)),
        *((name, _POINTER) for name in ("head", "embedding", "final_norm")),
        *((name, _POINTER) for name in ("residual", "normed", "qkv", "mixed", "projected", "gate_up", "inner")),
    ]


class NativeModel:
    """A packed model with `slots` rows of `capacity` tokens. Implements `driver.Driver`."""

    name = "native bfloat16 kernels (AMX)"

    def __init__(self, model: Any, *, slots: int, capacity: int) -> None:
        """Pack `model` (bfloat16, on the CPU), which cannot be used itself any more. Raises NativeUnavailable."""
        reason = why_not(model)
        if reason:
            raise NativeUnavailable(reason)
        self._library = _declared(load())
        self._library.gxr_threads(torch.get_num_threads())
        self._kept: list[Any] = []
        self._memory: list[tuple[int, int]] = []
        self.slots, self.capacity, self.device = slots, capacity, torch.device("cpu")
        config = model.config.get_text_config()
        self.vocab = config.vocab_size
        self._hidden = config.hidden_size
        self._kv_bytes = config.num_key_value_heads * capacity * config.head_dim * 2
        self._model = self._assemble(model, config)
        self._stride = -(-self.vocab // _BLOCK) * _BLOCK + _PADDING
        self._logits = torch.empty(0, self._stride, dtype=torch.bfloat16)
        self._gathered = torch.zeros(0, self._hidden, dtype=torch.bfloat16)

    # ------------------------------------------------------------------ Driver

    def prefill(self, rows: Sequence[tuple[int, Sequence[int], int]]) -> torch.Tensor:
        """Run prompts through the model: (slot, ids, first position) each. Returns the last logits [rows, vocab]."""
        logits = self._room_for(len(rows))
        pending: list[tuple[int, int, int]] = []  # id, slot, position
        ends: list[tuple[int, int]] = []  # row, index in pending
        for row, (slot, ids, first) in enumerate(rows):
            for offset, token in enumerate(ids):
                pending.append((token, slot, first + offset))
                if offset + 1 == len(ids):
                    ends.append((row, len(pending) - 1))
                if len(pending) == _ROWS:
                    self._flush(pending, ends, logits)
        if pending:
            self._flush(pending, ends, logits)
        return logits[:, : self.vocab]

    def decode(self, slots: Sequence[int], ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Run one token of each row through the model. Returns the logits [rows, vocab] in the order of `slots`."""
        logits = self._room_for(len(slots))
        pending = list(zip(ids, slots, positions, strict=True))
        for start in range(0, len(pending), _ROWS):
            piece = pending[start : start + _ROWS]
            self._flush(piece, [(start + index, index) for index in range(len(piece))], logits)
        return logits[:, : self.vocab]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot's cache to another slot."""
        for layer in range(self._model.shape.layers):
            entry = self._model.layers[layer]
            size = self._model.shape.head_dim * 2
            for base in (entry.keys, entry.values):
                for head in range(self._model.shape.kv_heads):
                    offset = head * self.capacity * size
                    ctypes.memmove(
                        base + target * self._kv_bytes + offset, base + source * self._kv_bytes + offset, length * size
                    )

    def clear(self, slot: int) -> None:
        """Nothing to do: attention reads no column beyond a row's position."""

    def candidates(self, logits: torch.Tensor, seen: Seen, sampling: Sampling) -> Candidates:
        """Return what top-k leaves of each row; [rows, n]. Rows whose logits are not finite come back as NaN."""
        rows, width = logits.shape[0], self._stride - _PADDING
        k = 1 if sampling.greedy else sampling.top_k
        # The scan needs more blocks than k to leave anything out.
        if k == 0 or k > _ROOM // 2 or k >= width // _BLOCK:
            return top_candidates(logits, seen, sampling)
        seen_ids, lengths = seen.ids.int().contiguous(), seen.counts.int()
        values = torch.empty(rows, _ROOM)
        ids = torch.zeros(rows, _ROOM, dtype=torch.int32)
        counts = torch.empty(rows, dtype=torch.int32)
        self._library.gxr_candidates(
            logits.data_ptr(), logits.stride(0), rows, width, k,
            seen_ids.data_ptr(), lengths.data_ptr(), seen_ids.shape[1], sampling.repetition_penalty,
            _ROOM, values.data_ptr(), ids.data_ptr(), counts.data_ptr(),
        )  # fmt: skip
        return _finish(values, ids, counts, k)

    def close(self) -> None:
        """Give the packed weights and the cache back to the system."""
        for pointer, size in self._memory:
            self._library.gxr_free(pointer, size)
        self._memory = []

    # ------------------------------------------------------------------ packing

    def _assemble(self, model: Any, config: Any) -> _Model:
        decoder = _decoder(model)
        head = model.lm_head.weight
        tied = head.data_ptr() == decoder.embed_tokens.weight.data_ptr()
        made = _Model()
        made.shape = _shape(config, self.slots, self.capacity, decoder.embed_tokens)
        layers = (_Layer * len(decoder.layers))()
        ropes = {kind: self._rope(decoder, config, kind) for kind in set(_kinds(config))}
        for entry, layer, kind in zip(layers, decoder.layers, _kinds(config), strict=True):
            self._fill(entry, layer, config)
            entry.rope = ropes[kind]
            entry.window = config.sliding_window if kind == "sliding_attention" else 0
        self._kept.append(layers)
        made.layers = layers
        made.embedding = None if tied else self._keep(decoder.embed_tokens.weight.detach())
        made.head = self._pack([head])
        made.final_norm = self._norm(decoder.norm)
        queries = config.num_attention_heads * config.head_dim
        width = queries + 2 * config.num_key_value_heads * config.head_dim
        for name, columns in {
            "residual": config.hidden_size,
            "normed": config.hidden_size,
            "qkv": width,
            "mixed": queries,
            "projected": config.hidden_size,
            "gate_up": 2 * config.intermediate_size,
            "inner": config.intermediate_size,
        }.items():
            setattr(made, name, self._allocate(_ROWS * columns * 2))
        return made

    def _fill(self, entry: _Layer, layer: Any, config: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        entry.qkv = self._pack([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        entry.out = self._pack([attention.o_proj.weight])
        entry.gate_up = self._pack([mlp.gate_proj.weight, mlp.up_proj.weight])
        entry.down = self._pack([mlp.down_proj.weight])
        entry.before_attn = self._norm(layer.input_layernorm)
        if hasattr(layer, "pre_feedforward_layernorm"):  # Gemma 3: a norm on each side of both halves
            entry.after_attn = self._norm(layer.post_attention_layernorm)
            entry.before_mlp = self._norm(layer.pre_feedforward_layernorm)
            entry.after_mlp = self._norm(layer.post_feedforward_layernorm)
            entry.query_norm, entry.key_norm = self._norm(attention.q_norm), self._norm(attention.k_norm)
        else:
            entry.before_mlp = self._norm(layer.post_attention_layernorm)
        entry.keys = self._allocate((self.slots + PREFIX_SLOTS) * self._kv_bytes)
        entry.values = self._allocate((self.slots + PREFIX_SLOTS) * self._kv_bytes)

    def _pack(self, weights: Sequence[torch.Tensor]) -> int:
        """Pack weights, one below the other, and give their own memory back."""
        stacked = torch.cat([weight.detach() for weight in weights]).contiguous()
        outputs, inputs = stacked.shape
        target = self._allocate(outputs * inputs * 2)
        self._library.gxr_pack(stacked.data_ptr(), target, outputs, inputs)
        for weight in weights:
            weight.data = torch.empty(0, dtype=weight.dtype)
        return target

    def _norm(self, module: Any) -> int:
        weight = module.weight.detach().float()
        return self._keep(weight + 1 if "Gemma" in type(module).__name__ else weight)

    def _rope(self, decoder: Any, config: Any, kind: str) -> int:
        """Return the cosines and sines of every position, [capacity][head_dim], from the library's own module."""
        example, positions = torch.zeros(1, 1), torch.arange(self.capacity)[None]
        arguments = (kind,) if config.model_type.startswith("gemma3") else ()
        cosines, sines = decoder.rotary_emb(example, positions, *arguments)
        half = config.head_dim // 2
        return self._keep(torch.cat([cosines[0, :, :half], sines[0, :, :half]], dim=-1))

    def _keep(self, tensor: torch.Tensor) -> int:
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _allocate(self, size: int) -> int:
        pointer: int | None = self._library.gxr_allocate(size)
        if not pointer:
            raise MemoryError(f"{size / 2**20:,.0f} MiB could not be reserved")
        self._memory.append((pointer, size))
        return pointer

    # ------------------------------------------------------------------ calls

    def _room_for(self, rows: int) -> torch.Tensor:
        padded = -(-rows // 32) * 32
        if len(self._logits) < padded:
            # The columns behind the vocabulary stay -inf for the scan, which goes by whole blocks.
            self._logits = torch.full((padded, self._stride), -torch.inf, dtype=torch.bfloat16)
            self._gathered = torch.zeros(padded, self._hidden, dtype=torch.bfloat16)
        return self._logits[:rows]

    def _flush(self, pending: list[tuple[int, int, int]], ends: list[tuple[int, int]], logits: torch.Tensor) -> None:
        """Run the pending tokens through all layers, and the head for those that end a row."""
        ids, slots, positions = (torch.tensor(column, dtype=torch.int32) for column in zip(*pending, strict=True))
        call = ctypes.byref(self._model)
        self._library.gxr_forward(call, len(pending), ids.data_ptr(), slots.data_ptr(), positions.data_ptr())
        if ends:
            which = torch.tensor([index for _, index in ends], dtype=torch.int32)
            self._library.gxr_logits(
                call,
                len(ends),
                which.data_ptr(),
                self._gathered.data_ptr(),
                logits[ends[0][0] :].data_ptr(),
                self._stride,
            )
        pending.clear()
        ends.clear()


def why_not(model: Any) -> str:
    """Return why the kernels cannot drive this model, empty where they can."""
    config = model.config.get_text_config()
    weight = model.lm_head.weight
    dims = (config.hidden_size, config.intermediate_size, getattr(config, "head_dim", 0) or 0, config.vocab_size)
    reasons = {
        "it is not a Gemma 3 or Llama model": config.model_type not in _FAMILIES,
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
    layers = _decoder(model).layers
    return all(type(module) is torch.nn.Linear for name, module in layers.named_modules() if name.endswith("_proj"))


def _decoder(model: Any) -> Any:
    """Return the module with embed_tokens, layers, norm and rotary_emb, also inside a multimodal model."""
    inner = model.model
    return getattr(inner, "language_model", inner)


def _activation(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", ""))


def _kinds(config: Any) -> list[str]:
    return list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)


def _shape(config: Any, slots: int, capacity: int, embedding: Any) -> _Shape:
    scale = getattr(config, "query_pre_attn_scalar", None) or config.head_dim
    return _Shape(
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


def _finish(values: torch.Tensor, ids: torch.Tensor, counts: torch.Tensor, k: int) -> Candidates:
    """Sort what the kernel found as `top_candidates` does: falling values, equal ones by id, below the k-th -inf."""
    width = max(int(counts.max()), k)
    values, ids = values[:, :width], ids[:, :width].long()
    values = values.masked_fill(torch.arange(width) >= counts[:, None], -torch.inf)
    order = ids.sort(dim=-1, stable=True).indices
    values, ids = values.gather(1, order), ids.gather(1, order)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    values = values.masked_fill(values < values[:, k - 1 : k], -torch.inf)
    values = values.masked_fill((counts == _NOT_FINITE)[:, None], torch.nan)
    return Candidates(values, ids.gather(1, order), counts != _TOO_MANY)


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the functions of kernels.c."""
    integer, size = ctypes.c_int, ctypes.c_size_t
    library.gxr_allocate.restype, library.gxr_allocate.argtypes = _POINTER, [size]
    library.gxr_free.argtypes = [_POINTER, size]
    library.gxr_pack.argtypes = [_POINTER, _POINTER, integer, integer]
    library.gxr_forward.argtypes = [_POINTER, integer, _POINTER, _POINTER, _POINTER]
    library.gxr_logits.argtypes = [_POINTER, integer, _POINTER, _POINTER, _POINTER, size]
    library.gxr_candidates.argtypes = [
        *(_POINTER, size, integer, integer, integer, _POINTER, _POINTER, integer),
        *(ctypes.c_float, integer, _POINTER, _POINTER, _POINTER),
    ]
    return library
