"""Trains: wraps the base model for LoRA and runs TRL's trainer, from a checkpoint or from the beginning.

The loss is over the answers only. Progress is in the trainer's checkpoints, which are valid once they are sealed; a
stop takes effect after the current step. Imported only when a training starts, because it needs torch and TRL.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, prepare_model_for_kbit_training
from peft.utils import load_peft_weights, set_peft_model_state_dict
from peft.utils.error import NoMatchingPeftModuleError
from safetensors import SafetensorError
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from gxr_batch.errors import JobFileError, ModelUnavailable, StorageError
from gxr_batch.finetune.examples import Rows, TrainingRow, steps_of
from gxr_batch.finetune.training_output import Show, TrainingProgress, quiet
from gxr_batch.finetune.workdir import Work
from gxr_batch.job import Job
from gxr_batch.models.device_memory import no_memory_is
from gxr_batch.models.load_weights import LoadedModel
from gxr_batch.run.stop import Stopper

# The vision part of a multimodal checkpoint has linear layers of the same names, which texts cannot train.
_NOT_TRAINED = re.compile(r".*(vision_tower|multi_modal_projector).*")
# Peak memory of a token's logits and their gradients, in bytes per vocabulary entry, and the limit for a micro-batch.
# The trainer's chunked loss needs a fraction of that, but computes the logits twice and in float32, which doubles the
# time on a CPU: 9.6 instead of 4.9 core seconds for 2 x 266 tokens of Gemma 3 270M.
_LOGITS_BYTES, _MOST_LOGITS_BYTES = 12, 4 * 2**30
_CHECKPOINTS_KEPT = 2  # the newest may be incomplete after a power failure


def usable_optimizer(wanted: str, device: torch.device) -> str:
    """Return the optimizer, or adamw_torch if the 8-bit one of bitsandbytes cannot do a step on this device."""
    if wanted != "adamw_8bit":
        return wanted
    try:
        from bitsandbytes.optim.adamw import AdamW

        # Smaller tensors would keep 32-bit states.
        weights = torch.nn.Parameter(torch.ones(64, 128, device=device))
        weights.grad = torch.ones_like(weights)
        optimizer: Any = AdamW([weights], lr=0.1, optim_bits=8)  # type: ignore[no-untyped-call]
        optimizer.step()
    except Exception:  # missing libraries and kernels raise many kinds of errors
        return "adamw_torch"
    return wanted if bool((weights < 1).all()) else "adamw_torch"


class Training:
    """One model and its trainer."""

    def __init__(self, job: Job, rows: Rows, work: Work, loaded: LoadedModel, tokenizer: Any) -> None:
        """Add an adapter without effect to the loaded model. Raises JobFileError if LoRA matches no module."""
        self._section, self._work = job.finetune, work
        self.steps = steps_of(job.finetune, len(rows.training))
        with quiet():
            self.optimizer = usable_optimizer(job.finetune.optimizer, loaded.model.device)
        set_seed(job.finetune.seed)  # for the adapter's initial weights
        self._trainer = _trainer(job, rows, loaded, tokenizer, self._arguments(job, rows, loaded))
        self.model: Any = self._trainer.model

    @property
    def step(self) -> int:
        """The number of optimizer steps done."""
        return int(self._trainer.state.global_step)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The log so far, including earlier invocations: steps, losses, learning rates."""
        return list(self._trainer.state.log_history)

    def held_out_loss(self) -> float | None:
        """Return the mean loss over the answers of the held-out rows, or None if no row is held out."""
        if self._trainer.eval_dataset is None:
            return None
        with self._errors():
            return float(self._trainer.evaluate()["eval_loss"])

    def train(self, checkpoint: tuple[Path, int] | None, stopper: Stopper, show: Show) -> bool:
        """Train from a checkpoint or from the beginning; return False if `stopper` ended it before the last step.

        Raises StorageError, and ModelUnavailable if memory runs out.
        """
        if checkpoint is not None and checkpoint[1] >= self.steps:  # the trainer would do one more step
            set_peft_model_state_dict(self.model, load_peft_weights(str(checkpoint[0]), device="cpu"))
            self._trainer.state = TrainerState.load_from_json(str(checkpoint[0] / "trainer_state.json"))
            return True
        self._trainer.add_callback(Watch(self._work, stopper, show, self.steps))
        with self._errors():
            self._trainer.train(resume_from_checkpoint=str(checkpoint[0]) if checkpoint else None)
        return self.step >= self.steps

    def round(self, dtype: torch.dtype) -> None:
        """Round the adapter to the number format in which it is saved, so that the saved weights are evaluated."""
        with torch.no_grad():
            for weights in self.model.parameters():
                if weights.requires_grad:
                    weights.copy_(weights.to(dtype))

    @contextmanager
    def ready_to_generate(self) -> Iterator[Any]:
        """Yield the model with its cache enabled, for generation."""
        self.model.eval()
        self.model.config.use_cache = True
        try:
            yield self.model
        finally:
            self.model.config.use_cache = False

    def _arguments(self, job: Job, rows: Rows, loaded: LoadedModel) -> SFTConfig:
        section = job.finetune
        cpu = loaded.placement.device == "cpu"
        arguments = SFTConfig(
            output_dir=str(self._work.checkpoints),
            per_device_train_batch_size=section.batch_size,
            per_device_eval_batch_size=section.batch_size,
            gradient_accumulation_steps=section.gradient_accumulation_steps,
            max_steps=self.steps,
            learning_rate=section.learning_rate,
            optim=self.optimizer,
            weight_decay=section.weight_decay,
            lr_scheduler_type=section.lr_scheduler,
            warmup_steps=section.warmup_steps,
            fp16=False,
            bf16=loaded.placement.dtype == "bfloat16",
            activation_checkpointing=section.gradient_checkpointing,
            logging_steps=section.logging_steps,
            eval_strategy="steps" if rows.held_out else "no",
            eval_steps=section.eval_steps,
            save_strategy="steps",
            save_steps=section.eval_steps,
            save_total_limit=_CHECKPOINTS_KEPT,
            completion_only_loss=True,  # as the labels of the rows do
            loss_type=_loss_type(rows, section.batch_size, loaded),
            max_length=None,  # rows that are too long are left out, never cut
            seed=section.seed,
            use_cpu=cpu,
            dataloader_pin_memory=not cpu,
            report_to="none",
            disable_tqdm=True,
        )
        # One GPU, however many there are: splitting a batch over all of them would be slower for a small adapter.
        arguments._n_gpu = min(1, arguments.n_gpu)
        return arguments

    @contextmanager
    def _errors(self) -> Iterator[None]:
        refusal = ModelUnavailable(
            "The device has no memory left for a training step.",
            where="finetune.batch_size, finetune.gradient_checkpointing",
            next_step="set batch_size = 1 with gradient_accumulation_steps = 8, or gradient_checkpointing = "
            "true, or model.load_in_4bit = true, and add --fresh",
        )
        with quiet(), no_memory_is(refusal):
            yield


