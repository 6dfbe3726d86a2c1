"""LoRA adapters: on every class of Gemma 3 they give the logits of peft's own model, or are refused by name."""

from __future__ import annotations

import copy
import errno
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from running import Workplace
from safetensors.torch import load_file, save_file
from tiny import tiny_gemma
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Gemma3Config, Gemma3ForConditionalGeneration

from gxr_batch.engines.base import EngineInfo
from gxr_batch.engines.slots.library_backend import LibraryModel
from gxr_batch.engines.slots.native.packed_weights import why_not
from gxr_batch.errors import GxrError, JobFileError, ModelUnavailable
from gxr_batch.job import EngineSection, Job, ModelSection
from gxr_batch.ledger import Manifest
from gxr_batch.models import hub, load_weights, read_weights, source
from gxr_batch.models.check_adapter import check_weights
from gxr_batch.models.device_memory import MemoryBudget
from gxr_batch.models.load_weights import LoadedModel, identity, load_config, load_model, load_tokenizer
from gxr_batch.models.lora import read_adapter
from gxr_batch.models.lora_config import AdapterConfig
from gxr_batch.models.placement import SPREAD, Placement
from gxr_batch.records import DISCLAIMER, Identity
from gxr_batch.run.fingerprint import follow, resolved, settle

pytestmark = pytest.mark.usefixtures("one_thread")

pytestmark = pytest.mark.model

HERE = MemoryBudget(EngineSection())
IDS = torch.tensor([[2, 5, 9, 700, 44, 31, 8, 902, 17, 3, 60, 71]])
TARGETS = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def section(path: object, **keys: object) -> ModelSection:
    return ModelSection.model_validate({"path": str(path), "dtype": "float32", **keys})


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tiny_model_dir) -> dict[str, Path]:
    """The same text weights as a text-only checkpoint and inside a multimodal one."""
    text = tiny_gemma()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = Gemma3Config(
        text_config=text.config.to_dict(), vision_config=vision | {"image_size": 28, "patch_size": 14}
    )
    torch.manual_seed(3)
    both = Gemma3ForConditionalGeneration(config).eval()
    both.model.language_model.load_state_dict(text.model.state_dict())
    folder = tmp_path_factory.mktemp("bases") / "tiny-multimodal"
    both.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_dir / name, folder)
    return {"text": tiny_model_dir, "multimodal": folder}


def train(
    base: Path, folder: Path, *, untrained: bool = False, size: float = 0.1, vocabulary: int = 0, **settings: Any
) -> torch.Tensor:
    """Write an adapter with random matrices for a base, as peft saves one; return peft's own logits, unmerged.

    The base is resized to `vocabulary` tokens first, if that is given.
    """
    settings = {"r": 4, "lora_alpha": 12, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM"} | settings
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    torch.manual_seed(11)
    if vocabulary:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's advice on tied embeddings
        made = get_peft_model(model, LoraConfig(**settings)).eval()
        for name, parameter in made.named_parameters():
            if parameter.requires_grad and not untrained:
                if "magnitude" in name:
                    parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
                else:
                    parameter.data += size * torch.randn_like(parameter)
        made.save_pretrained(folder)
    with torch.no_grad():
        return made(input_ids=IDS).logits


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, bases) -> Path:
    """A plain adapter for the text-only base, for tests that copy and change it."""
    folder = tmp_path_factory.mktemp("adapters") / "plain"
    train(bases["text"], folder)
    return folder


@pytest.fixture
def changed(tmp_path, adapter) -> Callable[..., Path]:
    """Return a copy of the adapter with other settings, or with its tensors changed by a function."""

    def change(tensors: Callable[[dict], dict] | None = None, **settings: Any) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(adapter, folder)
        config = folder / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | settings))
        if tensors is not None:
            file = folder / "adapter_model.safetensors"
            save_file(tensors(load_file(file)), file)
        return folder

    return change


# ---------------------------------------------------------------------- every class


