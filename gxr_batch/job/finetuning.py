"""The [finetune] section: what is learnt from, and how. Defaults are the guide's SFTConfig."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from gxr_batch.job.base import MOST, FilePath, Section

DEFAULT_STEPS = 50
# Every linear layer of a Gemma block, attention and MLP.
_ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FinetuneSection(Section):
    """The keys of `gxr-batch finetune`.

    `max_steps` and `epochs` both say how long to train and exclude each other; without either it is 50 steps.
    """

    data: tuple[FilePath, ...] = ()
    held_out: float = Field(default=0.1, ge=0, lt=1, allow_inf_nan=False)
    output: FilePath = Field(default="outputs/{name}-adapter", min_length=1)
    batch_size: int = Field(default=2, ge=1, le=MOST)
    gradient_accumulation_steps: int = Field(default=4, ge=1, le=MOST)
    max_steps: int | None = Field(default=None, ge=1, le=MOST)
    epochs: float | None = Field(default=None, gt=0, le=MOST, allow_inf_nan=False)
    learning_rate: float = Field(default=2e-4, gt=0, le=1, allow_inf_nan=False)
    optimizer: Literal["adamw_8bit", "adamw_torch"] = "adamw_8bit"
    weight_decay: float = Field(default=0.01, ge=0, le=1, allow_inf_nan=False)
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: int = Field(default=5, ge=0, le=MOST)
    logging_steps: int = Field(default=5, ge=1, le=MOST)
    eval_steps: int = Field(default=10, ge=1, le=MOST)
    gradient_checkpointing: bool = False
    lora_r: int = Field(default=16, ge=1, le=4096)
    lora_alpha: int = Field(default=32, ge=1, le=MOST)
    lora_dropout: float = Field(default=0, ge=0, lt=1, allow_inf_nan=False)
    lora_targets: tuple[str, ...] = Field(default=_ALL_LINEAR, min_length=1)
    sample_rows: int = Field(default=4, ge=0, le=100)
    seed: int = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _one_length(self) -> FinetuneSection:
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError("max_steps and epochs both say how long to train: set one of them")
        return self

    @field_validator("output")
    @classmethod
    def _known_placeholder(cls, value: str) -> str:
        unknown = set(re.findall(r"\{([^}]*)\}", value)) - {"name"}
        if unknown:
            raise ValueError(f"knows the placeholder {{name}}, not {{{sorted(unknown)[0]}}}")
        return value

    @property
    def steps(self) -> int | None:
        """Optimizer steps, None where epochs decide."""
        return None if self.epochs is not None else self.max_steps or DEFAULT_STEPS
