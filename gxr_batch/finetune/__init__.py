"""LoRA fine-tuning on reviewed rows or on examples; its result is an adapter folder that `model.adapter` takes.

Prompts are rendered and encoded by what `run` uses. Heavy imports happen when the training starts.
"""

from gxr_batch.finetune.training_output import TrainingProgress
from gxr_batch.finetune.training_run import Options, Outcome, finetune

__all__ = ["Options", "Outcome", "TrainingProgress", "finetune"]