def legacy(folder: Path) -> None:
    """Spell the modules of a multimodal adapter as libraries before transformers 4.52 did."""
    file = folder / "adapter_model.safetensors"
    tensors = {
        name.replace("model.model.language_model.", "model.language_model.model."): tensor
        for name, tensor in load_file(file).items()
    }
    assert all("language_model.model." in name for name in tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("spelling", ["text", "multimodal", "legacy"])
@pytest.mark.parametrize("base", ["text", "multimodal"])
def test_an_adapter_of_either_class_gives_pefts_logits_on_either_class(
    bases, tmp_path, gemma_tokenizer, base, spelling
):
    language = r".*language_model.*\.(q_proj|v_proj|o_proj|up_proj|down_proj)"
    targets = list(TARGETS) if spelling == "text" else language
    trained_on = bases["text" if spelling == "text" else "multimodal"]
    wanted = train(trained_on, tmp_path / "lora", target_modules=targets)
    if spelling == "legacy":
        legacy(tmp_path / "lora")
    loaded = load_model(section(bases[base], adapter=str(tmp_path / "lora")), gemma_tokenizer, HERE)
    torch.testing.assert_close(logits(loaded), wanted, atol=2e-4, rtol=1e-4)
    assert loaded.adapter == "merged in float32, rounded once to float32: 20 LoRA modules"
    assert why_not(loaded.model) == "it is not in bfloat16", (
        "nothing else prevents our kernels from running a merged model"
    )


def test_modules_for_images_are_ignored_with_a_notice(bases, tmp_path, gemma_tokenizer):
    wanted = train(bases["multimodal"], tmp_path / "lora", target_modules=["q_proj", "v_proj"])
    for base in bases.values():
        loaded = load_model(section(base, adapter=str(tmp_path / "lora")), gemma_tokenizer, HERE)
        torch.testing.assert_close(logits(loaded), wanted, atol=2e-4, rtol=1e-4)
        assert any("2 modules of the adapter are for images" in notice for notice in loaded.placement.notices)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, "alpha_pattern": {"down_proj": 3}},
        {"layers_to_transform": [1, 3]},
        {"target_modules": "all-linear"},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "norm"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
        {"trainable_token_indices": [9, 700]},
        {"trainable_token_indices": {"embed_tokens": [9, 700], "lm_head": [9, 700]}},
        {"trainable_token_indices": {"embed_tokens": [9, 700], "lm_head": [5, 700]}},
        {"trainable_token_indices": {"lm_head": [9, 700]}},
        {"trainable_token_indices": [9, 700], "ensure_weight_tying": True},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True},
        {"target_modules": ["lm_head", "embed_tokens", "q_proj"]},
        {"vocabulary": 1027},
        {"vocabulary": 1027, "trainable_token_indices": [9, 1024, 1025, 1026]},
        {"vocabulary": 1027, "modules_to_save": ["embed_tokens"]},
        {"vocabulary": 1027, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"vocabulary": 1027, "modules_to_save": ["embed_tokens", "lm_head"]},
        {"vocabulary": 1027, "target_modules": ["embed_tokens", "q_proj"]},
        {"vocabulary": 1027, "target_modules": ["lm_head", "q_proj"]},
        {"vocabulary": 1000},
    ],
    ids=str,
)
def test_what_peft_can_train_gives_pefts_logits(bases, tmp_path, gemma_tokenizer, settings):
    wanted = train(bases["text"], tmp_path / "lora", **settings)
    loaded = load_model(section(bases["text"], adapter=str(tmp_path / "lora")), gemma_tokenizer, HERE)
    torch.testing.assert_close(logits(loaded), wanted, atol=2e-4, rtol=1e-4)
    assert loaded.config.vocab_size == wanted.shape[-1]


LANGUAGE = r".*language_model.*\.(q_proj|down_proj)"


@pytest.mark.parametrize(
    ("settings", "aside"),
    [
        ({"vocabulary": 1027, "trainable_token_indices": [9, 1024, 1025, 1026]}, 0),
        ({"vocabulary": 1027, "modules_to_save": ["embed_tokens", "lm_head"]}, 0),
        ({"vocabulary": 1027, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, 0),
        ({"trainable_token_indices": [9, 700]}, 0),
        ({"modules_to_save": ["multi_modal_projector"]}, 2),
        ({"modules_to_save": ["vision_tower", "lm_head"]}, 17),
    ],
    ids=str,
)
def test_what_peft_can_train_on_the_multimodal_class_gives_pefts_logits(
    bases, tmp_path, gemma_tokenizer, settings, aside
):
    wanted = train(bases["multimodal"], tmp_path / "lora", target_modules=LANGUAGE, **settings)
    for base in bases.values():
        loaded = load_model(section(base, adapter=str(tmp_path / "lora")), gemma_tokenizer, HERE)
        torch.testing.assert_close(logits(loaded), wanted, atol=2e-4, rtol=1e-4)
        said = " ".join(loaded.placement.notices)
        assert ("vocabulary from 1024 to 1027 tokens" in said) == ("vocabulary" in settings)
        assert (f"{aside} modules of the adapter are for images" in said) == bool(aside)


def spelled_otherwise(name: str) -> Callable[[dict], dict]:
    return lambda tensors: tensors | {name: torch.ones(4, 4)}


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.multi_modal_projector.mm_input_projection_weight",
        "base_model.model.multi_modal_projector.mm_soft_emb_norm.weight",
        "base_model.model.multi_modal_projector.modules_to_save.default.mm_input_projection_weight",
        "base_model.model.model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.bias",
        "base_model.model.vision_tower.vision_model.embeddings.patch_embedding.weight",
        "base_model.model.vision_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "base_model.model.model.mm_projector.0.weight",
        "base_model.model.visual.blocks.0.attn.qkv.lora_B.default.weight",
        "vision_tower.encoder.layers.0.layer_norm1.weight",
    ],
)
def test_parts_for_images_are_set_aside_in_every_spelling(bases, changed, gemma_tokenizer, name):
    lora = changed(spelled_otherwise(name))
    loaded = load_model(section(bases["text"], adapter=str(lora)), gemma_tokenizer, HERE)
    assert "1 module of the adapter is for images" in " ".join(loaded.placement.notices)


def wrapped(tensors: dict) -> dict:
    return {name.replace(".layers.", ".layers._fsdp_wrapped_module."): each for name, each in tensors.items()}


def test_wrappers_of_training_libraries_in_names_are_ignored(bases, adapter, changed, gemma_tokenizer):
    found = [
        logits(load_model(section(bases["text"], adapter=str(each)), gemma_tokenizer, HERE))
        for each in (adapter, changed(wrapped))
    ]
    assert torch.equal(*found)


# ---------------------------------------------------------------------- added tokens


def without_embeddings(folder: Path) -> None:
    """Leave out of an adapter what peft only saves if it can compare the model with its base."""
    file = folder / "adapter_model.safetensors"
    save_file(
        {
            name: each
            for name, each in load_file(file).items()
            if not re.search(r"(tokens|head)\.weight|base", name.removeprefix("base"))
        },
        file,
    )


