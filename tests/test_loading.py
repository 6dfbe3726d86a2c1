"""Loading: what cannot be is one message with the next step, and what is loaded is what was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_gemma, tiny_llama

from gxr_batch.errors import GxrError, JobFileError, ModelUnavailable
from gxr_batch.job import ModelSection
from gxr_batch.models.loading import end_ids, identity, load_model, load_tokenizer

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory, gemma_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_gemma().save_pretrained(folder)
    gemma_tokenizer.save_pretrained(folder)
    return folder


def section(path: object, **keys: object) -> ModelSection:
    return ModelSection.model_validate({"path": str(path), **keys})


def test_a_local_folder_loads_in_the_dtype_that_was_asked_for(tiny_dir):
    loaded = load_model(section(tiny_dir, dtype="float32"), load_tokenizer(section(tiny_dir)))
    assert loaded.model.dtype == torch.float32
    assert loaded.device == "cpu"
    assert loaded.quantization is None
    assert 106 in loaded.end_ids
    assert 1 in loaded.end_ids


def test_four_bit_weights_really_are_four_bit_on_the_cpu(tiny_dir):
    from bitsandbytes.nn import Linear4bit

    work = section(tiny_dir, load_in_4bit=True, dtype="bfloat16")
    loaded = load_model(work, load_tokenizer(work))
    layer = loaded.model.model.layers[0].mlp.up_proj
    assert isinstance(layer, Linear4bit)
    assert layer.weight.quant_type == "nf4"
    assert loaded.quantization == "nf4"
    with torch.inference_mode():
        assert loaded.model(torch.tensor([[2, 5, 9]])).logits.isfinite().all()


def test_the_identity_follows_the_weights_and_nothing_else(tiny_dir, tmp_path, gemma_tokenizer):
    first = identity(section(tiny_dir))
    assert identity(section(tiny_dir)) == first
    tiny_llama().save_pretrained(tmp_path)
    assert identity(section(tmp_path)).weights_sha256 != first.weights_sha256


def test_float16_is_refused_for_gemma_before_loading(tiny_dir):
    with pytest.raises(JobFileError, match="float16"):
        load_model(section(tiny_dir, dtype="float16"), load_tokenizer(section(tiny_dir)))


@pytest.mark.parametrize("path", ["./no/such/folder", "/no/such/folder"])
def test_a_folder_that_is_not_there_is_named_with_its_absolute_path(path):
    with pytest.raises(GxrError) as caught:
        identity(section(path))
    assert str(Path(path).absolute()) in str(caught.value)


def test_a_hub_model_without_network_is_one_message(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ModelUnavailable) as caught:
        identity(section("nobody/nothing-of-this-name"))
    assert caught.value.next_step
    assert caught.value.__cause__ is None


def test_torn_weights_are_one_message(tiny_dir, tmp_path):
    for path in tiny_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelUnavailable, match="cannot be loaded"):
        load_model(section(tmp_path), load_tokenizer(section(tmp_path)))


def test_a_context_longer_than_the_models_is_refused(tiny_dir):
    with pytest.raises(JobFileError, match="at most 4096 tokens"):
        load_tokenizer(section(tiny_dir, max_seq_length=8192))


def test_end_ids_are_gathered_from_wherever_a_model_names_them(gemma_tokenizer):
    model = tiny_gemma()
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    assert end_ids(model, gemma_tokenizer) == (1, 106)
