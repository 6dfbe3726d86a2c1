"""Loading: each fault gives one message with the next step, and what is loaded is what was asked for."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from small_hub import COMMIT, NEXT_COMMIT, SmallHub
from tiny import tiny_gemma, tiny_llama, tiny_multimodal

from gxr_batch.errors import GxrError, JobFileError, ModelUnavailable
from gxr_batch.job import EngineSection, ModelSection
from gxr_batch.models import memory_estimate
from gxr_batch.models import weights_hash as hashes
from gxr_batch.models.check_adapter import check_weights
from gxr_batch.models.device_memory import MemoryBudget
from gxr_batch.models.load_weights import end_ids, identity, load_model, load_tokenizer
from gxr_batch.models.read_weights import bytes_in_16_bits
from gxr_batch.models.source import Source
from gxr_batch.models.what_fits import measure

pytestmark = pytest.mark.model

HERE = MemoryBudget(EngineSection())  # this machine, without a limit


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory, gemma_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_gemma().save_pretrained(folder)
    gemma_tokenizer.save_pretrained(folder)
    return folder


def section(path: object, **keys: object) -> ModelSection:
    return ModelSection.model_validate({"path": str(path), **keys})


def test_a_local_folder_loads_in_the_dtype_that_was_asked_for(tiny_dir, gemma_tokenizer):
    loaded = load_model(section(tiny_dir, dtype="float32"), gemma_tokenizer, HERE)
    assert loaded.model.dtype == torch.float32
    assert loaded.device == "cpu"
    assert loaded.quantization is None
    assert 106 in loaded.end_ids
    assert 1 in loaded.end_ids


@pytest.mark.parametrize("dtype", [-1, 2**63, {"odd": {"type": {"odd": []}}}])
def test_check_and_run_ignore_the_dtype_of_the_configuration(tiny_dir, tmp_path, gemma_tokenizer, dtype):
    copy(tiny_dir, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    check_weights(section(tmp_path, dtype="float32"), four_bit=False)
    assert load_model(section(tmp_path, dtype="float32"), gemma_tokenizer, HERE).model.dtype == torch.float32


def test_four_bit_weights_really_are_four_bit_on_the_cpu(tiny_dir, gemma_tokenizer):
    from bitsandbytes.nn import Linear4bit

    work = section(tiny_dir, load_in_4bit=True, dtype="bfloat16")
    loaded = load_model(work, gemma_tokenizer, HERE)
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


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "chat_template.jinja", "tokenizer_config.json", "tokenizer.json"],
)
def test_the_identity_follows_the_files_that_decide_prompts_and_ends(tiny_dir, tmp_path, name):
    copy(tiny_dir, tmp_path)
    (tmp_path / "README.md").write_text("Nothing that is read.")
    os.utime(tmp_path / "config.json", (1, 1))
    before = identity(section(tiny_dir))
    assert identity(section(tmp_path)).files_sha256 == before.files_sha256
    with (tmp_path / name).open("a") as file:
        file.write("\n")
    after = identity(section(tmp_path))
    assert after.files_sha256 != before.files_sha256
    assert after.weights_sha256 == before.weights_sha256


def test_the_identity_follows_the_files_of_an_adapter_where_they_are_used(tiny_dir, lora_dir, tmp_path):
    copy(lora_dir, tmp_path)
    config = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config.replace("nobody/tiny", str(tiny_dir)))
    found = [identity(section(tmp_path)).files_sha256]
    assert found == [identity(section(tiny_dir)).files_sha256]
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    found.append(identity(section(tmp_path)).files_sha256)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    found.append(identity(section(tmp_path)).files_sha256)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_dir / name).read_bytes() + b"\n")
    found.append(identity(section(tmp_path)).files_sha256)
    assert len(set(found)) == 4


def test_float16_is_refused_for_gemma_before_loading(tiny_dir, gemma_tokenizer):
    with pytest.raises(JobFileError, match="float16"):
        load_model(section(tiny_dir, dtype="float16"), gemma_tokenizer, HERE)


@pytest.mark.parametrize("path", ["./no/such/folder", "/no/such/folder"])
def test_a_missing_folder_is_named_with_its_absolute_path(path):
    with pytest.raises(GxrError) as caught:
        identity(section(path))
    assert str(Path(path).absolute()) in str(caught.value)


def test_truncated_weights_give_one_message(tiny_dir, tmp_path, gemma_tokenizer):
    copy(tiny_dir, tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:5000])
    with pytest.raises(ModelUnavailable, match="cannot be loaded"):
        load_model(section(tmp_path), gemma_tokenizer, HERE)


def test_a_context_longer_than_the_models_is_refused(tiny_dir):
    with pytest.raises(JobFileError, match="at most 4096 tokens"):
        load_tokenizer(section(tiny_dir, max_seq_length=8192))


def test_end_ids_are_collected_from_every_place_that_names_them(gemma_tokenizer):
    model = tiny_gemma()
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    assert end_ids(model, gemma_tokenizer) == (1, 106)


@pytest.fixture
def hub(tmp_path, tiny_dir, lora_dir):
    """A hub on this machine that serves the tiny model and an adapter; returns a runner of client code."""
    repositories = {
        name: {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".md"}
        for name, folder in (("nobody/tiny", tiny_dir), ("nobody/lora", lora_dir))
    }

    def client(code: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", CLIENT + code],
            env=os.environ
            | {
                "HF_HOME": str(tmp_path / "hub"),
                "HF_ENDPOINT": server.url,
                "HF_HUB_DISABLE_XET": "1",
                "XDG_CACHE_HOME": str(tmp_path / "cache"),
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    with SmallHub(repositories) as server:
        client.server = server
        yield client


CLIENT = """
from gxr_batch.job import EngineSection, ModelSection
from gxr_batch.models.load_weights import identity, load_model, load_tokenizer
from gxr_batch.models.device_memory import MemoryBudget
HERE = MemoryBudget(EngineSection())
def section(**keys): return ModelSection.model_validate(keys)
"""


@pytest.fixture(scope="module")
def lora_dir(tmp_path_factory, tiny_dir) -> Path:
    """An adapter with an effect, whose base is nobody/tiny."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft uses a name that transformers is about to change
        model = get_peft_model(tiny_gemma(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(tiny_dir)
    folder = tmp_path_factory.mktemp("lora")
    model.save_pretrained(folder)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tiny_dir), "nobody/tiny"))
    return folder