def test_trained_rows_of_added_tokens_are_enough(bases, tmp_path, gemma_tokenizer):
    tokens = [9, 1024, 1025, 1026]
    wanted = train(bases["text"], tmp_path / "lora", vocabulary=1027, trainable_token_indices=tokens)
    without_embeddings(tmp_path / "lora")
    loaded = load_model(section(bases["text"], adapter=str(tmp_path / "lora")), gemma_tokenizer, HERE)
    torch.testing.assert_close(logits(loaded), wanted, atol=2e-4, rtol=1e-4)
    assert loaded.adapter.endswith("20 LoRA modules; rows of tokens replaced: 4")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"trainable_token_indices": [9, 1024, 1026]}, "rows of the embedding and the output layer"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "rows of the embedding and the output layer"),
    ],
    ids=str,
)
def test_an_adapter_without_the_rows_of_its_added_tokens_is_refused(bases, tmp_path, settings, said):
    train(bases["text"], tmp_path / "lora", vocabulary=1027, **settings)
    without_embeddings(tmp_path / "lora")
    with pytest.raises(ModelUnavailable, match=f"with 1027 tokens, its base has 1024, .*{said}") as caught:
        check_weights(section(bases["text"], adapter=str(tmp_path / "lora")), four_bit=False)
    assert "merge it into its model" in caught.value.next_step


def test_an_embedding_that_was_trained_apart_from_the_output_layer_needs_both(bases, tmp_path):
    train(bases["text"], tmp_path / "lora", vocabulary=1027, modules_to_save=["embed_tokens"])
    file = tmp_path / "lora/adapter_model.safetensors"
    save_file({name: each for name, each in load_file(file).items() if "lm_head" not in name}, file)
    with pytest.raises(ModelUnavailable, match="does not contain the rows of the output layer"):
        check_weights(section(bases["text"], adapter=str(tmp_path / "lora")), four_bit=False)


def test_a_tokenizer_with_tokens_that_the_model_lacks_is_refused(tmp_path, big, gemma_tokenizer):
    """Peft leaves the rows out if it cannot find the base's configuration, so that only the tokenizer shows them."""
    shutil.copytree(big / "lora", tmp_path / "lora")
    tokenizer = copy.deepcopy(gemma_tokenizer)
    tokenizer.add_tokens(["<finding>", "</finding>"])
    tokenizer.save_pretrained(tmp_path / "lora")
    work = Workplace(tmp_path)
    work.job("[model]\npath = 'lora'\n[sampling]\nmax_new_tokens = 3\n")
    work.table(1)
    for verb in ("check", "run"):
        said = work.gxr(verb, "j.toml", expect=4).stderr
        assert "2 added tokens for which neither the adapter nor its base has a row, e.g. <finding>" in said
        assert "merge it into its model" in said
    shutil.rmtree(tmp_path / "lora")
    train(big / "base", tmp_path / "lora", vocabulary=len(tokenizer))
    notices = load_model(section(tmp_path / "lora"), gemma_tokenizer, HERE).placement.notices
    assert "Its folder has no tokenizer, so the base's is used" in " ".join(notices)
    tokenizer.save_pretrained(tmp_path / "lora")
    work.gxr("check", "j.toml")
    work.run()
    (row,) = work.results()
    assert row["gxr_status"] == "ok"


def test_merging_rounds_once_in_bfloat16(bases, adapter, gemma_tokenizer):
    full = load_model(section(bases["text"], adapter=str(adapter)), gemma_tokenizer, HERE).model
    half = load_model(section(bases["text"], adapter=str(adapter), dtype="bfloat16"), gemma_tokenizer, HERE)
    base = load_model(section(bases["text"]), gemma_tokenizer, HERE).model
    for name, weight in half.model.named_parameters():
        delta = full.get_parameter(name) - base.get_parameter(name)
        wanted = (base.get_parameter(name).bfloat16().float() + delta).bfloat16()
        # The difference of two float32 numbers is not the product itself: a tie may round the other way.
        assert (weight != wanted).float().mean() < 1e-3, name
    assert why_not(half.model) == ""
    assert half.adapter == "merged in float32, rounded once to bfloat16: 20 LoRA modules"


def test_the_same_adapter_gives_the_same_bits_every_time(bases, adapter, gemma_tokenizer):
    work = section(bases["text"], adapter=str(adapter), dtype="bfloat16")
    first, second = (load_model(work, gemma_tokenizer, HERE) for _ in range(2))
    assert torch.equal(logits(first), logits(second))


# ---------------------------------------------------------------------- 4 bits


def four_bit() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )


