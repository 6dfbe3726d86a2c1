"""The training itself: a base model wrapped for LoRA, and TRL's trainer driven from a checkpoint or from the beginning.

The loss is about the answers alone. What a stop or a kill could lose is in the trainer's checkpoints, which count once
they are sealed; a stop is heeded after any step. Needs torch and TRL, so it is imported when a training starts.
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

# The vision side of a multimodal checkpoint has linear layers of the same names; texts teach it nothing.
_NOT_TRAINED = re.compile(r".*(vision_tower|multi_modal_projector).*")
# What a token's logits and their gradients take at a time, in bytes for each word of the vocabulary, and how much all
# of a micro-batch may take. The trainer's loss in chunks needs a fraction of that, but computes the logits twice and in
# float32, which on a CPU doubles the time: 9.6 instead of 4.9 core seconds for 2 x 266 tokens of Gemma 3 270M.
_LOGITS_BYTES, _MOST_LOGITS_BYTES = 12, 4 * 2**30
_CHECKPOINTS_KEPT = 2  # the newest may be half written when the power goes


def usable_optimizer(wanted: str, device: torch.device) -> str:
    """Return the optimizer, or adamw_torch where bitsandbytes cannot do a step of the 8-bit one on this device."""
    if wanted != "adamw_8bit":
        return wanted
    try:
        from bitsandbytes.optim.adamw import AdamW

        # Smaller tensors keep 32-bit states.
        weights = torch.nn.Parameter(torch.ones(64, 128, device=device))
        weights.grad = torch.ones_like(weights)
        optimizer: Any = AdamW([weights], lr=0.1, optim_bits=8)  # type: ignore[no-untyped-call]
        optimizer.step()
    except Exception:  # a missing library or kernel shows in many ways
        return "adamw_torch"
    return wanted if bool((weights < 1).all()) else "adamw_torch"


class Training:
    """One model and its trainer."""

    def __init__(self, job: Job, rows: Rows, work: Work, loaded: LoadedModel, tokenizer: Any) -> None:
        """Wrap the loaded model; its adapter starts without effect. Raises JobFileError where LoRA fits no module."""
        self._section, self._work = job.finetune, work
        self.steps = steps_of(job.finetune, len(rows.training))
        with quiet():
            self.optimizer = usable_optimizer(job.finetune.optimizer, loaded.model.device)
        set_seed(job.finetune.seed)  # the adapter's first weights are drawn
        self._trainer = _trainer(job, rows, loaded, tokenizer, self._arguments(job, rows, loaded))
        self.model: Any = self._trainer.model

    @property
    def step(self) -> int:
        """Optimizer steps done so far."""
        return int(self._trainer.state.global_step)

    @property
    def history(self) -> list[dict[str, Any]]:
        """What was logged so far, starts before this one included: steps, losses, learning rates."""
        return list(self._trainer.state.log_history)

    def held_out_loss(self) -> float | None:
        """Return the mean loss over the answers of the held-out rows, None where none are held out."""
        if self._trainer.eval_dataset is None:
            return None
        with self._errors():
            return float(self._trainer.evaluate()["eval_loss"])

    def train(self, checkpoint: tuple[Path, int] | None, stopper: Stopper, show: Show) -> bool:
        """Train from a checkpoint, or from the beginning; return False where `stopper` ended it before the last step.

        Raises StorageError, ModelUnavailable where memory runs out.
        """
        if checkpoint is not None and checkpoint[1] >= self.steps:  # the trainer would do one step more
            set_peft_model_state_dict(self.model, load_peft_weights(str(checkpoint[0]), device="cpu"))
            self._trainer.state = TrainerState.load_from_json(str(checkpoint[0] / "trainer_state.json"))
            return True
        self._trainer.add_callback(Watch(self._work, stopper, show, self.steps))
        with self._errors():
            self._trainer.train(resume_from_checkpoint=str(checkpoint[0]) if checkpoint else None)
        return self.step >= self.steps

    def round(self, dtype: torch.dtype) -> None:
        """Round the adapter to the number format in which it is saved, so that what is evaluated is what is saved."""
        with torch.no_grad():
            for weights in self.model.parameters():
                if weights.requires_grad:
                    weights.copy_(weights.to(dtype))

    @contextmanager
    def ready_to_generate(self) -> Iterator[Any]:
        """Give the model with its cache switched on, as generating needs it."""
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
            completion_only_loss=True,  # the rows' labels say the same
            loss_type=_loss_type(rows, section.batch_size, loaded),
            max_length=None,  # rows that are too long are left out, none is ever cut
            seed=section.seed,
            use_cpu=cpu,
            dataloader_pin_memory=not cpu,
            report_to="none",
            disable_tqdm=True,
        )
        # One card, whatever the trainer sees: spreading a batch over all would only slow an adapter of this size down.
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
        # On processors with AVX512-BF16 the first evaluation would pack the weights for inference, for good, and steps
        # after it would compute wrong gradients without an error.
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
    trainer.processing_class = None  # else every checkpoint holds the tokenizer's tens of megabytes
    return trainer


def _loss_type(rows: Rows, batch_size: int, loaded: LoadedModel) -> str:
    """Return how the trainer computes the loss; the result is the same but for rounding."""
    longest = max(len(row.input_ids) for row in [*rows.training, *rows.held_out])
    size = batch_size * longest * int(loaded.config.vocab_size) * _LOGITS_BYTES
    return "nll" if loaded.placement.device == "cpu" and size <= _MOST_LOGITS_BYTES else "chunked_nll"


def _excluded(model: Any) -> str | None:
    # PEFT warns of a pattern that excludes nothing.
    return _NOT_TRAINED.pattern if any(_NOT_TRAINED.match(name) for name, _ in model.named_modules()) else None


def _dataset(rows: list[TrainingRow]) -> Dataset:
    # Labels made here: the trainer takes them as they are, and would make the same from a mask with a bar on stderr.
    return Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])


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
            TrainingProgress(
                step=state.global_step,
                steps=self._steps,
                loss=self._loss,
                held_out_loss=self._held_out_loss,
                seconds_a_step=seconds,
            )
        )
