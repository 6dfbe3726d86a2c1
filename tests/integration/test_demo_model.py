"""The built-in demo model: converted once, completely or not at all, by the first process that needs it."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gxr_batch.errors import ModelUnavailable, StorageError
from gxr_batch.extras import install_command
from gxr_batch.models import demo

pytestmark = pytest.mark.model
ENSURE = "from gxr_batch.models.demo import ensure_demo_model; print(ensure_demo_model())"


def start(cache: Path, code: str = ENSURE) -> subprocess.Popen[str]:
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_killed_conversion_and_two_at_once_give_one_complete_model(tmp_path, demo_model_dir):
    killed = start(tmp_path)
    models = tmp_path / "gxr-batch" / "models"
    deadline = time.monotonic() + 60
    while not list(models.glob("*.partial-*/model.gguf")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(2)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (models / demo.NAME).exists()
    both = [start(tmp_path), start(tmp_path)]
    outputs = [child.communicate(timeout=240) for child in both]
    assert [child.returncode for child in both] == [0, 0], outputs
    assert {out.strip() for out, _ in outputs} == {str(models / demo.NAME)}
    assert sorted(path.name for path in models.iterdir()) == [demo.NAME, f"{demo.NAME}.lock"]
    for name in ("config.json", "generation_config.json"):
        assert (models / demo.NAME / name).read_bytes() == (demo_model_dir / name).read_bytes()
    assert (models / demo.NAME / "model.safetensors").stat().st_size > 500_000_000


def test_the_folder_carries_notice_and_end_ids(demo_model_dir):
    assert "Gemma Terms of Use" in (demo_model_dir / "NOTICE").read_text()
    assert json.loads((demo_model_dir / "generation_config.json").read_text())["eos_token_id"] == [1, 106]
    assert json.loads((demo_model_dir / "gxr-batch.json").read_text())["gguf_sha256"] == demo.GGUF_SHA256


@pytest.mark.parametrize(
    "text", ["a  b", " leading", "trailing ", "tab\tand\n\n\nlines", "é 你好 🫁", "▁x", "1,234.5 mm"]
)
def test_the_tokenizer_decodes_to_the_original_text(gemma_tokenizer, text):
    ids = gemma_tokenizer(text, add_special_tokens=False).input_ids
    assert gemma_tokenizer.decode(ids) == (text if "▁" not in text else text.replace("▁", " "))


def test_control_tokens_are_special_and_have_gemmas_ids(gemma_tokenizer):
    for token, number in {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<start_of_turn>": 105, "<end_of_turn>": 106}.items():
        assert gemma_tokenizer.convert_tokens_to_ids(token) == number
        assert gemma_tokenizer.decode([number], skip_special_tokens=True) == ""


def test_a_package_that_was_tampered_with_is_refused(tmp_path, monkeypatch):
    chunk = tmp_path / "chunk"
    chunk.write_bytes(b"GGUF but not ours")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "_chunks", lambda: [chunk])
    with pytest.raises(ModelUnavailable, match="damaged"):
        demo.ensure_demo_model()
    assert not demo.demo_folder().exists()


def test_a_missing_package_is_named_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(ModelUnavailable, match="needs gguf, which is not installed") as caught:
        demo.ensure_demo_model()
    assert caught.value.next_step == install_command("demo")


def test_a_cache_that_accepts_no_large_file_gives_one_message_and_leaves_nothing_behind(tmp_path):
    code = (
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000_000, 100_000_000))\n"
        "from gxr_batch.errors import StorageError\nfrom gxr_batch.models.demo import ensure_demo_model\n"
        "try:\n    ensure_demo_model()\nexcept StorageError as error:\n    print(error)\n"
    )
    said, _ = start(tmp_path, code).communicate(timeout=60)
    models = tmp_path / "gxr-batch" / "models"
    assert "File too large" in said
    assert str(models) in said
    assert "XDG_CACHE_HOME" in said
    assert [path.name for path in models.iterdir()] == [f"{demo.NAME}.lock"]


def test_a_cache_folder_that_is_a_file_gives_one_message(tmp_path, monkeypatch):
    (tmp_path / "gxr-batch").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(StorageError, match="cannot be prepared in the cache folder"):
        demo.ensure_demo_model()


def test_a_relative_cache_folder_is_ignored_as_xdg_requires(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo.demo_folder() == tmp_path / ".cache" / "gxr-batch" / "models" / demo.NAME


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """The GGUF file in the packages."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    demo._assemble(demo._chunks(), path)
    return path