@pytest.mark.parametrize("base", ["text", "multimodal"])
def test_an_adapter_on_four_bit_weights_runs_on_the_cpu(bases, adapter, gemma_tokenizer, base):
    from bitsandbytes.nn import Linear4bit
    from peft import PeftModel

    work = section(bases[base], adapter=str(adapter), dtype="bfloat16", load_in_4bit=True)
    loaded = load_model(work, gemma_tokenizer, HERE)
    layers = [module for module in loaded.model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) >= 28
    assert {layer.weight.quant_type for layer in layers} == {"nf4"}
    assert loaded.adapter == "beside the 4-bit weights, in bfloat16: 20 LoRA modules"
    plain = AutoModelForCausalLM.from_pretrained(
        bases["text"], quantization_config=four_bit(), dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    with torch.no_grad():
        without = plain(input_ids=IDS).logits.float()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft uses a name that transformers is about to change
            wanted = PeftModel.from_pretrained(plain, str(adapter)).eval()(input_ids=IDS).logits.float()
    got = logits(loaded).float()
    effect = (wanted - without).norm()
    # peft keeps the matrices in float32, and we in the format that the layers compute in.
    assert (got - wanted).norm() < 0.1 * effect


def test_rows_in_a_batch_keep_their_bits_with_an_adapter_on_four_bit_weights(bases, adapter, gemma_tokenizer):
    work = section(bases["text"], adapter=str(adapter), dtype="bfloat16", load_in_4bit=True)
    backend = LibraryModel(load_model(work, gemma_tokenizer, HERE).model, slots=16, capacity=64)
    prompts = [[2, *range(3 + number, 12 + 2 * number)] for number in range(12)]

    def steps(rows: list[int]) -> torch.Tensor:
        slots = list(range(len(rows)))
        first = backend.prefill([(slot, prompts[row], 0) for slot, row in zip(slots, rows, strict=True)])
        then = backend.decode(slots, first.argmax(-1).tolist(), [len(prompts[row]) for row in rows])
        return torch.stack([first, then], dim=1).clone()

    together = steps(list(range(12)))
    for row in (0, 5, 11):
        assert torch.equal(steps([row])[0], together[row]), f"row {row}"


def test_applying_an_adapter_is_silent(bases, adapter, gemma_tokenizer, capfd):
    capfd.readouterr()
    for four_bit_weights in (False, True):
        work = section(bases["text"], adapter=str(adapter), dtype="bfloat16", load_in_4bit=four_bit_weights)
        load_model(work, gemma_tokenizer, HERE)
        assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def stored(tmp_path_factory, bases, tiny_model_dir) -> Path:
    """A checkpoint stored in 4 bits, as many bases of adapters are."""
    folder = tmp_path_factory.mktemp("stored") / "tiny-gemma-bnb-4bit"
    model = AutoModelForCausalLM.from_pretrained(
        bases["text"], quantization_config=four_bit(), dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_dir / name, folder)
    return folder


def test_a_base_stored_in_four_bits_gets_a_notice(stored, changed, gemma_tokenizer):
    lora = changed(base_model_name_or_path=str(stored))
    loaded = load_model(section(lora, dtype="bfloat16"), gemma_tokenizer, HERE)
    assert loaded.quantization == "nf4"
    assert loaded.adapter.startswith("beside the 4-bit weights")
    (notice,) = loaded.placement.notices
    assert "stored in 4 bits" in notice
    assert f'set model.base = "{str(stored).removesuffix("-bnb-4bit")}"' in notice
    asked = load_model(section(lora, dtype="bfloat16", load_in_4bit=True), gemma_tokenizer, HERE)
    assert asked.placement.notices == ()
    with pytest.raises(JobFileError, match="stored in 4 bits"):
        load_config(section(lora, load_in_4bit=False))


def test_an_adapter_trained_on_four_bits_gets_a_notice_on_full_weights(bases, changed, gemma_tokenizer):
    lora = changed(base_model_name_or_path="unsloth/tiny-gemma-unsloth-bnb-4bit")
    loaded = load_model(section(lora, base=str(bases["text"])), gemma_tokenizer, HERE)
    (notice,) = loaded.placement.notices
    assert "trained on 4-bit weights (unsloth/tiny-gemma-unsloth-bnb-4bit)" in notice
    assert "model.load_in_4bit = true" in notice


def test_an_adapter_on_another_base_gets_a_notice(bases, changed, gemma_tokenizer):
    lora = changed(base_model_name_or_path="google/gemma-3-4b-pt")
    loaded = load_model(section(bases["text"], adapter=str(lora)), gemma_tokenizer, HERE)
    assert "was trained on google/gemma-3-4b-pt" in loaded.placement.notices[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"use_dora": True}, "DoRA adapter needs full weights"), ({"modules_to_save": ["up_proj"]}, "modules_to_save")],
)
def test_what_cannot_be_applied_to_four_bit_weights_is_refused(bases, tmp_path, gemma_tokenizer, settings, said):
    train(bases["text"], tmp_path / "lora", target_modules=["q_proj"], **settings)
    work = section(bases["text"], adapter=str(tmp_path / "lora"), dtype="bfloat16", load_in_4bit=True)
    with pytest.raises(ModelUnavailable, match=said):
        load_model(work, gemma_tokenizer, HERE)
    with pytest.raises(ModelUnavailable, match=said):
        check_weights(work, four_bit=True)


# ---------------------------------------------------------------------- refused by name


def zero_b(tensors: dict) -> dict:
    return {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in tensors.items()}


def far_too_small(tensors: dict) -> dict:
    return {name: tensor * 1e-12 for name, tensor in tensors.items()}


def without_one(tensors: dict) -> dict:
    return {name: tensor for name, tensor in tensors.items() if "layers.2.self_attn.q_proj" not in name}


def without_a_half(tensors: dict) -> dict:
    return {name: tensor for name, tensor in tensors.items() if "layers.2.self_attn.q_proj.lora_A" not in name}


def with_nan(tensors: dict) -> dict:
    return {name: tensor / 0 if "layers.1.mlp.up_proj.lora_B" in name else tensor for name, tensor in tensors.items()}


def elsewhere(tensors: dict) -> dict:
    return {name.replace("model.layers.", "transformer.h."): tensor for name, tensor in tensors.items()}


