"""Makes the adapter: loads the base model, trains the remaining steps, evaluates, and writes the adapter folder.

Fills the folder that workdir.py publishes. The folder describes itself, so that it can be copied: training data,
settings, versions, results on held-out rows, and that its texts are AI-generated teaching material. Imported only when
a training starts, because it needs torch and peft.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import GenerationConfig

from gxr_batch.disk import expanded, follow_umask
from gxr_batch.errors import JobFileError, ModelUnavailable, UserError
from gxr_batch.finetune.evaluation import Evaluation, Sampler
from gxr_batch.finetune.examples import Rows
from gxr_batch.finetune.model_card import model_card
from gxr_batch.finetune.train import Training
from gxr_batch.finetune.training_output import Say, Show
from gxr_batch.finetune.workdir import PACKAGES, WEIGHTS, Checkpoint, Flaw, Record, Work, now
from gxr_batch.job import Job
from gxr_batch.models.demo import NOTICE
from gxr_batch.models.device_memory import MemoryBudget
from gxr_batch.models.library_output import quiet_transformers
from gxr_batch.models.load_weights import LoadedModel, load_model, load_tokenizer
from gxr_batch.models.local_model import LocalModel
from gxr_batch.models.placement import SPREAD
from gxr_batch.models.read_weights import VISION
from gxr_batch.models.source import id_and_commit
from gxr_batch.run.fingerprint import environment
from gxr_batch.run.stop import Stopper


class Tuning:
    """A training from base model to adapter folder. `loss_after`: the final held-out loss, once it is known."""

    def __init__(self, job: Job, rows: Rows, local: LocalModel, work: Work, say: Say) -> None:
        self._memory = MemoryBudget(job.engine, say)
        self._job = _on_one_device(job, self._memory)
        self._rows, self._local, self._work, self._say = rows, local, work, say
        assert work.record is not None, "set by Work.begin"
        self._record = work.record
        self.step = self.steps = 0
        self.loss_after: float | None = None

    def run(self, stopper: Stopper, show: Show) -> None:
        """Resume from the newest checkpoint and finish the adapter, unless `stopper` stops it. Raises GxrError."""
        with _threads(self._job.engine.threads):
            loaded = self._load()
            training = Training(self._job, self._rows, self._work, loaded, self._local.tokenizer())
            checkpoint = self._newest(training)
            self._begin(loaded, training, checkpoint.step if checkpoint else 0)
            done = training.train(checkpoint, stopper, show)
            self.step, self.steps = training.step, training.steps
            if done:
                self._finish(loaded, training, stopper)

    def _newest(self, training: Training) -> Checkpoint | None:
        """Return the newest checkpoint that can be used, None if there is none yet. Raises StorageError.

        Newer ones are renamed, with a notice; if none at all can be used, that is an error and nothing changes.
        """
        flaws: list[Flaw] = []
        for checkpoint in self._work.sealed_checkpoints():
            if (flaw := self._work.flaw(checkpoint) or training.flaw(checkpoint)) is None:
                if flaws:
                    self._say(self._work.set_aside(flaws))
                return checkpoint
            flaws.append(flaw)
        if flaws:
            raise self._work.refuse(flaws[0])
        return None

    def _load(self) -> LoadedModel:
        loaded = load_model(self._job.model, self._local.tokenizer(), self._memory)
        for sentence in loaded.placement.notices:
            self._say(sentence)
        if loaded.placement.device == SPREAD:
            raise ModelUnavailable(
                "The model does not fit on one GPU, and a model that is split over several GPUs cannot be trained.",
                where="model.load_in_4bit, model.device_map",
                next_step="set model.load_in_4bit = true, or use a GPU with more memory",
            )
        return loaded

    def _begin(self, loaded: LoadedModel, training: Training, step: int) -> None:
        """Record the settings of this invocation, and the base model's loss, before the first step.

        Raises FingerprintError if an earlier invocation had other settings.
        """
        record, wanted = self._record, self._job.finetune.optimizer
        kind = {"dtype": loaded.placement.dtype, "four_bit": loaded.placement.four_bit, "optimizer": training.optimizer}
        record.settle(kind, self._work.folder)
        if training.optimizer != wanted:
            self._say(f"finetune.optimizer = {wanted} does not run on {loaded.device}; using {training.optimizer}.")
        about = environment()
        packages = about["packages"] | {name: version(name) for name in PACKAGES}
        place = {"device": loaded.device, "python": about["python"], "git_commit": about["git_commit"]}
        start = {"started_at": now(), "from_step": step, "steps": training.steps, "packages": packages}
        record.starts.append(start | kind | place)
        if step:
            self._say(f"Resuming from step {step:,} of {training.steps:,}.")
        elif record.loss_before is None:
            record.loss_before = training.held_out_loss()
        record.save(self._work.folder)

    def _finish(self, loaded: LoadedModel, training: Training, stopper: Stopper) -> None:
        """Evaluate the adapter in the number format in which it is saved, and publish it unless stopped."""
        dtype: torch.dtype = getattr(torch, loaded.placement.dtype)
        training.round(dtype)
        self.loss_after = training.held_out_loss()
        _refuse_diverged(self.loss_after, self._work)
        sampler = Sampler(self._job, self._local.identity(), self._local.tokenizer(), loaded, self._memory)
        with training.ready_to_generate() as model:
            samples = sampler.sample(self._rows.held_out, model, stopper.request)
        if stopper.reason is not None:
            return
        evaluation = Evaluation(
            held_out_rows=len(self._rows.held_out),
            loss_before=self._record.loss_before,
            loss_after=self.loss_after,
            samples=samples,
            history=training.history,
        )
        self._record.starts[-1] |= {"ended_at": now(), "step": training.step}
        self._record.save(self._work.folder)
        base = self._base()
        with self._work.publishing() as folder:
            _fill(folder, training.model, base, loaded)
            _describe(folder, self._record, evaluation, of_gemma=str(loaded.config.model_type).startswith("gemma"))

    def _base(self) -> _Base:
        """Return what the adapter records of its base model."""
        folder = expanded(self._job.model.path)
        # peft reads the commit from a separate key.
        name = str(folder.absolute()) if folder.is_dir() else id_and_commit(self._job.model.path)[0]
        # The loaded tokenizer was changed for encoding, so load an unchanged one.
        return _Base(name, self._local.identity().revision, load_tokenizer(self._job.model))


def _on_one_device(job: Job, memory: MemoryBudget) -> Job:
    """Return the job with the device that training uses. Raises JobFileError if the job sets another."""
    chosen = job.model.device_map
    if chosen in {"auto", "cuda"} and memory.devices[0].name.startswith("cuda"):
        return job.with_values({"model.device_map": "cuda:0"})
    if chosen.startswith("cuda") and chosen not in {"cuda", "cuda:0"}:
        raise JobFileError(
            "Training uses the first visible GPU.",
            where=f"model.device_map = {chosen}",
            next_step=f'set model.device_map = "auto" and run with CUDA_VISIBLE_DEVICES={chosen.partition(":")[2]}',
        )
    return job


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads inside the block; 0 changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _refuse_diverged(loss: float | None, work: Work) -> None:
    if loss is not None and not math.isfinite(loss):
        raise UserError(
            "The training diverged: the held-out loss is not finite.",
            where=str(work.folder.absolute()),
            next_step="lower finetune.learning_rate and start from scratch with --fresh",
        )


class _Base(NamedTuple):
    """An adapter's base model: its name, revision and unchanged tokenizer."""

    name: str
    revision: str
    tokenizer: Any