@pytest.mark.long
def test_the_weights_equal_what_transformers_unpacks_bit_for_bit(gguf, demo_model_dir):
    """Our code has the model's shape as a constant instead of reading it from the file; this test reads it."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    expected = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    ours = AutoModelForCausalLM.from_pretrained(demo_model_dir, dtype=torch.bfloat16)
    theirs = expected.state_dict()
    assert ours.state_dict().keys() == theirs.keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    for key in {*demo._CONFIG, "layer_types", "hidden_activation", "attention_bias"} - {"eos_token_id"}:
        assert getattr(ours.config, key) == getattr(expected.config, key), key
    # 1e-6 is in the file in single precision.
    assert ours.config.rms_norm_eps == pytest.approx(expected.config.rms_norm_eps)


@pytest.mark.long
def test_the_tokenizer_agrees_with_sentencepiece_on_the_files_vocabulary(gguf, gemma_tokenizer, tmp_path):
    import random

    from gguf import GGUFReader
    from sentencepiece import SentencePieceProcessor

    fields = GGUFReader(gguf).fields
    tokens, scores, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type"))
    (tmp_path / "vocabulary.model").write_bytes(sentencepiece_model(tokens, scores, kinds))
    reference = SentencePieceProcessor(model_file=str(tmp_path / "vocabulary.model"))
    sources = [path.read_text() for path in Path(demo.__file__).parent.parent.rglob("*.py")]
    texts = [text.replace("<unused", "<un used") for text in sources]  # names of tokens, which the reference spells out
    texts += [
        "  two  blanks",
        "a" + "\n" * 40 + "b",
        "x\x00y",
        "\r\n",
        "<b>x</b>",
        "<table><tr>",
        "é ﬁ 日本 🩻",
        "</h1>",
    ]
    chance = random.Random(0)
    for _ in range(3000):
        some = (chance.choice(tokens[256:255000]).replace("▁", " ") for _ in range(8))
        texts.append("".join(some))
    for text in texts:
        # Control tokens in a text are matched by the tokenizer and never by sentencepiece; the encoder keeps cells from
        # matching them. Runs of more than 31 blanks are split in other places.
        if "<start_of" in text or "<end_of" in text or "<bos>" in text or " " * 32 in text:
            continue
        assert gemma_tokenizer.encode(text, add_special_tokens=False) == reference.encode(text)


def sentencepiece_model(tokens, scores, kinds):
    """Write a vocabulary in sentencepiece's format: a protocol buffer, by hand, because there is no writer."""

    def varint(number):
        out = b""
        while number > 127:
            out += bytes([number & 127 | 128])
            number >>= 7
        return out + bytes([number])

    def block(field, content):
        return varint(field << 3 | 2) + varint(len(content)) + content

    def number(field, value):
        return varint(field << 3) + varint(value)

    pieces = []
    for place, (token, score, kind) in enumerate(zip(tokens, scores, kinds, strict=True)):
        spelled = "▁" * len(token) if token and not token.strip(" ") else token
        number_of_kind = 2 if place == 3 else kind  # <unk> has a separate kind
        pieces.append(
            block(
                1,
                block(1, spelled.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + number(3, number_of_kind),
            )
        )
    byte_pairs_with_bytes = number(3, 2) + number(35, 1)
    special_ids = number(40, 3) + number(41, 2) + number(42, 1) + number(43, 0)
    special_names = block(45, b"<unk>") + block(46, b"<bos>") + block(47, b"<eos>") + block(48, b"<pad>")
    no_normalisation = block(1, b"identity") + number(3, 0) + number(4, 0) + number(5, 1)
    return b"".join(pieces) + block(2, byte_pairs_with_bytes + special_ids + special_names) + block(3, no_normalisation)