def with_a_bias(tensors: dict) -> dict:
    return tensors | {"base_model.model.model.layers.0.self_attn.q_proj.bias": torch.ones(4)}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (zero_b, "all its B matrices are zero"),
        (far_too_small, "logits are the same .* in float32"),
        (without_one, r"lacks the tensors of 1 modules .* model\.layers\.2\.self_attn\.q_proj"),
        (without_a_half, r"lacks some of the matrices of model\.layers\.2\.self_attn\.q_proj"),
        (with_nan, r"not finite: .*layers\.1\.mlp\.up_proj\.lora_B"),
        (elsewhere, r"20 of the adapter's 20 modules are missing here, transformer\.h\.0"),
        (with_a_bias, r"not part of LoRA: .*q_proj\.bias"),
        (lambda tensors: {}, "contains no LoRA matrices"),
    ],
)
def test_an_adapter_without_effect_is_refused_with_the_reason(bases, changed, gemma_tokenizer, tensors, said):
    work = section(bases["text"], adapter=str(changed(tensors)))
    with pytest.raises(ModelUnavailable, match=said) as caught:
        load_model(work, gemma_tokenizer, HERE)
    assert caught.value.next_step
    if tensors is not far_too_small:  # only the weights show that
        with pytest.raises(ModelUnavailable, match=said):
            check_weights(work, four_bit=False)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 8}, r"up_proj A is 4 x 64, not 8 x 64"),
        ({"peft_type": "IA3"}, "of the kind 'IA3'"),
        ({"trainable_token_indices": [1, -2]}, "trainable_token_indices is not in peft's format"),
        ({"trainable_token_indices": [1, 2]}, r"lacks the tensors of 1 modules .* model\.embed_tokens"),
        ({"modules_to_save": ["norm"]}, r"lacks the tensors of \d+ modules .*norm"),
        ({"bias": "all"}, "uses bias"),
        ({"lora_bias": True}, "uses lora_bias"),
        ({"alora_invocation_tokens": [5]}, "uses alora_invocation_tokens"),
        ({"invented_in_2027": 1}, "uses invented_in_2027"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"lora_alpha": "many"}, "not a positive number"),
        ({"rank_pattern": [1]}, "rank_pattern is not in peft's format"),
        ({"target_modules": "("}, "target_modules is not in peft's format"),
        ({"layers_to_transform": "all"}, "layers_to_transform is not"),
    ],
    ids=str,
)
def test_unsupported_settings_are_refused_by_name(bases, changed, gemma_tokenizer, settings, said):
    work = section(bases["text"], adapter=str(changed(**settings)))
    with pytest.raises(ModelUnavailable, match=said):
        load_model(work, gemma_tokenizer, HERE)
    with pytest.raises(ModelUnavailable, match=said):
        check_weights(work, four_bit=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "mlp.up_proj", "lm_head"]},
        {"target_modules": r".*language.*\.(q|v)_proj"},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.1\..*"},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 3]},
        {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ],
    ids=str,
)
def test_settings_target_the_same_modules_as_in_peft(bases, settings):
    from peft.tuners.tuners_utils import check_target_module_exists

    ours = AdapterConfig(path=Path(), settings=settings)
    theirs = LoraConfig(**settings)
    for base in bases.values():
        model = AutoModelForCausalLM.from_pretrained(base)
        for name, _ in model.named_modules():
            assert ours.targets(name) == bool(check_target_module_exists(theirs, name)), name


def test_an_adapter_of_another_size_is_refused_with_its_shapes(adapter, tmp_path, gemma_tokenizer):
    config = tiny_gemma().config
    config.hidden_size = 96
    type(tiny_gemma())(config).save_pretrained(tmp_path)
    work = section(tmp_path, adapter=str(adapter))
    said = r"does not fit this model: .*up_proj A is 4 x 64, not 4 x 96"
    with pytest.raises(ModelUnavailable, match=said):
        load_model(work, gemma_tokenizer, HERE)
    with pytest.raises(ModelUnavailable, match=said):
        check_weights(work, four_bit=False)


def test_an_untrained_adapter_is_refused(bases, tmp_path, gemma_tokenizer):
    train(bases["text"], tmp_path / "lora", untrained=True)
    with pytest.raises(ModelUnavailable, match="before the first step of training"):
        load_model(section(bases["text"], adapter=str(tmp_path / "lora")), gemma_tokenizer, HERE)


def test_each_damaged_or_missing_file_gives_one_message(bases, changed, gemma_tokenizer):
    lora = changed()
    weights, config = lora / "adapter_model.safetensors", lora / "adapter_config.json"
    work = section(bases["text"], adapter=str(lora))
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelUnavailable, match="damaged or truncated"):
        load_model(work, gemma_tokenizer, HERE)
    weights.rename(lora / "adapter_model.bin")
    with pytest.raises(ModelUnavailable, match="other formats"):
        identity(work)
    for text in ("{", "[]", "{}"):
        config.write_text(text)
        with pytest.raises(ModelUnavailable, match="file is damaged"):
            load_config(work)
    config.unlink()
    with pytest.raises(ModelUnavailable, match="not an adapter"):
        load_config(work)


# ---------------------------------------------------------------------- names


def test_an_adapter_as_model_path_brings_its_base(bases, changed, gemma_tokenizer):
    lora = changed(base_model_name_or_path=str(bases["text"]))
    loaded = load_model(section(lora), gemma_tokenizer, HERE)
    other = load_model(section(bases["text"], adapter=str(lora)), gemma_tokenizer, HERE)
    assert torch.equal(logits(loaded), logits(other))
    plain = load_model(section(lora, adapter="none"), gemma_tokenizer, HERE)
    assert plain.adapter is None
    assert torch.equal(logits(plain), logits(load_model(section(bases["text"]), gemma_tokenizer, HERE)))


@pytest.mark.parametrize(
    ("settings", "keys", "said", "step"),
    [
        ({"base_model_name_or_path": None}, {}, "does not name its base model", "model.base"),
        ({"base_model_name_or_path": "/no/such/base"}, {}, "base model: There is no such", "set model.base"),
        ({}, {"base": "/no/such/base"}, "There is no such model folder", "set model.base to a folder"),
        ({}, {"adapter": "other"}, "names another one", "remove model.adapter"),
        ({}, {"revision": "main"}, "is for models on the hub", "remove model.revision"),
    ],
    ids=str,
)
def test_a_missing_base_is_named_with_the_next_step(changed, settings, keys, said, step):
    with pytest.raises(GxrError, match=said) as caught:
        load_config(section(changed(**settings), **keys))
    assert step in caught.value.next_step


