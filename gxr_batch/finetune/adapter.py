"""Writes the adapter folder: weights, tokenizer, end ids, card, evaluation. It is filled here, not published.

What it says of itself has to survive being copied elsewhere: what it was trained on, with which settings and versions,
how good it is on rows it never saw, and that its texts are AI-generated teaching material.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import GenerationConfig

from gxr_batch.errors import StorageError
from gxr_batch.finetune.evaluation import Sample
from gxr_batch.finetune.model_card import card
from gxr_batch.finetune.workdir import Record
from gxr_batch.models.demo import NOTICE
from gxr_batch.models.library_output import quiet_transformers
from gxr_batch.models.load_weights import LoadedModel
from gxr_batch.records import DISCLAIMER

_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the adapter does on rows that it never saw. Losses are means over answers, None where no row is held out."""

    held_out_rows: int
    loss_before: float | None
    loss_after: float | None
    samples: Sequence[Sample]
    history: Sequence[Mapping[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """Return what evaluation.json holds."""
        curve = [
            {name: entry[name] for name in ("step", "epoch", "loss", "eval_loss", "learning_rate") if name in entry}
            for entry in self.history
            if "loss" in entry or "eval_loss" in entry
        ]
        return {
            "held_out_rows": self.held_out_rows,
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
            "samples": [asdict(sample) for sample in self.samples],
            "curve": curve,
            "ai_generated": True,
            "disclaimer": DISCLAIMER,
        }


class Base(NamedTuple):
    """What an adapter was trained on: the base's name and revision, and its tokenizer as it came."""

    name: str
    revision: str
    tokenizer: Any


def fill(folder: Path, model: Any, base: Base, loaded: LoadedModel) -> None:
    """Write what loads: weights, adapter_config.json, tokenizer, generation_config.json.

    Raises OSError, and StorageError where a library does not say so in its own way.
    """
    dtype: torch.dtype = getattr(torch, loaded.placement.dtype)
    tokenizer = base.tokenizer
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in sorted(state.items())}
    with _disk_errors(folder):
        save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = base.name, base.revision or None
    config.target_modules = sorted(config.target_modules)  # a set has another order in every process
    config.inference_mode = True
    config.save_pretrained(str(folder))
    # safetensors makes files that their owner alone can read, whatever the user's umask says.
    (folder / _WEIGHTS).chmod((folder / "adapter_config.json").stat().st_mode)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": list(loaded.end_ids)}
    with quiet_transformers(), _disk_errors(folder):
        tokenizer.save_pretrained(folder)
        pad = tokenizer.pad_token_id
        GenerationConfig(**ids, pad_token_id=pad).save_pretrained(folder)  # type: ignore[no-untyped-call]


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn what safetensors and tokenizers raise where a disk takes no more into a StorageError: it is no OSError."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, SafetensorError) and type(error) is not Exception:  # tokenizers raises the bare class
            raise
        raise StorageError(
            "The adapter cannot be saved: the disk is full, or refuses to be written.",
            where=str(folder.absolute()),
            next_step="make room or mend the disk, then run the same command again: no step is trained anew",
        ) from None


def describe(folder: Path, record: Record, evaluation: Evaluation, *, of_gemma: bool) -> None:
    """Write what is read by people: README.md, evaluation.json, finetune.json, and Gemma's notice. Raises OSError."""
    _write(folder / "evaluation.json", json.dumps(evaluation.as_dict(), indent=2, ensure_ascii=False) + "\n")
    _write(folder / "README.md", card(record, evaluation.as_dict(), of_gemma=of_gemma))
    if of_gemma:
        _write(folder / "NOTICE", f"{NOTICE}\n\nA LoRA adapter for a Gemma model, made by gxr-batch finetune.\n")
    record.save(folder)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