def test_a_hub_model_is_downloaded_once_and_then_found_offline(hub, tiny_dir):
    say = (
        "found = identity(section(path='nobody/tiny'))\nprint(found.revision, found.weights_sha256, found.files_sha256)"
    )
    here = [identity(section(tiny_dir)).weights_sha256, identity(section(tiny_dir)).files_sha256]
    assert hub("load_tokenizer(section(path='nobody/tiny'))") == ""
    assert hub(say).split() == [COMMIT, *here]
    pinned = f"section(path='nobody/tiny', revision='{COMMIT}')"
    offline = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert hub(say, **offline).split() == [COMMIT, *here]
    assert hub(f"print(load_model({pinned}, load_tokenizer({pinned}), HERE).end_ids)", **offline).strip() == "(1, 106)"


def test_an_adapter_on_the_hub_brings_its_base_and_both_are_pinned(hub):
    say = (
        "asked = section(path='nobody/lora')\nfound = identity(asked)\n"
        "print(found.model, found.revision, found.adapter, found.pins['model.base'])\n"
        "print(load_model(asked, load_tokenizer(asked), HERE).adapter)\n"
    )
    names, how = hub(say).splitlines()
    assert names == f"nobody/lora {COMMIT} nobody/lora@{COMMIT} nobody/tiny@{COMMIT}"
    assert how.startswith("merged in float32")
    offline = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    on_top = (
        f"asked = section(path='nobody/tiny@{COMMIT}', adapter='nobody/lora@{COMMIT}')\nprint(identity(asked).adapter)"
    )
    assert hub(on_top, **offline).strip() == f"nobody/lora@{COMMIT}"


