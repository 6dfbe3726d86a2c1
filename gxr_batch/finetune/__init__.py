"""LoRA fine-tuning on reviewed rows or on examples; its result is an adapter folder that `model.adapter` takes.

Prompts are rendered and encoded by what `run` uses. Heavy imports happen when the training starts.
"""

from gxr_batch.finetune.flow import Options, Outcome, finetune
from gxr_batch.finetune.standing import Standing

__all__ = ["Options", "Outcome", "Standing", "finetune"]
