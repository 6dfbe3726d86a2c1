"""Writes an adapter's model card (README.md): use, training data, evaluation, settings, licence.

It quotes no row. Its last section lists what the folder discloses about its author and the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gxr_batch.finetune.workdir import Record
from gxr_batch.models.demo import DEMO, NOTICE
from gxr_batch.models.source import id_and_commit
from gxr_batch.records import DISCLAIMER

# The hub id of the demo model, for use with plain PEFT.
_DEMO_ON_THE_HUB = "google/gemma-3-270m"
_SETTINGS = (
    "batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler",
    "warmup_steps",
    "weight_decay",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_targets",
    "seed",
)


def model_card(record: Record, evaluation: Mapping[str, Any], *, of_gemma: bool) -> str:
    """Return README.md: what the adapter is, its training data, its evaluation, and what it must not be used for."""
    model = record.job["model"]["path"]
    base = _DEMO_ON_THE_HUB if model == DEMO else id_and_commit(str(model))[0]
    parts = [
        _front_matter(base, of_gemma=of_gemma),
        f"# {record.name}\n\nA LoRA adapter for `{base}` that turns chest X-ray findings into teaching texts. "
        "Made with `gxr-batch finetune`.",
        f"**Research and education only, never for clinical use.** {DISCLAIMER} It was trained on texts only, without "
        "images.",
        _use(model, base),
        _data(record),
        _evaluation(evaluation),
        _settings(record),
        _before_publishing(evaluation),
    ]
    if of_gemma:
        parts.append(f"## Licence\n\n{NOTICE}.")
    return "\n\n".join(parts) + "\n"


def _front_matter(base: str, *, of_gemma: bool) -> str:
    lines = ["library_name: peft", f"base_model: {base}", "pipeline_tag: text-generation", "tags:", "- lora"]
    lines += ["- education", "- ai-generated-text"]
    return "\n".join(["---", *lines, *(["license: gemma"] if of_gemma else []), "---"])


def _use(model: str, base: str) -> str:
    demo = f"\n\nadapter_config.json calls the base `demo`: it is `{base}`, the name to use with plain PEFT."
    return (
        "## Use\n\n```toml\n[model]\n"
        f'path = "{model}"\nadapter = "path/of/this/folder"\n```\n\n'
        "The templates of gxr-batch lay out prompts as in training. If the base is a Gemma, an answer ends with token "
        f"106 (`<end_of_turn>`).{demo if model == DEMO else ''}"
    )


def _data(record: Record) -> str:
    data = record.data
    lines = [
        "## Training data",
        "",
        f"{data['training_rows']:,} rows for training, {data['held_out_rows']:,} held out"
        + (f", {data['too_long_rows']:,} left out as too long" if data["too_long_rows"] else "")
        + f". sha256 of all tokens: `{data['sha256']}`.",
        "",
        "| File | Rows | sha256 |",
        "|---|---|---|",
    ]
    lines += [f"| {file['name']} | {file['rows']:,} | `{file['sha256']}` |" for file in data["files"]]
    return "\n".join(lines)


def _evaluation(evaluation: Mapping[str, Any]) -> str:
    if evaluation["loss_after"] is None:
        return "## Evaluation\n\nNo row was held out, so the adapter was not evaluated on unseen rows."
    samples = evaluation["samples"]
    lines = [
        "## Evaluation",
        "",
        f"On {evaluation['held_out_rows']:,} held-out rows, loss over the answers only:",
        "",
        "| | Base | With this adapter |",
        "|---|---|---|",
        f"| Held-out loss | {evaluation['loss_before']:.4f} | {evaluation['loss_after']:.4f} |",
    ]
    if samples:
        ended = [sum(one[kind]["finish_reason"] == "stop" for one in samples) for kind in ("base", "adapter")]
        lines.append(
            f"| Sample answers that ended with an end token | {ended[0]} of {len(samples)} "
            f"| {ended[1]} of {len(samples)} |"
        )
        lines += ["", "evaluation.json has the sample answers of both, and the losses during the training."]
    return "\n".join(lines)


def _settings(record: Record) -> str:
    section, last = record.job["finetune"], record.starts[-1]
    chosen = {name: section[name] for name in _SETTINGS} | {
        "optimizer": last["optimizer"],
        "steps": last["steps"],
        "number format": last["dtype"] + (" over 4-bit weights" if last["four_bit"] else ""),
        "max_seq_length": record.job["model"]["max_seq_length"],
        "base weights sha256": record.fingerprint["model weights"],
    }
    lines = ["## Settings", "", "| Setting | Value |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in chosen.items()]
    packages = ", ".join(f"{name} {version}" for name, version in last["packages"].items())
    return "\n".join([*lines, "", f"Trained on {last['device']} with Python {last['python']}, {packages}."])


def _before_publishing(evaluation: Mapping[str, Any]) -> str:
    """Return the section about what the folder discloses, besides the weights."""
    count = len(evaluation["samples"])
    rows = f"{count} held-out row{'' if count == 1 else 's'}"
    quotes = f" `evaluation.json` quotes {rows} word for word, prompts and answers." if count else ""
    return (
        "## Before you publish this folder\n\n"
        "`finetune.json` holds the paths of data and templates, and the system text. If the base model is a folder, "
        f"its path is there, in `adapter_config.json` and in this model card.{quotes} The adapter loads without "
        "`finetune.json` and `evaluation.json`: remove private content from them, or delete them. A model may also "
        "reproduce its training data."
    )


def _cell(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