@pytest.mark.parametrize("kind", ["transformers", "generate"])
@pytest.mark.parametrize("first", ["identity", "encoder"])
def test_a_push_during_an_invocation_changes_no_part_of_its_model(hub, kind, first):
    hub.server.busy = True
    job = {"name": "j", "input": {"path": "f.csv"}, "engine": {"kind": kind}, "model": {"path": "nobody/lora"}}
    say = (
        "from gxr_batch.engines import create\nfrom gxr_batch.job import Job\n"
        f"engine = create(Job.model_validate({job}))\nengine.{first}()\n"
        "with engine.open() as session:\n    found = session.info.identity\n"
        "print(found.revision, found.pins['model.base'])\n"
    )
    assert hub(say).split() == [COMMIT, f"nobody/tiny@{COMMIT}"]
    assert [path for path in hub.server.requests if NEXT_COMMIT in path] == []
    assert [path for path in hub.server.requests if "main" in path] == [
        f"/api/models/nobody/{name}/revision/main" for name in ("lora", "tiny")
    ]


@pytest.mark.parametrize(
    ("path", "keys", "said", "step"),
    [
        ("nobody/gated", {}, "gated, and you are not logged in", "accept its terms"),
        ("nobody/tiny", {"adapter": "nobody/gated"}, "gated", "accept its terms"),
        ("nobody/stale-token", {}, "does not accept your token", "log in again"),
        ("nobody/teapot", {}, "HTTP status 418", "run the same command again later"),
        ("nobody/other", {}, "Neither a folder", "check the name"),
        ("nobody/tiny", {"revision": "no-such"}, "no such revision", "choose one of"),
        ("nobody--odd", {}, "Neither a folder", "check the name"),
    ],
)
def test_each_refusal_of_the_hub_gives_one_message_with_a_next_step(hub, path, keys, said, step):
    code = (
        "from gxr_batch.errors import ModelUnavailable\n"
        f"try:\n    identity(section(path={path!r}, **{keys!r}))\n"
        "except ModelUnavailable as error:\n    print(error.what, '|', error.where, '|', error.next_step)\n"
    )
    what, where, next_step = hub(code).split(" | ")
    assert said in what
    assert (keys.get("adapter") or path) in where
    assert step in next_step


