"""LoRA fine-tuning on reviewed rows or examples. The result is an adapter folder for `model.adapter`.

Prompts are rendered and encoded with the functions of `run`. Heavy imports happen when the training starts.
"""

from gxr_batch.finetune.training_output import TrainingProgress
from gxr_batch.finetune.training_run import Options, Outcome, finetune

__all__ = ["Options", "Outcome", "TrainingProgress", "finetune"]
