"""Trains: wraps the base model for LoRA and runs TRL's trainer, from a checkpoint or from the beginning.

The loss is over the answers only. Progress is in the trainer's checkpoints, which are valid once they are sealed; a
stop takes effect after the current step. Imported only when a training starts, because it needs torch and TRL.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, prepare_model_for_kbit_training
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.error import NoMatchingPeftModuleError
from safetensors.torch import load_file
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_pt_utils import safe_globals
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from gxr_batch.errors import JobFileError, ModelUnavailable
from gxr_batch.files import NoObject, open_plain, read_json
from gxr_batch.finetune.examples import Rows, TrainingRow, steps_of
from gxr_batch.finetune.training_output import Show, TrainingProgress, quiet
from gxr_batch.finetune.workdir import OPTIMIZER, RANDOM, SCHEDULER, STATE, WEIGHTS, Checkpoint, Flaw, Work
from gxr_batch.job import Job
from gxr_batch.models.device_memory import no_memory_is
from gxr_batch.models.foreign import loading
from gxr_batch.models.load_weights import LoadedModel
from gxr_batch.run.stop import Stopper

# Peak memory of a token's logits and their gradients, in bytes per vocabulary entry, and the limit for a micro-batch.
# The trainer's chunked loss needs a fraction of that, but computes the logits twice and in float32, which doubles the
# time on a CPU: 9.6 instead of 4.9 core seconds for 2 x 266 tokens of Gemma 3 270M.
_LOGITS_BYTES, _MOST_LOGITS_BYTES = 12, 4 * 2**30
# Numbers in a checkpoint are far smaller, and its values are nested less.
_LARGEST_NUMBER, _DEEPEST = 1e300, 8


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
        self._trainer.work = work
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

    def flaw(self, checkpoint: Checkpoint) -> Flaw | None:
        """Return why this training cannot resume from a checkpoint, None if it can. Nothing is loaded into the model.

        The trainer checks little: it continues without a file that is missing, and fails in the middle of others.
        """
        trainer: Any = self._trainer
        if checkpoint.step > self.steps:
            return Flaw(checkpoint.step, checkpoint.folder, f"this training has only {self.steps:,} steps")
        with self._errors():
            trainer.create_optimizer_and_scheduler(self.steps)  # it keeps the optimizer, and replaces the scheduler
            fits: dict[str, Callable[[Any], bool]] = {
                WEIGHTS: lambda saved: _form(saved) == _form(get_peft_model_state_dict(self.model)),
                OPTIMIZER: lambda saved: _is_part(_form(saved), _form(self._state_after_a_step())),
                SCHEDULER: lambda saved: _form(saved) == _form(trainer.lr_scheduler.state_dict()),
                RANDOM: _is_random_state,
                STATE: lambda saved: _is_trainer_state(saved, checkpoint.step),
            }
            for name, check in fits.items():
                path = checkpoint.folder / name
                try:
                    if not check(_saved(path)):
                        return Flaw(checkpoint.step, path, "it does not fit this training")
                except NoObject as error:
                    return Flaw(checkpoint.step, path, str(error))
                except ModelUnavailable as error:
                    return Flaw(checkpoint.step, path, error.what.removesuffix("."))
        return None

    def _state_after_a_step(self) -> dict[str, Any]:
        """Return the state of an optimizer like the trainer's after a step: wrong sizes would harm its kernels."""
        optimizer: Any = self._trainer.optimizer
        kind, options = Trainer.get_optimizer_cls_and_kwargs(self._trainer.args, self.model)
        groups = [
            group | {"params": [torch.nn.Parameter(torch.zeros_like(weights)) for weights in group["params"]]}
            for group in optimizer.param_groups
        ]
        trial: Any = kind(groups, **options)
        for group in groups:
            for weights in group["params"]:
                weights.grad = torch.zeros_like(weights)
        trial.step()
        state: dict[str, Any] = trial.state_dict()
        return state

    def train(self, checkpoint: Checkpoint | None, stopper: Stopper, show: Show) -> bool:
        """Train from a checkpoint or from the beginning; return False if `stopper` ended it before the last step.

        Raises StorageError, and ModelUnavailable if memory runs out.
        """
        if checkpoint is not None and checkpoint.step >= self.steps:  # the trainer would do one more step
            set_peft_model_state_dict(self.model, load_file(checkpoint.folder / WEIGHTS))
            self._trainer.state = TrainerState.load_from_json(str(checkpoint.folder / STATE))
            return True
        self._trainer.add_callback(Watch(stopper, show, self.steps))
        with self._errors():
            self._trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
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


