"""TRL's trainer as a resumable command needs it: sealed checkpoints, a stop after any step, and no chatter."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.sft_trainer import SFTTrainer

from gxr_batch.errors import StorageError
from gxr_batch.finetune.training_output import Show, Standing
from gxr_batch.finetune.workdir import Work
from gxr_batch.run.stop import Stopper


class Trainer(SFTTrainer):
    """Evaluates without a trace, writes no model card of its own, and says of a full disk that it is one."""

    def create_model_card(self, *args: Any, **extra: Any) -> None:
        """Leave it to the end: a card for every checkpoint helps nobody."""

    def evaluate(self, *args: Any, **extra: Any) -> dict[str, float]:
        """Evaluate without touching the random numbers of the training: how often one looks must not change it."""
        with torch.random.fork_rng():
            return super().evaluate(*args, **extra)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[no-untyped-call]
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError for a full disk
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise StorageError(
                f"A checkpoint cannot be saved: {reason}.",
                where=str(Path(str(self.args.output_dir)).absolute()),
                next_step="make room or mend the disk, then run the same command again: it goes on from the one before",
            ) from None


class Watch(TrainerCallback):
    """Shows how far it is, seals checkpoints, and ends the training after the step in which a stop is asked for."""

    def __init__(self, work: Work, stopper: Stopper, show: Show, steps: int) -> None:
        self._work, self._stopper, self._show, self._steps = work, stopper, show, steps
        self._loss: float | None = None
        self._held_out_loss: float | None = None
        self._began: tuple[float, int] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """From here on a signal asks for an orderly end."""
        self._began = time.monotonic(), state.global_step
        self._tell(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Heed a request to stop."""
        self._tell(state)
        if self._stopper.reason is not None:
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False  # it may take longer than the grace that a signal leaves

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **extra: Any) -> None:
        """Remember the newest losses."""
        logs: dict[str, float] = extra.get("logs") or {}
        self._loss = logs.get("loss", self._loss)
        self._held_out_loss = logs.get("eval_loss", self._held_out_loss)
        self._tell(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Seal what was saved."""
        self._work.seal(self._work.checkpoints / f"checkpoint-{state.global_step}")

    def _tell(self, state: TrainerState) -> None:
        seconds = None
        if self._began is not None and (done := state.global_step - self._began[1]):
            seconds = (time.monotonic() - self._began[0]) / done
        self._show(
            Standing(
                step=state.global_step,
                steps=self._steps,
                loss=self._loss,
                held_out_loss=self._held_out_loss,
                seconds_a_step=seconds,
            )
        )