def test_a_missing_adapter_is_named_as_an_adapter(bases):
    with pytest.raises(ModelUnavailable, match="There is no such adapter folder") as caught:
        load_config(section(bases["text"], adapter="/no/such/adapter"))
    assert "adapter_config.json" in caught.value.next_step
    assert '"none"' in caught.value.next_step


@pytest.mark.parametrize(
    "case",
    [
        (["checkpoint-500"], "but a folder in it does: checkpoint-500", 'above/checkpoint-500"'),
        (
            ["checkpoint-500", "checkpoint-1000"],
            "2 folders in it do: checkpoint-500, c",
            'checkpoint-1000", the last one',
        ),
        (["radiology"], "but a folder in it does: radiology", 'above/radiology"'),
        (["checkpoint-20/default"], "a folder in it does: checkpoint-20/default", 'above/checkpoint-20/default"'),
    ],
    ids=str,
)
def test_a_folder_above_adapters_says_which_to_name(bases, adapter, tmp_path, case):
    folders, said, step = case
    for folder in folders:
        shutil.copytree(adapter, tmp_path / "above" / folder)
    (tmp_path / "above/README.md").write_text("trained")
    above = tmp_path / "above"
    for key, work in {
        "model.path": section(above),
        "model.adapter": section(bases["text"], adapter=str(above)),
    }.items():
        with pytest.raises(ModelUnavailable, match=f"contains no adapter itself.*{said}") as caught:
            load_config(work)
        assert caught.value.where == f"{key} = {above}"
        assert caught.value.next_step.startswith(f'set {key} = "')
        assert step in caught.value.next_step


def test_the_best_checkpoint_is_advised_if_the_trainer_recorded_it(adapter, tmp_path):
    for number in (5, 10, 15):
        shutil.copytree(adapter, tmp_path / f"checkpoint-{number}")
    state = {"best_model_checkpoint": "/elsewhere/out/checkpoint-10"}
    (tmp_path / "checkpoint-15/trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ModelUnavailable) as caught:
        load_config(section(tmp_path))
    assert caught.value.next_step.endswith('checkpoint-10", the best by its trainer_state.json')


def test_a_file_of_an_adapter_says_to_name_its_folder(adapter):
    with pytest.raises(ModelUnavailable, match="not a folder") as caught:
        load_config(section(adapter / "adapter_model.safetensors"))
    assert caught.value.next_step == f'set model.path = "{adapter}", the folder of this file'


def test_a_folder_in_a_hub_repository_says_how_to_get_it(adapter, tmp_path, monkeypatch):
    shutil.copytree(adapter, tmp_path / "abc123" / "checkpoint-9")
    monkeypatch.setattr(source, "fetch", lambda *args, **keys: tmp_path / "abc123")
    with pytest.raises(ModelUnavailable) as caught:
        load_config(section("some/adapter"))
    assert caught.value.next_step == (
        "hf download some/adapter --include 'checkpoint-9/*' --local-dir FOLDER, "
        'then set model.path = "FOLDER/checkpoint-9"'
    )


def test_check_downloads_an_adapter_and_no_model(bases, adapter, tmp_path, monkeypatch):
    asked = []

    def fetch(name: str, revision: str, patterns: list[str], *, where: str) -> Path:
        asked.extend((name, pattern) for pattern in patterns if "safetensors" in pattern)
        return {"a/base": bases["text"], "a/lora": adapter}[name]

    monkeypatch.setattr(source, "fetch", fetch)
    assert check_weights(section("a/base", adapter="a/lora"), four_bit=False) is not None
    assert asked == [("a/lora", "adapter_model.safetensors")]


def test_names_that_contradict_each_other_are_refused(bases, adapter, changed):
    with pytest.raises(JobFileError, match="is a whole model"):
        load_config(section(bases["text"], base="some/model"))
    with pytest.raises(ModelUnavailable, match="itself an adapter"):
        load_config(section(changed(base_model_name_or_path=str(adapter))))


def test_a_model_folder_with_an_adapter_requires_a_decision(bases, adapter, tmp_path, gemma_tokenizer):
    for folder in (bases["text"], adapter):
        for file in folder.iterdir():
            if file.suffix in {".json", ".safetensors"}:
                shutil.copy(file, tmp_path)
    with pytest.raises(JobFileError, match="a whole model and an adapter"):
        load_config(section(tmp_path))
    plain = load_model(section(tmp_path, adapter="none"), gemma_tokenizer, HERE)
    assert torch.equal(logits(plain), logits(load_model(section(bases["text"]), gemma_tokenizer, HERE)))
    both = load_model(section(tmp_path, adapter=str(tmp_path)), gemma_tokenizer, HERE)
    assert both.adapter.startswith("merged")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match="no model weights"):
        identity(section(tmp_path, adapter="none"))


def test_the_models_own_adapter_is_used_unless_the_job_names_another(bases, adapter, gemma_tokenizer, monkeypatch):
    monkeypatch.setattr(source, "default_adapter", lambda path: adapter)
    assert load_model(section(bases["text"]), gemma_tokenizer, HERE).adapter is not None
    assert load_model(section(bases["text"], adapter="none"), gemma_tokenizer, HERE).adapter is None


