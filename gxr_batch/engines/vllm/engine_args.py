"""Turns a job into what vLLM is opened with: arguments, environment, adapter. vLLM itself is not imported here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from gxr_batch.engines.vllm.host_messages import Setup
from gxr_batch.errors import ModelUnavailable
from gxr_batch.job import Job
from gxr_batch.models.device_memory import MemoryBudget
from gxr_batch.models.load_weights import end_ids_of, load_config
from gxr_batch.models.lora_config import AdapterConfig
from gxr_batch.models.memory_estimate import kv_bytes_a_token
from gxr_batch.models.placement import SPREAD, Placement, place
from gxr_batch.models.quantization import notices_of_format, stored_in_four_bits
from gxr_batch.models.source import Source, find

if TYPE_CHECKING:
    from gxr_batch.models.check_adapter import Fitting
    from gxr_batch.models.form_tokens import FormTokens

# Rows side by side if the job does not set them; vLLM makes rows wait if its cache holds fewer.
_MOST_SLOTS = {"cpu": 64, "cuda": 256}
# The LoRA ranks that vLLM supports; an adapter gets the smallest that holds it.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_PROBE_TOKENS = 16
# Where vLLM's configuration holds the form, for our logits processor in vLLM's process.
FORM = "gxr_batch_form"
_PROCESSOR = "gxr_batch.engines.vllm.form_processor:FormProcessor"
# What vLLM's process takes of a GPU before it checks whether its share is still free.
_CONTEXT_BYTES = 2**30
_NOT_REPRODUCIBLE = (
    "vLLM samples with each row's seed, but the last bits of a row's numbers, and sometimes its text, depend on other "
    "rows in the batch: texts are not reproducible."
)


@dataclass(frozen=True, kw_only=True)
class Opening:
    """All that opening vLLM takes. `vocab` is the number of token ids, `adapter` describes how one is applied.

    `gpu_bytes` is the GPU memory that vLLM takes at once and keeps, 0 on a CPU; `form` is what every text must have.
    """

    setup: Setup
    environment: dict[str, str]
    placement: Placement
    slots: int
    vocab: int
    gpu_bytes: int
    notices: tuple[str, ...]
    adapter: str | None = None
    form: FormTokens | None = None


class _Adapter(NamedTuple):
    """An adapter that fits: its settings, its highest rank, the number of modules that it changes."""

    config: AdapterConfig
    rank: int
    modules: int


def prepare_opening(job: Job, tokenizer: Any, memory: MemoryBudget) -> Opening:
    """Decide on which device and with how much memory the model is opened; wait for memory if the job asks for it.

    Raises ModelUnavailable, JobFileError.
    """
    from gxr_batch.models.form_tokens import form_tokens
    from gxr_batch.models.read_weights import bytes_in_16_bits

    sources = find(job.model, weights=True)
    whole = load_config(job.model)
    config = whole.get_text_config()
    size = bytes_in_16_bits(sources.base, whole)
    placement = place(job.model, config, size, memory, stored_in_four_bits=stored_in_four_bits(whole))
    _refuse(placement)
    own = sources.adapter
    adapter = None if own is None else _adapter(own, sources.base, whole, tokenizer)
    ends = end_ids_of(job.model, tokenizer)
    form = form_tokens(job, tokenizer, ends, config.vocab_size)
    slots = _MOST_SLOTS["cpu" if _on_cpu(placement) else "cuda"] if job.engine.slots == "auto" else job.engine.slots
    row_bytes = kv_bytes_a_token(config, 4 if placement.dtype == "float32" else 2) * job.model.max_seq_length
    gpu_bytes = 0 if _on_cpu(placement) else _gpu_bytes(placement, memory)
    arguments = {
        "model": str(sources.base.folder),
        "max_num_seqs": slots,
        **_arguments(job, placement, adapter),
        **_memory(placement, memory, gpu_bytes, slots * row_bytes),
        **({} if form is None else _held_to(form, tokenizer, config.vocab_size)),
        # Only the language side of a multimodal model is used.
        **({"limit_mm_per_prompt": {"image": 0}} if whole.model_type == "gemma3" else {}),
    }
    sampling = job.sampling.settings()
    drawn = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "repetition_penalty")}
    drawn["stop_token_ids"] = list(ends)
    formats = notices_of_format(job.model, sources.base, placement, None if adapter is None else adapter.config)
    probe = [2 + (7 * step) % min(config.vocab_size - 2, 1000) for step in range(_PROBE_TOKENS)]
    return Opening(
        setup=Setup(arguments, drawn, str(sources.adapter.folder) if sources.adapter else None, probe),
        # The newer model runner takes logits processors of another kind.
        environment=_environment(job, placement) | ({"VLLM_USE_V2_MODEL_RUNNER": "0"} if form else {}),
        placement=placement,
        slots=slots,
        vocab=config.vocab_size,
        gpu_bytes=gpu_bytes,
        notices=(*placement.notices, *formats, *([_NOT_REPRODUCIBLE] if job.engine.reproducible else [])),
        adapter=adapter and f"beside the weights, by vLLM: {adapter.modules} LoRA modules, rank {adapter.rank}",
        form=form,
    )


def _arguments(job: Job, placement: Placement, adapter: _Adapter | None) -> dict[str, Any]:
    """Return the job's settings as vLLM arguments."""
    found: dict[str, Any] = {
        "skip_tokenizer_init": True,  # prompts and answers are token ids
        "dtype": placement.dtype,
        "max_model_len": job.model.max_seq_length,
        "enable_prefix_caching": True,
        "enforce_eager": job.vllm.eager,
        "generation_config": "vllm",  # otherwise the model's sampling defaults would fill what we leave out
        "disable_log_stats": True,
        "enable_log_requests": False,
    }
    if placement.four_bit and not placement.stored_in_four_bits:
        found["quantization"] = "bitsandbytes"
    if adapter is not None:
        room_for = next(rank for rank in _RANKS if rank >= adapter.rank)
        found |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": room_for}
    return found