def _saved(path: Path) -> Any:
    """Return the content of a file of a checkpoint; pickles are limited to tensors and plain values.

    Raises NoObject, ModelUnavailable.
    """
    if path.name == STATE:
        return read_json(path)
    allowed: Any = safe_globals  # untyped
    with loading("it cannot be read", path), warnings.catch_warnings(action="ignore"), allowed():
        if path.name == WEIGHTS:
            return load_file(path)
        with open_plain(path) as file:
            return torch.load(file, map_location="cpu", weights_only=True)


def _form(value: Any, depth: int = 0) -> Any:
    """Return shapes, number formats and types of all values in a state, without the values."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if depth == _DEEPEST:
        return None
    if isinstance(value, Mapping):
        return {key: _form(each, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_form(each, depth + 1) for each in value]
    return float if type(value) is int else type(value)


def _is_part(found: Any, expected: dict[str, Any]) -> bool:
    """Return whether the form of an optimizer's state is as expected; weights without gradients have no state."""
    return (
        isinstance(found, dict)
        and found.keys() == expected.keys()
        and isinstance(found["state"], dict)
        and found["param_groups"] == expected["param_groups"]
        and all(expected["state"].get(key) == each for key, each in found["state"].items())
    )


def _is_random_state(saved: Any) -> bool:
    """Return whether Python, numpy and torch accept their random states."""
    try:
        random.Random().setstate(saved["python"])
        np.random.RandomState().set_state(saved["numpy"])
        torch.Generator().set_state(saved["cpu"])
    except Exception:  # each raises other errors
        return False
    return True


def _is_trainer_state(saved: dict[str, Any], step: int) -> bool:
    """Return whether trainer_state.json is of this step, and every value of the type that the trainer computes with."""
    known = vars(TrainerState())
    logs, callbacks = saved.get("log_history"), saved.get("stateful_callbacks")
    return (
        saved.keys() <= known.keys()
        and saved.get("global_step") == step
        and isinstance(logs, list)
        and all(isinstance(entry, dict) for entry in logs)
        and not any(isinstance(value, dict | list) for entry in logs for value in entry.values())
        and _form(callbacks) == {"TrainerControl": _form(TrainerControl().state())}
        and all(_is_number(saved[name]) for name, usual in known.items() if name in saved and _is_number(usual))
        and all(saved.get(name) is None for name in ("best_model_checkpoint", "best_global_step", "trial_params"))
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and bool(abs(value) < _LARGEST_NUMBER)


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


def _dataset(rows: list[TrainingRow]) -> Dataset:
    # With ready-made labels, the trainer shows no progress bar on stderr, as it does when it makes them from a mask.
    return Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])


class Trainer(SFTTrainer):
    """A trainer whose evaluations have no side effects, and whose checkpoints are `work`'s, without model cards."""

    work: Work

    def create_model_card(self, *args: Any, **extra: Any) -> None:
        """Write nothing: checkpoints need no model card."""

    def evaluate(self, *args: Any, **extra: Any) -> dict[str, float]:
        """Evaluate without changing the random state of the training, so that eval_steps does not affect it."""
        with torch.random.fork_rng():
            return super().evaluate(*args, **extra)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        trained: Any = self.model
        count = sum(weights.numel() for weights in trained.parameters() if weights.requires_grad)
        most = 16 * count + 2**20  # two numbers of 32 bits for each in the optimizer's state, and a margin
        with self.work.checkpointing(self.state.global_step, most):
            super()._save_checkpoint(model, trial)  # type: ignore[no-untyped-call]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the adapter's weights and nothing else: the library would prefer other files, if somebody put them."""
        set_peft_model_state_dict(self.model, load_file(Path(resume_from_checkpoint) / WEIGHTS))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Load nothing: only float16 needs a scaler."""


class Watch(TrainerCallback):
    """Shows progress, and ends the training after the step in which a stop is requested."""

    def __init__(self, stopper: Stopper, show: Show, steps: int) -> None:
        self._stopper, self._show, self._steps = stopper, show, steps
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