def _fill(folder: Path, model: Any, base: _Base, loaded: LoadedModel) -> None:
    """Write the files that load: weights, adapter_config.json, tokenizer, generation_config.json.

    Raises OSError, and what libraries raise for errors of the disk.
    """
    dtype: torch.dtype = getattr(torch, loaded.placement.dtype)
    tokenizer = base.tokenizer
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in sorted(state.items())}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = base.name, base.revision or None
    config.target_modules = sorted(config.target_modules)  # the order of a set differs between processes
    # Where the adapter is loaded, a multimodal base has a vision part again, whose layers have the same names.
    if getattr(loaded.model.config, "vision_config", None) is not None:
        config.exclude_modules = rf".*({'|'.join(VISION)}).*"
    config.inference_mode = True
    config.save_pretrained(str(folder))
    follow_umask(folder)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": list(loaded.end_ids)}
    with quiet_transformers():
        tokenizer.save_pretrained(folder)
        pad = tokenizer.pad_token_id
        GenerationConfig(**ids, pad_token_id=pad).save_pretrained(folder)  # type: ignore[no-untyped-call]


def _describe(folder: Path, record: Record, evaluation: Evaluation, *, of_gemma: bool) -> None:
    """Write README.md, evaluation.json, finetune.json and, for a Gemma, NOTICE. Raises OSError."""
    results = evaluation.as_dict()
    texts = {
        "evaluation.json": json.dumps(results, indent=2, ensure_ascii=False) + "\n",
        "README.md": model_card(record, results, of_gemma=of_gemma),
    }
    if of_gemma:
        texts["NOTICE"] = f"{NOTICE}\n\nA LoRA adapter for a Gemma model, made by gxr-batch finetune.\n"
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    record.save(folder)
