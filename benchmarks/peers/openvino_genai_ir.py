"""OpenVINO GenAI in bfloat16: continuous batching of 32 sequences; converts the model on first use."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OPENVINO_TELEMETRY": "0", "DO_NOT_TRACK": "1"}

from common import (
    REPETITION_PENALTY,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    WARM_UP_TOKENS,
    check_lengths,
    read_task,
    report,
    timed,
)


def converted(model: Path, *, int8: bool) -> Path:
    """Return the folder of the converted model, converting it if needed; `int8`: with 8-bit weights."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gxr-batch" / "peers"
    folder = cache / "openvino-models" / (model.name + "-int8" * int8)
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        _convert(_for_transformers_4(model, partial / "source"), partial / "made", int8=int8)
        (partial / "made").rename(folder)
        shutil.rmtree(partial)
    return folder


def _for_transformers_4(model: Path, folder: Path) -> Path:
    """Write the model's folder for transformers 4, with its keys for RoPE and for the number format."""
    folder.mkdir(parents=True)
    for file in model.iterdir():
        if file.is_file() and file.name not in {"config.json", "tokenizer_config.json"}:
            (folder / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype", "bfloat16")
    rope = config.pop("rope_parameters", None) or {}
    if "full_attention" in rope:
        config["rope_theta"] = rope["full_attention"]["rope_theta"]
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    elif "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer.pop("extra_special_tokens", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def _convert(source: Path, target: Path, *, int8: bool) -> None:
    from openvino import save_model
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoTokenizer

    model = OVModelForCausalLM.from_pretrained(source, export=True, compile=False, load_in_8bit=int8)
    model.save_pretrained(target)
    reader, writer = convert_tokenizer(AutoTokenizer.from_pretrained(source), with_detokenizer=True)
    save_model(reader, target / "openvino_tokenizer.xml")
    save_model(writer, target / "openvino_detokenizer.xml")


def _pipeline(folder: Path, options: argparse.Namespace) -> Any:
    from openvino_genai import ContinuousBatchingPipeline, SchedulerConfig

    scheduler = SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs = 4, options.sequences
    scheduler.max_num_batched_tokens, scheduler.enable_prefix_caching = options.tokens, options.prefix
    properties = {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"}
    return ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties)


def _settings(length: int, seed: int) -> Any:
    from openvino_genai import GenerationConfig

    return GenerationConfig(
        max_new_tokens=length,
        ignore_eos=True,
        do_sample=True,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        top_k=TOP_K,
        repetition_penalty=REPETITION_PENALTY,
        rng_seed=seed,
    )


def run(pipeline: Any, prompts: list[list[int]], lengths: list[int], seeds: list[int]) -> list[int]:
    """Return the number of new tokens of each prompt."""
    import numpy as np
    from openvino import Tensor

    ids = [Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
    made = pipeline.generate(ids, [_settings(*each) for each in zip(lengths, seeds, strict=True)])
    return [len(one.m_generation_ids[0]) for one in made]


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048, help="most tokens in a batch")
    parser.add_argument("--prefix", action="store_true", help="with its prefix cache")
    parser.add_argument("--int8", action="store_true", help="8-bit weights")


def main() -> None:
    """Run it."""
    task, options = read_task(__doc__, _options)
    pipeline = _pipeline(converted(task.model, int8=options.int8), options)
    warm_up = task.warm_up()
    run(pipeline, warm_up, [WARM_UP_TOKENS] * len(warm_up), task.seeds[: len(warm_up)])
    with timed() as clock:
        found = run(pipeline, task.ids, task.lengths, task.seeds)
    check_lengths(found, task.lengths)
    weights = "int8 weights" if options.int8 else "bfloat16"
    prefix = ", prefix cache" if options.prefix else ""
    report(
        task.tokens, clock.seconds, f"{weights}, {options.sequences} sequences, {options.tokens} tokens a batch{prefix}"
    )


if __name__ == "__main__":
    sys.exit(main())
