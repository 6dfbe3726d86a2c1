"""The embedded demo model: converted once, whole or not at all, by whoever comes first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gxr_batch.errors import ModelUnavailable
from gxr_batch.models import demo

pytestmark = pytest.mark.model
ENSURE = "from gxr_batch.models.demo import ensure_demo_model; print(ensure_demo_model())"


def start(cache: Path, code: str = ENSURE) -> subprocess.Popen[str]:
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_killed_conversion_and_two_at_once_end_in_one_whole_model(tmp_path, demo_model_dir):
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
def test_the_tokenizer_gives_text_back_as_it_was(gemma_tokenizer, text):
    ids = gemma_tokenizer(text, add_special_tokens=False).input_ids
    assert gemma_tokenizer.decode(ids) == (text if "▁" not in text else text.replace("▁", " "))


def test_control_tokens_are_special_and_stand_where_gemma_has_them(gemma_tokenizer):
    for token, number in {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<start_of_turn>": 105, "<end_of_turn>": 106}.items():
        assert gemma_tokenizer.convert_tokens_to_ids(token) == number
        assert gemma_tokenizer.decode([number], skip_special_tokens=True) == ""


def test_a_package_that_was_tampered_with_is_refused(tmp_path, monkeypatch):
    chunk = tmp_path / "chunk"
    chunk.write_bytes(b"GGUF but not ours")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "_chunks", lambda: [chunk])
    with pytest.raises(ModelUnavailable, match="damaged"):
        demo.ensure_demo_model(progress=False)
    assert not demo.demo_folder().exists()


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(ModelUnavailable, match=r"pip install 'gxr-batch\[demo\]'"):
        demo.ensure_demo_model(progress=False)