def _held_to(form: FormTokens, tokenizer: Any, vocab: int) -> dict[str, Any]:
    """Return the vLLM arguments by which its texts are held to a form."""
    settings = {"form": form.form.recorded, "tokenizer": tokenizer.name_or_path, "end_ids": sorted(form.end_ids)}
    return {
        "logits_processors": [_PROCESSOR],
        "additional_config": {FORM: settings | {"vocab": vocab}},
        "async_scheduling": False,  # a row's next token depends on its last one
    }


def _on_cpu(placement: Placement) -> bool:
    return placement.device == "cpu"


def _refuse(placement: Placement) -> None:
    """Raise ModelUnavailable for a placement that one vLLM on one device cannot serve."""
    if placement.device == SPREAD:
        raise ModelUnavailable(
            "The model does not fit on a single GPU, and this engine does not spread vLLM over several.",
            where='engine.kind = "vllm"',
            next_step='raise engine.memory_limit, set model.load_in_4bit = true, or engine.kind = "transformers"',
        )
    if placement.four_bit and _on_cpu(placement):
        raise ModelUnavailable(
            "vLLM does not support bitsandbytes' 4-bit weights on a CPU.",
            where="model.load_in_4bit",
            next_step='set it to false and use a model with full weights, or set engine.kind = "transformers"',
        )


def _gpu_bytes(placement: Placement, memory: MemoryBudget) -> int:
    """Return this run's share of a GPU: the limit, or the weights and half of what is free, at most what is free."""
    device = memory.at(placement.device)
    share = memory.size_limit or placement.weight_bytes + memory.for_cache(device, weight_bytes=placement.weight_bytes)
    return max(0, min(share, device.free() - _CONTEXT_BYTES))


def _memory(placement: Placement, memory: MemoryBudget, gpu_bytes: int, wanted: int) -> dict[str, Any]:
    """Return this run's share of the memory as vLLM arguments; `wanted` is the size in bytes of a cache for all slots.

    On a GPU it is a fraction of all memory, for weights, cache and the rest. On a CPU it is the cache's size.
    """
    device = memory.at(placement.device)
    if not _on_cpu(placement):
        return {"gpu_memory_utilization": gpu_bytes / device.total()}
    budget = memory.for_cache(device, weight_bytes=placement.weight_bytes)
    return {"kv_cache_memory_bytes": budget if memory.size_limit is not None else min(budget, wanted)}


def _environment(job: Job, placement: Placement) -> dict[str, str]:
    """Return vLLM's environment variables: the GPU, or the number of threads.

    Threads are not bound to cores: another run on this machine would be bound to the same ones.
    """
    if not _on_cpu(placement):
        number = int(placement.device.partition(":")[2] or 0)
        seen = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        return {"CUDA_VISIBLE_DEVICES": seen[number] if seen else str(number)}
    if not job.engine.threads:
        return {}
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(job.engine.threads)}


def fit_vllm(fitting: Fitting) -> Fitting:
    """Return an adapter that vLLM can apply. Raises ModelUnavailable."""
    adapter, placed = fitting
    patches = placed.patches
    step = 'merge it into its model and set model.path to the result, or set engine.kind = "transformers"'
    if adapter.config.uses_dora:
        raise adapter.refuse("The adapter uses DoRA, which vLLM does not support.", step)
    if replaced := [name for name, patch in patches.items() if not patch.is_lora]:
        raise adapter.refuse(f"The adapter replaces whole weights ({replaced[0]}), which vLLM does not support.", step)
    if placed.vocabulary is not None:
        raise adapter.refuse("The adapter changes the model's vocabulary, which vLLM does not support.", step)
    if foreign := [name for name in patches if name not in adapter.patches]:
        raise adapter.refuse(
            f"The adapter was trained on another class of this model, whose names vLLM does not accept ({foreign[0]}).",
            step,
        )
    rank = adapter.config.highest_rank  # vLLM checks the settings, whether or not a module has that rank
    if rank > _RANKS[-1]:
        raise adapter.refuse(f"The adapter's rank is {rank}, and vLLM supports at most {_RANKS[-1]}.", step)
    return fitting


def _adapter(source: Source, base: Source, config: Any, tokenizer: Any) -> _Adapter:
    """Return an adapter that fits the model and vLLM. Raises ModelUnavailable."""
    from gxr_batch.models.check_adapter import fit_adapter

    fitting = fit_adapter(source, base, config, tokenizer)
    settings = fit_vllm(fitting).adapter.config
    return _Adapter(settings, settings.highest_rank, len(fitting.placed.patches))
