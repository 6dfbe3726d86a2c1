"""Makes Gemma 3 models with random weights in several sizes, for measurements of speed and memory.

python benchmarks/shapes.py 4b FOLDER      # writes one in bfloat16, with the demo model's tokenizer
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

# hidden, inner, layers, heads, key-value heads, head size, vocabulary
SHAPES = {
    "tiny": (32, 64, 2, 2, 1, 16, 512),
    "270m": (640, 2048, 18, 4, 1, 256, 262_144),
    "1b": (1152, 6912, 26, 4, 1, 256, 262_144),
    "4b": (2560, 10_240, 34, 8, 4, 256, 262_208),
}


def make(shape: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a random Gemma 3 of this shape."""
    hidden, inner, layers, heads, kv_heads, head_dim, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        sliding_window=min(512, head_dim * 2),
        layer_types=[
            "sliding_attention" if (layer + 1) % min(6, layers) else "full_attention" for layer in range(layers)
        ],
        max_position_embeddings=8192,
        initializer_range=0.05,
    )
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Gemma3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def write(shape: str, folder: Path) -> None:
    """Write such a model to a folder that loads like any other model."""
    from gxr_batch.models.demo import ensure_demo_model

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    make(shape, torch.bfloat16, torch.device("cpu")).save_pretrained(partial)
    for file in ensure_demo_model().iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "chat_template", "generation_config")):
            shutil.copy(file, partial)
    partial.rename(folder)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
