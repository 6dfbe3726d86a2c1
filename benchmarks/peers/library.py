"""The transformers model of four peers: bfloat16, no end ids, the sampling of the task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import REPETITION_PENALTY, TEMPERATURE, TOP_K, TOP_P
from transformers import AutoModelForCausalLM, GenerationConfig

PAD = 0


def load(folder: Path) -> Any:
    """Load the model and remove everything that would end an answer early."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model.config.eos_token_id = None
    model.generation_config = GenerationConfig(**sampling())
    torch.manual_seed(0)
    return model


def sampling() -> dict[str, Any]:
    """Return the task's sampling as arguments of generate()."""
    return {
        "do_sample": True,
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "top_k": TOP_K,
        "repetition_penalty": REPETITION_PENALTY,
        "pad_token_id": PAD,
    }


def generate(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> int:
    """Generate for left-padded prompts; return the number of new tokens per row."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        return int(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens).shape[1]) - width
