"""Small trainings: a tiny model with a small vocabulary, a folder with examples and a job, and how to train in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny import tiny_gemma

from gxr_batch.finetune import Options, finetune
from gxr_batch.job import Job, load_job
from gxr_batch.run.stop import Stopper

FINDINGS = ["a left pleural effusion", "clear lungs", "a right apical pneumothorax", "an enlarged heart"]


def small_model(folder: Path, model: Any = None) -> Path:
    """Save a tiny model, or a Gemma, with a small vocabulary, for fast steps; control tokens are Gemma's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    controls = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<unused{number}>" for number in range(101))]
    controls += ["<start_of_turn>", "<end_of_turn>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    marks = [AddedToken(mark, special=True, normalized=False) for mark in controls]
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=marks, show_progress=False)
    backend.train_from_iterator([*FINDINGS, "You are an expert radiologist. Impression: Seen: user model"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    (model or tiny_gemma()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chat(question: str, answer: str) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "metadata": {"gxr_row_id": "x"}}


def row(findings: str, answer: str, **more: object) -> dict:
    return {"template": "basic", "findings": findings, "answer": answer, **more}


def write(path: Path, *entries: object) -> Path:
    path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), encoding="utf-8")
    return path


def small_job(folder: Path, model: Path) -> None:
    """Write eight examples, two for each finding, and a job that trains on them in three steps."""
    rows = [row(finding, f"Impression: {finding}.") for finding in FINDINGS]
    write(folder / "data.jsonl", *rows, *(chat(f"Show {finding}.", f"Seen: {finding}.") for finding in FINDINGS))
    keys = {
        "data": ["data.jsonl"],
        "max_steps": 3,
        "eval_steps": 1,
        "logging_steps": 1,
        "held_out": 0.2,
        "sample_rows": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
    }
    section = "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
    (folder / "j.toml").write_text(
        f'name = "j"\n[model]\npath = "{model}"\ndtype = "float32"\nmax_seq_length = 128\n'
        f"[sampling]\nmax_new_tokens = 4\n[finetune]\n{section}"
    )


def job(*overrides: str) -> Job:
    return load_job(Path("j.toml"), overrides, table=False)


def train(*overrides: str, stopper: Stopper | None = None, show=lambda progress: None, fresh: bool = False, said=None):
    say = said.append if said is not None else lambda sentence: None
    return finetune(job(*overrides), Options(fresh=fresh), stopper or Stopper(), say, show)


def weights(folder: str = "outputs/j-adapter") -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Stopping:
    """Shows nothing, and requests a stop at a step."""

    def __init__(self, step: int) -> None:
        self.stopper, self._step = Stopper(), step

    def __call__(self, progress) -> None:
        if progress.step >= self._step:
            self.stopper.ask("terminate")
