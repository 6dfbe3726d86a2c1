"""Tiny random models of the supported families, created in the tests: real classes, random weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

VOCAB = 1024


def tiny_gemma(dtype: torch.dtype = torch.float32, window: int = 8, vocab: int = VOCAB) -> Any:
    """Return a Gemma 3 with three sliding layers and a full one; prompts exceed its window of 8 tokens at once."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=window,
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        max_position_embeddings=4096,
        initializer_range=0.2,  # large, so that logits differ clearly and greedy tokens do not depend on rounding
    )
    return _settled(Gemma3ForCausalLM(config), dtype)


def tiny_llama(dtype: torch.dtype = torch.float32, heads: int = 3, head_dim: int = 32) -> Any:
    """Return a Llama in which all query heads share one key and value head."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=4096,
        initializer_range=0.2,
    )
    return _settled(LlamaForCausalLM(config), dtype)


def tiny_tokenizer(folder: Path) -> Any:
    """Return a fast byte-level tokenizer with some words, line ends and a special token; its ids fit VOCAB."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["ĊĊ", ".ĊĊ", "Ġa", "ing", "Ġx", "ĠĊ", "Ċ-", "Ã©x"]
    vocab = {token: number for number, token in enumerate(["<s>", "</s>", "<turn>", *letters, *words])}
    parts = {"ĊĊ": "Ċ Ċ", ".ĊĊ": ". ĊĊ", "Ġa": "Ġ a", "Ġx": "Ġ x", "ĠĊ": "Ġ Ċ", "Ċ-": "Ċ -"}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(pair.split()) for pair in parts.values()]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    marks = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<turn>"]}
    PreTrainedTokenizerFast(tokenizer_object=made, **marks).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def save_adapter(model: Any, folder: Path, **settings: Any) -> Any:
    """Apply an adapter with random matrices to a model, save it as peft does, and return peft's model with it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft uses a deprecated name from transformers
        made = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"]} | settings))
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        made.save_pretrained(folder)
    return made.eval()


def _settled(model: Any, dtype: torch.dtype) -> Any:
    """Give the norms weights other than their initial ones, which would hide a forgotten norm."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=0.0 if "Gemma" in type(model).__name__ else 1.0, std=0.2)
    return model.to(dtype).eval()


def tiny_multimodal() -> Any:
    """Return a multimodal Gemma 3 with the tiny text model; image tokens are outside its vocabulary."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = tiny_gemma().config.to_dict()
    config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    return Gemma3ForConditionalGeneration(config)


def shape_4b(**more: Any) -> Any:
    """Return the configuration of Gemma 3 4B's text part, for tests that need its shapes and no numbers."""
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        vocab_size=262_208,
        hidden_size=2560,
        intermediate_size=10_240,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=1024,
        layer_types=["full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(34)],
        **more,
    )