def test_the_demo_model_comes_with_an_adapter_that_is_merged_and_changes_it(demo_model_dir, gemma_tokenizer):
    plain = load_model(section("demo", adapter="none"), gemma_tokenizer, HERE)
    taught = load_model(section("demo"), gemma_tokenizer, HERE)
    assert plain.adapter is None
    assert taught.adapter.startswith("merged")
    assert not torch.equal(logits(plain), logits(taught))
    own = source.default_adapter("demo")
    assert own == source.find(section("demo"), weights=False).adapter.folder
    model_card = (own / "README.md").read_text()
    assert "google/gemma-3-270m" in model_card
    assert DISCLAIMER in model_card
    assert "Gemma" in (own / "NOTICE").read_text()
    assert sum(file.stat().st_size for file in own.iterdir()) < 12e6, "it is part of the package"
    assert source.default_adapter(str(demo_model_dir)) is None, "only the name demo selects it"


def tokenizer_folder(work: ModelSection) -> Path:
    return load_weights._tokenizer_of(source.find(work, weights=False)).folder


def test_the_adapters_tokenizer_is_used_and_both_end_ids_apply(bases, changed, gemma_tokenizer):
    lora = changed(base_model_name_or_path=str(bases["text"]))
    work = section(lora)
    assert tokenizer_folder(work) == bases["text"], "it has none"
    shutil.copy(bases["text"] / "tokenizer.json", lora)
    settings = json.loads((bases["text"] / "tokenizer_config.json").read_text())
    (lora / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<end_of_turn>"}))
    (lora / "chat_template.jinja").write_text("{{ 'its own' }}")
    tokenizer = load_tokenizer(work)
    assert tokenizer.chat_template == "{{ 'its own' }}"
    assert tokenizer.eos_token_id == 106
    loaded = load_model(work, tokenizer, HERE)
    assert {1, 106} <= set(loaded.end_ids)
    assert tokenizer_folder(section(lora, adapter="none")) == bases["text"]
    (lora / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    assert {1, 7, 106} <= set(load_weights.end_ids(loaded.model, tokenizer, lora))


# ---------------------------------------------------------------------- identity


def test_the_hash_covers_every_byte_of_an_adapter(bases, changed):
    lora = changed(base_model_name_or_path=str(bases["text"]))
    first = identity(section(lora))
    assert first.adapter == str(lora)
    assert first.weights_sha256 == identity(section(bases["text"])).weights_sha256
    assert first.adapter_sha256 == identity(section(bases["text"], adapter=str(lora))).adapter_sha256
    config, weights = lora / "adapter_config.json", lora / "adapter_model.safetensors"
    config.write_text(config.read_text().replace('"lora_alpha": 12', '"lora_alpha": 13'))
    second = identity(section(lora)).adapter_sha256
    save_file({name: tensor * 2 for name, tensor in load_file(weights).items()}, weights)
    third = identity(section(lora)).adapter_sha256
    assert len({first.adapter_sha256, second, third, None}) == 4


def test_what_a_job_leaves_open_is_pinned_by_the_first_invocation():
    asked = Job.model_validate({"name": "j", "input": {"path": "f.csv"}, "model": {"path": "a/b", "adapter": "c/d"}})
    pins = {"model.revision": "1" * 40, "model.adapter": "c/d@" + "2" * 40}
    info = EngineInfo(
        identity=Identity(kind="generate", model="a/b", pins=pins),
        device="cpu", dtype="float32", quantization=None, slots=2, load_seconds=0, reproducible=True,
    )  # fmt: skip
    settled = settle(asked, info)
    assert (settled.model.revision, settled.model.adapter) == ("1" * 40, "c/d@" + "2" * 40)
    manifest = Manifest(name="j", created_at="", job=settled.model_dump(), resolved=resolved(settled))
    again = follow(asked.with_values({"engine.kind": "generate"}), manifest)
    assert (again.model.revision, again.model.adapter) == ("1" * 40, "c/d@" + "2" * 40)
    assert again.engine.slots == "auto", "as many as fit in memory tonight"
    earlier = Manifest(name="j", created_at="", job=settled.model_dump(), resolved={"engine.slots": 512})
    assert follow(asked.with_values({"engine.kind": "generate"}), earlier).engine.slots == "auto", (
        "earlier versions kept the slots of the first night"
    )
    none = follow(asked.with_values({"engine.kind": "generate", "model.adapter": "none"}), manifest)
    assert none.model.adapter == "none", "the fingerprint refuses another adapter"
    other = follow(asked.with_values({"engine.kind": "generate", "model.path": "x/y"}), manifest)
    assert other.model.revision == "", "another model has other revisions"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_during_a_download_gives_one_message(code):
    with pytest.raises(ModelUnavailable, match="disk is full") as caught, hub._hub_errors("a/b", "", "model.adapter"):
        raise OSError(code, "No space left on device")
    assert "HF_HOME" in caught.value.next_step
    assert "model.adapter = a/b" in caught.value.where


def test_weights_with_an_extra_tensor_are_refused(bases, tmp_path, gemma_tokenizer):
    shutil.copytree(bases["text"], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.9.extra.weight"] = torch.ones(2, 2)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnavailable, match=r"contain 1 tensors .* model\.layers\.9\.extra"):
        load_model(section(tmp_path), gemma_tokenizer, HERE)


class BudgetOfMainMemory(MemoryBudget):
    """Lets accelerate divide a model among devices although the main memory is the only one."""

    def by_device(self, weights_share: float) -> dict[int | str, int]:
        return {"cpu": 2**30}


def test_a_model_is_spread_with_its_adapter_merged(bases, adapter, gemma_tokenizer):
    base = source.find(section(bases["text"]), weights=True).base
    lora = read_adapter(source.Source(name="lora", folder=adapter))
    where = Placement(device=SPREAD, dtype="float32", four_bit=False)
    memory = BudgetOfMainMemory(EngineSection())
    model, applied = read_weights.read_model(base, load_config(section(bases["text"])), where, memory, lora)
    assert applied is not None
    assert applied.how.startswith("merged")
    assert set(model.hf_device_map.values()) == {"cpu"}
    whole = load_model(section(bases["text"], adapter=str(adapter)), gemma_tokenizer, HERE)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, logits(whole))


# ---------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def big(tmp_path_factory, gemma_tokenizer) -> Path:
    """A tiny model with Gemma's whole vocabulary, so that it accepts real prompts, and an adapter for it."""
    folder = tmp_path_factory.mktemp("big")
    tiny_gemma(vocab=len(gemma_tokenizer)).save_pretrained(folder / "base")
    gemma_tokenizer.save_pretrained(folder / "base")
    train(folder / "base", folder / "lora")
    return folder


@pytest.mark.parametrize("kind", ["transformers", "generate"])
def test_a_run_with_an_adapter_records_it_and_refuses_to_resume_with_another(tmp_path, big, kind):
    shutil.copytree(big / "lora", tmp_path / "lora")
    work = Workplace(tmp_path)
    work.job(f"[model]\npath = 'lora'\n[engine]\nkind = '{kind}'\nslots = 2\n[sampling]\nmax_new_tokens = 3\n")
    work.table(2)
    work.run()
    assert {row["gxr_adapter"] for row in work.results()} == {"lora"}
    engine = work.manifest()["invocations"][-1]["engine"]
    assert engine["adapter"].startswith("merged in float32")
    assert work.manifest()["resolved"]["model.base"] == str(big / "base")
    if kind == "generate":
        return  # changes in the fingerprint are found before any engine is opened
    texts = [row["gxr_text"] for row in work.results()]
    file = tmp_path / "lora/adapter_model.safetensors"
    save_file({name: tensor * 3 for name, tensor in load_file(file).items()}, file)
    work.table(3)
    refused = work.run(expect=2).stderr
    assert "model adapter" in refused
    assert "model weights" not in refused
    assert [row["gxr_text"] for row in work.results()] == texts
    assert "model adapter" in work.run("--set", "model.adapter=none", expect=2).stderr


CHANGED_FILES = "This run was made with other settings: the tokenizer, chat template or configuration of the model."


def test_a_run_is_not_resumed_with_another_chat_template(tmp_path, big):
    shutil.copytree(big / "base", tmp_path / "model")
    work = Workplace(tmp_path)
    work.job("[model]\npath = 'model'\n[engine]\nslots = 2\n[sampling]\nmax_new_tokens = 3\n")
    work.table(4)
    work.run("--limit", "2")
    template = tmp_path / "model/chat_template.jinja"
    template.write_text("{{ messages[0].content }}")
    assert CHANGED_FILES in work.run(expect=2).stderr
    assert CHANGED_FILES in work.gxr("check", "j.toml", expect=2).stderr
    template.unlink()
    # A run of an earlier version does not say with which files it began, and is tied to those of its next invocation.
    manifest = work.manifest()
    assert len(manifest["fingerprint"].pop("model files")) == 64
    (tmp_path / "outputs/j/run.json").write_text(json.dumps(manifest))
    work.run("--limit", "3")
    assert len(work.manifest()["fingerprint"]["model files"]) == 64
    template.write_text("{{ messages[0].content }}")
    assert CHANGED_FILES in work.run(expect=2).stderr
    assert len(work.results()) == 3


def test_an_adapter_that_changes_nothing_ends_a_run_with_exit_4(tmp_path, big):
    train(big / "base", tmp_path / "fresh", untrained=True)
    work = Workplace(tmp_path)
    work.job(f"[model]\npath = '{big / 'base'}'\nadapter = 'fresh'\n[sampling]\nmax_new_tokens = 3\n")
    said = work.run(expect=4).stderr
    assert "changes nothing" in said
    assert "Traceback" not in said


def test_check_reports_what_fits_and_refuses_an_adapter_that_run_would_refuse(tmp_path, big):
    shutil.copytree(big / "lora", tmp_path / "lora")
    work = Workplace(tmp_path)
    work.job("[model]\npath = 'lora'\n[engine]\nmemory_limit = '200MiB'\n")
    said = work.gxr("check", "j.toml").stdout
    found = re.search(r"max_seq_length 2048: up to (\d+) slots, 4096: up to (\d+) slots$", said, re.MULTILINE)
    assert found is not None, said
    assert int(found[1]) > int(found[2]) >= 1
    config = tmp_path / "lora/adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"VERA"'))
    assert "of the kind 'VERA'" in work.gxr("check", "j.toml", expect=4).stderr


@pytest.mark.parametrize("kind", ["transformers", "generate", "ray"])
def test_check_refuses_tensors_that_run_would_refuse(tmp_path, big, kind):
    file = shutil.copytree(big / "lora", tmp_path / "lora") / "adapter_model.safetensors"
    save_file({name: each[:2] for name, each in load_file(file).items()}, file)
    work = Workplace(tmp_path)
    work.job(f"[model]\npath = 'lora'\n[engine]\nkind = '{kind}'\n[ray]\nworker = 'transformers'\n")
    work.table(1)
    assert "does not fit this model" in work.gxr("check", "j.toml", expect=4).stderr


def test_check_refuses_a_model_whose_weights_are_missing_or_truncated(bases, tmp_path):
    shutil.copytree(bases["text"], tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelUnavailable, match="damaged or truncated"):
        check_weights(section(tmp_path / "model"), four_bit=False)
    weights.unlink()
    with pytest.raises(ModelUnavailable, match="no weights in safetensors format"):
        check_weights(section(tmp_path / "model"), four_bit=False)