def test_a_hub_that_cannot_be_reached_gives_one_message(hub):
    code = (
        "from gxr_batch.errors import ModelUnavailable\n"
        "try:\n    identity(section(path='nobody/tiny'))\n"
        "except ModelUnavailable as error:\n    print(error.what)\n"
    )
    assert "cannot be reached" in hub(code, HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot be reached" in hub(code, HF_HUB_OFFLINE="1")


def test_a_revision_of_a_model_on_this_machine_is_refused(tiny_dir):
    with pytest.raises(JobFileError, match="is for models on the hub"):
        identity(section(tiny_dir, revision="main"))


def test_weights_that_lack_a_tensor_are_refused_instead_of_filled_with_random_numbers(
    tiny_dir, tmp_path, gemma_tokenizer
):
    from safetensors.torch import load_file

    copy(tiny_dir, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnavailable, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(section(tmp_path), gemma_tokenizer, HERE)


def test_weights_in_several_files_load_and_have_one_hash(tiny_dir, tmp_path, gemma_tokenizer):
    copy(tiny_dir, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    tiny_gemma().save_pretrained(tmp_path, max_shard_size="300KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    listed = "".join(f"{path.name}\t{hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in shards)
    assert identity(section(tmp_path)).weights_sha256 == hashlib.sha256(listed.encode()).hexdigest()
    load_model(section(tmp_path), gemma_tokenizer, HERE)
    shards[0].rename(tmp_path / "elsewhere")
    with pytest.raises(ModelUnavailable, match="weight file is missing"):
        identity(section(tmp_path))


def test_only_safetensors_are_loaded(tiny_dir, tmp_path):
    copy(tiny_dir, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelUnavailable, match="safetensors"):
        identity(section(tmp_path))


def test_code_that_comes_with_a_model_is_not_run(tiny_dir, tmp_path):
    copy(tiny_dir, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd", "AutoModelForCausalLM": "odd.OddModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "odd.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelUnavailable, match="never run"):
        load_tokenizer(section(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_multimodal_gemma_loads_for_text(tmp_path, gemma_tokenizer):
    tiny_multimodal().save_pretrained(tmp_path)
    gemma_tokenizer.save_pretrained(tmp_path)
    loaded = load_model(section(tmp_path, dtype="float32"), gemma_tokenizer, HERE)
    with torch.inference_mode():
        out = loaded.model.generate(torch.tensor([[2, 5, 9]]), max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 7)
    assert {1, 106} <= set(loaded.end_ids)
    assert not any("vision" in name or "projector" in name for name, _ in loaded.model.named_parameters())


def test_a_hash_is_read_from_the_cache_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    first = hashes.weights_sha256([file])
    assert first == hashlib.sha256(b"one").hexdigest()
    monkeypatch.setattr(hashes, "_sha256", lambda path: pytest.fail("read again"))
    assert hashes.weights_sha256([file]) == first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file.write_bytes(b"two")
    assert hashes.weights_sha256([file]) == hashlib.sha256(b"two").hexdigest()
    (tmp_path / "cache" / "gxr-batch" / "weights-sha256.json").write_text("torn {")
    assert hashes.weights_sha256([file]) == hashlib.sha256(b"two").hexdigest()


def test_loading_is_silent(tiny_dir, capfd):
    load_model(section(tiny_dir), load_tokenizer(section(tiny_dir)), HERE)
    assert capfd.readouterr() == ("", "")


GIB = 2**30


def test_memory_counts_the_window_of_a_sliding_layer_and_not_the_length():
    config = tiny_gemma().config  # three layers with a window of 8, one without
    logits = config.vocab_size * 4 * 6
    assert memory_estimate.row_bytes(config, 100, 2, windowed=True) - logits == (3 * 8 + 100) * 2 * 32 * 2 * 2
    assert (
        memory_estimate.row_bytes(config, 100, 2) - logits
        == 100 * memory_estimate.kv_bytes_a_token(config, 2)
        == 4 * 100 * 256
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_count_as_16_bits_however_they_were_saved(tmp_path, gemma_tokenizer, dtype):
    """A model saved in float32 would otherwise be loaded in 4 bits on a GPU where bfloat16 fits."""
    model = tiny_gemma(dtype)
    model.save_pretrained(tmp_path)
    gemma_tokenizer.save_pretrained(tmp_path)
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") + 8
    for settings, wanted in (({"dtype": "bfloat16"}, 1), ({"dtype": "float32"}, 2)):
        placed = load_model(section(tmp_path, **settings), gemma_tokenizer, HERE).placement
        assert placed.weight_bytes == wanted * (2 * model.num_parameters() + header)
    assert (
        measure(section(tmp_path, dtype="bfloat16"), EngineSection()).placement.weight_bytes == placed.weight_bytes // 2
    )


def test_quantised_weights_count_as_they_are(tmp_path):
    save_file({"a": torch.zeros(8, dtype=torch.uint8), "b": torch.zeros(4)}, tmp_path / "model.safetensors")
    config = SimpleNamespace(quantization_config={"load_in_4bit": True})
    size = (tmp_path / "model.safetensors").stat().st_size
    source = Source(name="x", folder=tmp_path)
    assert bytes_in_16_bits(source, config) == size
    assert bytes_in_16_bits(source, SimpleNamespace()) == size - 8


def test_what_fits_includes_eight_rows():
    assert memory_estimate.fits(8 * GIB, GIB // 8, 16 * GIB)
    assert not memory_estimate.fits(8 * GIB, GIB, 16 * GIB)
    assert memory_estimate.fits(memory_estimate.four_bit_bytes(16 * GIB), GIB // 8, 16 * GIB)
    assert memory_estimate.rows_that_fit(GIB, 10 * GIB, 64) == 8
    assert memory_estimate.rows_that_fit(GIB, 1000 * GIB, 64) == 64
    assert memory_estimate.rows_that_fit(100 * GIB, GIB, 64) == 1


def copy(source: Path, target: Path) -> None:
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def test_a_package_that_cannot_be_imported_is_not_blamed_on_the_folder(tiny_dir, monkeypatch):
    from transformers import AutoModelForCausalLM

    def lacks(*_, **__):
        raise ImportError("Using `device_map` requires Accelerate:\n `pip install accelerate`")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lacks)
    with pytest.raises(ModelUnavailable) as caught:
        load_model(section(tiny_dir), load_tokenizer(section(tiny_dir)), HERE)
    assert "A package that loading this model needs cannot be imported: Using `device_map` requires Accel" in str(
        caught.value
    )
    assert "install that package" in caught.value.next_step
    assert "config.json" not in str(caught.value)