def _trainer(job: Job, rows: Rows, loaded: LoadedModel, tokenizer: Any, arguments: SFTConfig) -> Trainer:
    section = job.finetune
    model: Any = loaded.model
    if loaded.placement.four_bit:
        prepare: Any = prepare_model_for_kbit_training  # untyped
        model = prepare(model, use_gradient_checkpointing=section.gradient_checkpointing)
        # On CPUs with AVX-512 BF16, the first evaluation would permanently pack the weights for inference, and later
        # steps would silently compute wrong gradients.
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    try:
        with quiet():
            trainer = Trainer(
                model=model,
                args=arguments,
                train_dataset=_dataset(rows.training),
                eval_dataset=_dataset(rows.held_out) if rows.held_out else None,
                processing_class=tokenizer,
                peft_config=LoraConfig(
                    r=section.lora_r,
                    lora_alpha=section.lora_alpha,
                    lora_dropout=section.lora_dropout,
                    target_modules=list(section.lora_targets),
                    exclude_modules=_excluded(model),
                    bias="none",
                    task_type="CAUSAL_LM",
                ),
            )
    except NoMatchingPeftModuleError:
        raise JobFileError(
            "No module of the model has one of these names.",
            where=f"finetune.lora_targets = {', '.join(section.lora_targets)}",
            next_step="leave finetune.lora_targets out, or name linear layers of this model",
        ) from None
    trainer.remove_callback(PrinterCallback)  # it prints to stdout
    trainer.processing_class = None  # otherwise each checkpoint has a copy of the tokenizer, tens of megabytes
    return trainer


def _loss_type(rows: Rows, batch_size: int, loaded: LoadedModel) -> str:
    """Return how the trainer computes the loss; the result is the same except for rounding."""
    longest = max(len(row.input_ids) for row in [*rows.training, *rows.held_out])
    size = batch_size * longest * int(loaded.config.vocab_size) * _LOGITS_BYTES
    return "nll" if loaded.placement.device == "cpu" and size <= _MOST_LOGITS_BYTES else "chunked_nll"


def _excluded(model: Any) -> str | None:
    # PEFT warns about a pattern that excludes nothing.
    return _NOT_TRAINED.pattern if any(_NOT_TRAINED.match(name) for name, _ in model.named_modules()) else None


def _dataset(rows: list[TrainingRow]) -> Dataset:
    # With ready-made labels, the trainer shows no progress bar on stderr, as it does when it makes them from a mask.
    return Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])


class Trainer(SFTTrainer):
    """A trainer whose evaluations have no side effects, that writes no model cards, and that reports a full disk."""

    def create_model_card(self, *args: Any, **extra: Any) -> None:
        """Write nothing: checkpoints need no model card."""

    def evaluate(self, *args: Any, **extra: Any) -> dict[str, float]:
        """Evaluate without changing the random state of the training, so that eval_steps does not affect it."""
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
                next_step="free disk space or fix the disk, then run the same command again to resume",
            ) from None


class Watch(TrainerCallback):
    """Shows progress, seals checkpoints, and ends the training after the step in which a stop is requested."""

    def __init__(self, work: Work, stopper: Stopper, show: Show, steps: int) -> None:
        self._work, self._stopper, self._show, self._steps = work, stopper, show, steps
        self._loss: float | None = None
        self._held_out_loss: float | None = None
        self._began: tuple[float, int] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock and show the first progress."""
        self._began = time.monotonic(), state.global_step
        self._update(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Show progress, and stop if requested."""
        self._update(state)
        if self._stopper.reason is not None:
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False  # it may take longer than run.grace_seconds

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **extra: Any) -> None:
        """Remember the newest losses."""
        logs: dict[str, float] = extra.get("logs") or {}
        self._loss = logs.get("loss", self._loss)
        self._held_out_loss = logs.get("eval_loss", self._held_out_loss)
        self._update(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Seal the checkpoint."""
        self._work.seal(self._work.checkpoints / f"checkpoint-{state.global_step}")

    def _update(self, state: TrainerState) -> None:
        seconds = None
        if self._began is not None and (done := state.global_step - self._began[1]):
            seconds = (time.monotonic() - self._began[0]) / done
        self._show(
            TrainingProgress(
                step=state.global_step,
                steps=self._steps,
                loss=self._loss,
                held_out_loss=self._held_out_loss,
                seconds_a_step=seconds,
            )
        )
