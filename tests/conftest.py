"""What several test files share: the demo model, prepared once, and its tokenizer, loaded once."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("engine_contract")


@pytest.fixture(scope="session")
def demo_model_dir():
    """The folder of the converted demo model, in the user's own cache, so that it is converted once a machine."""
    from gxr_batch.models.demo import ensure_demo_model

    return ensure_demo_model(progress=False)


@pytest.fixture(scope="session")
def gemma_tokenizer(demo_model_dir):
    """The real Gemma 3 tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model_dir)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, gemma_tokenizer):
    """A Gemma 3 of two tiny layers with random weights and a window of 8 tokens, with the real tokenizer."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(gemma_tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=4096,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("tiny") / "tiny-gemma"
    Gemma3ForCausalLM(config).save_pretrained(folder)
    gemma_tokenizer.save_pretrained(folder)
    return folder
