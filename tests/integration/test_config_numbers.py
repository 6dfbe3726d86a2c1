"""Numbers of a model's config.json that no model can have are refused by name, before anything computes with them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from running import Workplace
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gxr_batch.errors import ModelUnavailable
from gxr_batch.job.schema import ModelSection
from gxr_batch.models.config_numbers import odd_number
from gxr_batch.models.load_weights import load_config

GEMMA = {
    "model_type": "gemma3_text",
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 8,
    "layer_types": [*["sliding_attention"] * 3, "full_attention"],
    "max_position_embeddings": 4096,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 4096,
}
HUGE = 10**30


def folder(parent: Path, values: dict[str, Any]) -> Path:
    (parent / "model").mkdir()
    (parent / "model" / "config.json").write_text(json.dumps(values))
    return parent / "model"


def refusal(parent: Path, values: dict[str, Any]) -> ModelUnavailable:
    with pytest.raises(ModelUnavailable) as caught:
        load_config(ModelSection(path=str(folder(parent, values))))
    return caught.value


@pytest.mark.parametrize("value", [-5, -1, 2**31, 2**32 - 1, HUGE, 8.0, "8", True, {}, [-1], float("nan"), "x" * 10**6])
def test_a_window_outside_sense_is_refused_by_name(tmp_path, value):
    error = refusal(tmp_path, GEMMA | {"sliding_window": value})
    assert error.where.startswith(f"{tmp_path}/model/config.json: sliding_window = ")
    assert len(error.where) < len(str(tmp_path)) + 100
    assert "a whole number from 0 to 2,147,483,647" in error.next_step


SIZES = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "head_dim"]


@pytest.mark.parametrize("model", [GEMMA, LLAMA], ids=["gemma", "llama"])
@pytest.mark.parametrize("key", [*SIZES, "num_key_value_heads", "max_position_embeddings"])
@pytest.mark.parametrize("value", [0, -1, 2**32 + 32, HUGE, 64.5, "64", False, float("inf")])
def test_a_size_outside_sense_is_refused_by_name(tmp_path, model, key, value):
    began = time.monotonic()
    assert f"config.json: {key} = " in refusal(tmp_path, model | {key: value}).where
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("sliding_window", 0, "sliding_window = 0"),
        ("sliding_window", None, "sliding_window = None"),
        ("layer_types", 5, "layer_types"),
        ("layer_types", [5, 5, 5, 5], "layer_types"),
        ("num_key_value_heads", 3, "num_key_value_heads = 3"),
        ("head_dim", 31, "head_dim = 31"),
        ("rms_norm_eps", -1, "rms_norm_eps = -1"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps = nan"),
        ("query_pre_attn_scalar", -32, "query_pre_attn_scalar = -32"),
        ("query_pre_attn_scalar", 0, "query_pre_attn_scalar = 0"),
        ("final_logit_softcapping", 0, "final_logit_softcapping = 0"),
        ("pad_token_id", 1024, "pad_token_id = 1024"),
        ("eos_token_id", [1, "x"], "eos_token_id = 'x'"),
        ("rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": -1}}, "rope_theta = -1"),
        ("rope_parameters", {"rope_type": "linear", "factor": 0}, "rope_parameters.factor = 0"),
        ("rope_scaling", {"rope_type": "yarn", "factor": {"a": 1}}, "rope_scaling.factor = {'a': 1}"),
        ("rope_scaling", {"a": {"b": {"c": {"d": {}}}}}, "rope_scaling.a.b.c = "),
        ("text_config", {"num_attention_heads": 0}, "num_attention_heads = 0"),
    ],
)
def test_numbers_that_contradict_each_other_or_are_no_numbers_are_refused(tmp_path, key, value, named):
    assert named in refusal(tmp_path, GEMMA | {key: value}).where


@pytest.mark.parametrize("text", ["", "[]", "5", "{" * 10**5, '{"model_type": 5}', "\x00"])
def test_a_file_that_is_no_configuration_is_left_to_the_loader(tmp_path, text):
    folder(tmp_path, {}).joinpath("config.json").write_text(text)
    try:
        load_config(ModelSection(path=str(tmp_path / "model")))
    except ModelUnavailable as error:
        assert "no model can have" not in error.what  # noqa: PT017
    except Exception as error:
        assert not isinstance(error, ArithmeticError | AssertionError)  # noqa: PT017


@pytest.mark.parametrize("verb", ["check", "run"])
def test_the_command_ends_with_one_message(tmp_path, verb):
    model = folder(tmp_path, GEMMA | {"sliding_window": 2**31})
    (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    work = Workplace(tmp_path)
    work.job("[engine]\nkind = 'transformers'\n[model]\npath = './model'\n")
    done = work.gxr(verb, "j.toml", expect=4)
    assert done.stderr.count("Error:") == 1
    assert "Traceback" not in done.stderr
    assert "model/config.json: sliding_window = 2147483648" in done.stderr


def test_no_family_of_the_library_is_refused_with_its_defaults():
    refused = {}
    for name in {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "glm5_next_text"} & {*CONFIG_MAPPING}:
        try:
            config = CONFIG_MAPPING[name]().get_text_config()
        except Exception:  # needs settings, or packages that are not installed
            continue
        if fault := odd_number(config):
            refused[name] = fault
    assert refused == {}
