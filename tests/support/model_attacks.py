"""Model and adapter folders that are broken or hostile in one way each, and what `check` and `run` must say.

`ATTACKS` maps a name to the folder that is broken ("path" or "adapter"), the function that breaks it, and a part of the
one message, with exit code 4.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Break = Callable[[Path], object]
MANY = 3 * "{% for number in range(99999) %}" + 3 * "{% endfor %}"
GROW = "{% set all = namespace(x='long') %}{% for one in range(40) %}{% set all.x = all.x ~ all.x %}{% endfor %}"


def edit(name: str, **values: Any) -> Break:
    def apply(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(document | values))

    return apply


def model(**values: Any) -> Break:
    """Change keys of the tokenizer's model."""

    def apply(folder: Path) -> None:
        document = json.loads((folder / "tokenizer.json").read_text())
        document["model"] |= values
        (folder / "tokenizer.json").write_text(json.dumps(document))

    return apply


def write(name: str, content: str | bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def instead(name: str, make: Callable[[Path], object]) -> Break:
    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return apply


def cast(name: str, dtype: str) -> Break:
    """Store tensors in another number format."""

    def apply(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        save_file(
            {key: each.to(getattr(torch, dtype)) for key, each in load_file(folder / name).items()}, folder / name
        )

    return apply


def four_bits(folder: Path) -> None:
    """Declare a tensor as FP4, which packs two numbers into a byte."""
    path = folder / "adapter_model.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")
    header[name] |= {"shape": [*header[name]["shape"][:-1], header[name]["shape"][-1] * 8], "dtype": "F4"}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def doubled(times: int) -> Break:
    one = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    return edit("tokenizer.json", normalizer={"type": "Sequence", "normalizers": [one] * times})


PADDING = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
WORDPIECE = {
    "type": "WordPiece",
    "unk_token": "[UNK]",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 9,
}
CONFIG, INDEX, SETTINGS = "config.json", "model.safetensors.index.json", "adapter_config.json"
CHAT, GENERATION = "chat_template.jinja", "generation_config.json"
CRASH = "ends the process, never ends, or takes too much memory with this file"
ENDLESS = "The chat template never ends, or takes too much memory"
FAILS = "chat template fails"
ATTACKS: dict[str, tuple[str, Break, str]] = {
    "exploding normalizer": ("path", doubled(40), CRASH),
    "growing normalizer": ("path", doubled(12), "far too many tokens"),
    "padding of a billion": ("path", edit("tokenizer.json", padding=PADDING | {"strategy": {"Fixed": 10**9}}), CRASH),
    "truncation with a long stride": (
        "path",
        edit(
            "tokenizer.json",
            truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 5},
        ),
        CRASH,
    ),
    "id beyond 32 bits": ("path", model(vocab={"a": 2**32 + 5}), "tokenizer cannot be loaded"),
    "no unknown token": ("path", edit("tokenizer.json", model=WORDPIECE | {"vocab": {"a": 0}}), "cannot encode text"),
    "endless template": ("path", write(CHAT, MANY), ENDLESS),
    "template with a power": ("path", write(CHAT, "{{ 10 ** (10 ** 9) }}"), ENDLESS),
    "template with a long text": ("path", write(CHAT, "{{ 'x' * 10 ** 11 }}"), ENDLESS),
    "doubling template": ("path", write(CHAT, GROW + "{{ all.x }}"), ENDLESS),
    "raising template": ("path", write(CHAT, "{{ raise_exception('no') }}"), FAILS),
    "template that does not compile": ("path", write(CHAT, "{% for %}"), FAILS),
    "deep template": ("path", write(CHAT, "{{ " + 3000 * "(" + "1" + 3000 * ")" + " }}"), FAILS),
    "recursive template": ("path", write(CHAT, "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"), FAILS),
    "template that is no UTF-8": ("path", write(CHAT, b"\xff\xfe{{ messages }}"), "not UTF-8 at byte 0"),
    "pipe": ("path", instead(GENERATION, os.mkfifo), "it is a pipe, not a plain file"),
    "pipe as tokenizer": ("path", instead("tokenizer.json", os.mkfifo), "it is a pipe, not a plain file"),
    "endless device": (
        "path",
        instead("special_tokens_map.json", lambda to: to.symlink_to("/dev/zero")),
        "it is a device, not a plain file",
    ),
    "folder as file": ("path", instead(GENERATION, Path.mkdir), "is a directory"),
    "large file": ("path", instead(GENERATION, lambda to: (to.touch(), os.truncate(to, 2**31))), "larger than 16 MiB"),
    "4,000 layers": ("path", edit(CONFIG, num_hidden_layers=4000, layer_types=None), "config.json: num_hidden_layers"),
    "16 million tokens": ("path", edit(CONFIG, vocab_size=2**24), "embed_tokens.weight is 320 x 64, not 16777216 x 64"),
    "wide layers": ("path", edit(CONFIG, intermediate_size=2**20), "do not fit config.json"),
    "a billion layers": ("path", edit(CONFIG, num_hidden_layers=10**9), "num_hidden_layers = 1000000000"),
    "a model of another kind": ("path", edit(CONFIG, model_type="whisper"), "(ValueError)"),
    "a field of another type": ("path", edit(CONFIG, attention_dropout=["x"]), "config.json: attention_dropout"),
    "a special token of another type": ("path", edit("tokenizer_config.json", bos_token=[1]), "config.json: bos_token"),
    "end id of another type": ("path", edit(GENERATION, eos_token_id="x"), "generation_config.json: eos_token_id"),
    "index that is a list": ("path", write(INDEX, "[1]"), "it holds no JSON object"),
    "index out of the folder": ("path", edit(INDEX, weight_map={"a": "../x.safetensors"}), "index.json: weight_map"),
    "deep configuration": ("path", edit(CONFIG, odd=json.loads(200 * "[" + 200 * "]")), "nested too deeply"),
    "rank 0.5": ("adapter", edit(SETTINGS, r=0.5), "adapter's r is not"),
    "infinite alpha": ("adapter", edit(SETTINGS, lora_alpha=float("inf")), "lora_alpha is not"),
    "flags in a pattern": ("adapter", edit(SETTINGS, rank_pattern={"(?i)q_proj": 4}), "rank_pattern is not in"),
    "endless pattern": ("adapter", edit(SETTINGS, target_modules="(.+)+x"), "target_modules takes too long"),
    "pattern with many repeats": ("adapter", edit(SETTINGS, rank_pattern={24 * ".*" + "x": 4}), "takes too long"),
    "pattern of 5 MB": ("adapter", edit(SETTINGS, target_modules=10**6 * "(a|b)"), "target_modules is not in"),
    "row of a huge token": (
        "adapter",
        edit(SETTINGS, trainable_token_indices=[2**31]),
        "trainable_token_indices is not",
    ),
    "FP8": ("adapter", cast("adapter_model.safetensors", "float8_e4m3fn"), "float8_e4m3fn"),
    "FP4": ("adapter", four_bits, "float4_e2m1fn_x2"),
    "adapter's template that is no UTF-8": ("adapter", write(CHAT, b"\xff"), "not UTF-8"),
    "adapter's endless template": ("adapter", write(CHAT, MANY), ENDLESS),
    "adapter's tokenizer that is a list": ("adapter", write("tokenizer.json", "[1]"), "tokenizer cannot be loaded"),
}
