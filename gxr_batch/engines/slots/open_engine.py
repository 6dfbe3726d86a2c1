"""Opens the engine: loads the model, picks the backend and the number of slots, and checks both on fixed prompts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gxr_batch.engines.base import EngineInfo, Identity
from gxr_batch.engines.slots import KIND, most_slots, why_no_gpu_kernels, why_not_drivable
from gxr_batch.engines.slots.backend import PREFIX_SLOTS, Backend
from gxr_batch.engines.slots.cuda_graphs import cuda_recorder
from gxr_batch.engines.slots.decode_loop import TransformersSession
from gxr_batch.engines.slots.library_backend import LEAST_ROWS, LibraryModel
from gxr_batch.engines.slots.native.compile_kernels import NativeUnavailable
from gxr_batch.engines.slots.native.native_backend import NativeModel
from gxr_batch.engines.slots.row_steps import LogitsSteps, Steps
from gxr_batch.engines.slots.slot_schedule import slots_for_memory
from gxr_batch.errors import EngineFailed, ModelUnavailable
from gxr_batch.forms import form_of
from gxr_batch.job import Job
from gxr_batch.models.device_memory import MemoryBudget, no_memory_is, release_cached
from gxr_batch.models.form_tokens import form_tokens
from gxr_batch.models.load_weights import LoadedModel, load_model
from gxr_batch.models.local_model import LocalModel
from gxr_batch.models.memory_estimate import kv_bytes_a_token
from gxr_batch.models.placement import WhyNoKernels, no_kernels, overflows_in_float16

if TYPE_CHECKING:
    from gxr_batch.engines.slots.gpu.open_gpu import OpenedGpu

_CHECK_LENGTHS = (5, 70)
_OVERFLOWS = "The forward pass of transformers overflows in float16 with this model"
_ELSEWHERE = (
    "run the same command again; if it happens again, choose another --output, or add --fresh to start from scratch, "
    'both with model.dtype = "float32"'
)


@contextmanager
def open_session(job: Job, local: LocalModel, memory: MemoryBudget) -> Iterator[TransformersSession]:
    """Load the model within this run's memory limit, with torch on the job's threads; release both afterwards.

    Raises ModelUnavailable if it cannot be loaded or run, or fails the self-check.
    """
    began = time.monotonic()
    threads = torch.get_num_threads()
    torch.set_num_threads(job.engine.threads or threads)
    session: TransformersSession | None = None
    try:
        session = _session(job, local, memory)
        session.info = replace(session.info, load_seconds=time.monotonic() - began)
        yield session
    finally:
        if session is not None:
            session.close()
            if session.info.device != "cpu":
                release_cached()  # the next model of this process, and other processes, find it free
        torch.set_num_threads(threads)


def _session(job: Job, local: LocalModel, memory: MemoryBudget) -> TransformersSession:
    tokenizer = local.tokenizer()
    loaded, on_gpu, why_not = _loaded(job, tokenizer, memory)
    steps, info = _opened(job, loaded, memory, on_gpu, why_not)
    fallback = _fallback(job, loaded, memory, steps)
    info = replace(info, identity=local.identity())
    grow = on_gpu.grow if on_gpu else None
    ends = frozenset(loaded.end_ids)
    form = form_tokens(job, tokenizer, ends, steps.vocab)
    return TransformersSession(info, steps, tokenizer, ends, fallback, grow=grow, form=form)


def _loaded(job: Job, tokenizer: Any, memory: MemoryBudget) -> tuple[LoadedModel, OpenedGpu | None, str]:
    """Load the model; return with it the opened forward pass for GPUs, or why there is none where one is expected.

    If the model was loaded in float16 for that one alone, it is loaded again. Raises ModelUnavailable if it must not
    be, since the run's texts so far are float16's.
    """
    loaded = _load(job, tokenizer, memory, partial(why_no_gpu_kernels, job))
    opened, why_not = _opened_on_gpu(job, loaded, memory)
    if why_not and loaded.placement.dtype == "float16":
        if job.model.dtype == "auto":
            del loaded
            release_cached()
            return _load(job, tokenizer, memory), None, why_not
        if overflows_in_float16(loaded.config):
            raise ModelUnavailable(
                f"{_OVERFLOWS}, and our GPU kernels cannot be used: {why_not}.",
                where='model.dtype = "float16"',
                next_step=_ELSEWHERE,
            )
    return loaded, opened, why_not


def _load(job: Job, tokenizer: Any, memory: MemoryBudget, why_no_kernels: WhyNoKernels = no_kernels) -> LoadedModel:
    loaded = load_model(job.model, tokenizer, memory, why_no_kernels)
    if loaded.model.device.type == "cuda":
        torch.cuda.set_device(loaded.model.device)  # streams and recordings use the current GPU
    return loaded


def _opened_on_gpu(job: Job, loaded: LoadedModel, memory: MemoryBudget) -> tuple[OpenedGpu | None, str]:
    """Return our forward pass for GPUs, or why there is none; "" if none is expected."""
    if not _is_on_one_gpu(loaded) or loaded.quantization is not None or job.engine.kernels != "auto":
        return None, ""
    from gxr_batch.engines.slots.gpu.open_gpu import GpuUnavailable, open_gpu

    device = memory.at(loaded.model.device)  # `budget` outlives this call, and must not keep the model
    try:
        opened = open_gpu(
            loaded.model,
            job.engine,
            job.sampling.settings(),
            capacity=job.model.max_seq_length,
            budget=lambda held: memory.for_cache(device, held=held),
            with_form=form_of(job) is not None,
        )
    except GpuUnavailable as error:
        why_not = str(error)
    else:
        return opened, ""
    release_cached()  # else its memory would count as taken
    return None, why_not


def _opened(
    job: Job, loaded: LoadedModel, memory: MemoryBudget, on_gpu: OpenedGpu | None, why_not: str
) -> tuple[Steps, EngineInfo]:
    """Return the fastest steps for this model, and what is to be said of them."""
    notices = list(loaded.placement.notices)
    if on_gpu is not None:
        notices += on_gpu.notices
        reproducible = job.engine.reproducible and on_gpu.same_bits
        if job.engine.reproducible and not reproducible:
            notices += _why_not_reproducible(cramped=False)
        info = _info(loaded, slots=on_gpu.plan.slots, reproducible=reproducible, name=on_gpu.name)
        return on_gpu.steps, replace(info, notices=tuple(notices))
    if why_not:
        notices.append(
            "Generating is slower on this GPU, with the forward pass of transformers instead of our kernels: "
            f"{why_not}."
        )
    slots, fitting = _share(job, loaded, memory)
    cramped = fitting < LEAST_ROWS
    with no_memory_is(_no_memory(slots, job.model.max_seq_length)):
        backend, reasons = _backend(job, loaded, slots, reproducible=job.engine.reproducible and not cramped)
        try:
            if job.engine.self_check:
                self_check(backend, same_bits=_same_bits(job, backend, loaded, cramped))
        except BaseException:
            backend.close()
            raise
    notices += reasons
    reproducible = _same_bits(job, backend, loaded, cramped)
    if job.engine.reproducible and not reproducible:
        notices += _why_not_reproducible(cramped)
    info = _info(loaded, slots=slots, reproducible=reproducible, name=backend.name)
    return LogitsSteps(backend, job.sampling.settings()), replace(info, notices=tuple(notices))


def _info(loaded: LoadedModel, *, slots: int, reproducible: bool, name: str) -> EngineInfo:
    return EngineInfo(
        identity=Identity(kind=KIND, model=""),
        device=loaded.device,
        dtype=loaded.placement.dtype,
        quantization=loaded.quantization,
        slots=slots,
        load_seconds=0,
        reproducible=reproducible,
        versions={"torch": version("torch"), "transformers": version("transformers"), "forward": name},
        adapter=loaded.adapter,
    )


def _is_on_one_gpu(loaded: LoadedModel) -> bool:
    return loaded.device.startswith("cuda") and "," not in loaded.device


def _fallback(
    job: Job, loaded: LoadedModel, memory: MemoryBudget, steps: Steps
) -> Callable[[str], tuple[Steps, int, str]] | None:
    """Return what replaces our steps if they fail during the run, for the reason that it gets; None if nothing can."""
    if isinstance(steps, LogitsSteps):
        return None

    def library(why: str) -> tuple[Steps, int, str]:
        if loaded.placement.dtype == "float16" and overflows_in_float16(loaded.config):
            # Another number format would be another run's: texts of two kinds must not be in one.
            raise EngineFailed(
                f"Our GPU kernels cannot continue: {why}. {_OVERFLOWS}.",
                where='model.dtype = "float16"',
                next_step=_ELSEWHERE,
            )
        steps.close()
        release_cached()
        # Not the slots that were asked for: our pages hold more rows than full rows fit.
        slots = _share(job.with_values({"engine.slots": "auto"}), loaded, memory).slots
        if job.engine.slots != "auto":
            slots = min(slots, job.engine.slots)
        with no_memory_is(_no_memory(slots, job.model.max_seq_length)):
            backend = LibraryModel(loaded.model, slots=slots, capacity=job.model.max_seq_length)
        return LogitsSteps(backend, job.sampling.settings()), slots, backend.name

    return library


def _no_memory(slots: int, tokens: int) -> ModelUnavailable:
    return ModelUnavailable(
        f"There is not enough memory for {slots} rows of {tokens} tokens.",
        where="engine.slots, model.max_seq_length",
        next_step="lower one of them, or free memory",
    )


def _why_not_reproducible(cramped: bool) -> list[str]:
    memory = [f"There is not enough memory for the {LEAST_ROWS} rows that reproducible texts need."] if cramped else []
    return [*memory, "The last bits of a row's numbers, and rarely its text, may depend on other rows in the batch."]


def _same_bits(job: Job, backend: Backend, loaded: LoadedModel, cramped: bool) -> bool:
    """Return whether a row has the same bits in any batch."""
    return isinstance(backend, NativeModel) or (job.engine.reproducible and not cramped and _keeps_bits(loaded))


def _keeps_bits(loaded: LoadedModel) -> bool:
    """Return whether the library's forward pass gives a row the same bits in any batch (measured: bfloat16, CPU).

    In float32, products with other row counts round differently, and GPUs have not been measured.
    """
    return loaded.placement.dtype == "bfloat16" and loaded.device == "cpu"


class _Share(NamedTuple):
    """How many rows decode side by side, and how many would fit in this run's share of the memory."""

    slots: int
    fitting: int


def _share(job: Job, loaded: LoadedModel, memory: MemoryBudget) -> _Share:
    """Choose the number of slots. Raises ModelUnavailable if a memory limit is too small for them."""
    capacity = job.model.max_seq_length
    element = torch.finfo(loaded.model.dtype).bits // 8
    bytes_a_token = kv_bytes_a_token(loaded.config, element)
    # Each device holds the rows of its layers.
    parts = _cache_parts(loaded.model)
    budget = int(min(memory.for_cache(memory.at(place)) / part for place, part in parts.items()))
    budget -= PREFIX_SLOTS * bytes_a_token * capacity
    most = most_slots(job, next(iter(parts)), str(loaded.model.dtype).removeprefix("torch."))
    if job.engine.cuda_graphs and _is_on_one_gpu(loaded):  # the recordings' logits
        recorded = most if job.engine.slots == "auto" else job.engine.slots
        budget -= recorded * loaded.config.vocab_size * element
    fitting = slots_for_memory(budget, bytes_a_token, capacity, most)
    slots = fitting if job.engine.slots == "auto" else job.engine.slots
    needed = slots * bytes_a_token * capacity
    if memory.size_limit is not None and needed > budget:
        raise ModelUnavailable(
            f"engine.memory_limit = {job.engine.memory_limit} leaves {max(budget, 0) / 2**20:,.0f} MiB for the cache, "
            f"and {slots} row{'s' * (slots > 1)} of {capacity} tokens need {needed / 2**20:,.0f} MiB.",
            where="engine.memory_limit",
            next_step="raise it, or lower engine.slots or model.max_seq_length",
        )
    return _Share(slots, fitting)


def _cache_parts(model: Any) -> dict[str, float]:
    """Return the devices that compute the model's layers, and which part of them each does."""
    inner = getattr(model, "model", None)
    layers = getattr(getattr(inner, "language_model", inner), "layers", None)
    if not hasattr(model, "hf_device_map") or layers is None:
        return {str(model.get_input_embeddings().weight.device): 1.0}
    # accelerate computes what is in the main memory or on the disk on the first GPU.
    first = next((f"cuda:{place}" for place in model.hf_device_map.values() if isinstance(place, int)), "cpu")
    own = [next(layer.parameters()).device for layer in layers]
    places = Counter(str(device) if device.type == "cuda" else first for device in own)
    return {place: count / len(layers) for place, count in places.items()}


def _backend(job: Job, loaded: LoadedModel, slots: int, *, reproducible: bool) -> tuple[Backend, list[str]]:
    """Return the fastest backend for this model, and a notice if a faster one was expected here."""
    capacity = job.model.max_seq_length
    notices: list[str] = []
    if job.engine.kernels == "auto":
        native, notices = _native(loaded, slots, capacity)
        if native is not None:
            return native, notices
    reason = why_not_drivable(loaded.config)
    if reason:
        raise ModelUnavailable(
            f"This engine cannot run the model: {reason}.",
            where='engine.kind = "transformers"',
            next_step='set engine.kind = "generate"',
        )
    record = None
    if job.engine.cuda_graphs and _is_on_one_gpu(loaded):
        record = cuda_recorder()
    elif job.engine.cuda_graphs:
        notices.append("engine.cuda_graphs has no effect: the model is not on a single GPU.")
    backend = LibraryModel(loaded.model, slots=slots, capacity=capacity, reproducible=reproducible, record=record)
    return backend, notices


def _native(loaded: LoadedModel, slots: int, capacity: int) -> tuple[NativeModel | None, list[str]]:
    """Return the native kernels with this model, None if they cannot run it here; and sentences for the user."""
    try:
        native = NativeModel(loaded.model, slots=slots, capacity=capacity)
    except NativeUnavailable as error:
        expected = loaded.device == "cpu" and loaded.placement.dtype == "bfloat16" and loaded.quantization is None
        slower = (
            "Generating is slower on this machine, with the forward pass of transformers instead of the native "
            f"kernels: {error}."
        )
        return None, [slower] if expected else []
    notices = []
    if why := native.why_slower:
        notices.append(f"The native kernels do not use the CPU's tile registers (AMX): {why}.")
    if why := native.why_not_kept:
        notices.append(f"The native kernels are compiled in each process: the cache cannot keep them ({why}).")
    return native, notices


def self_check(backend: Backend, *, same_bits: bool = True) -> None:
    """Run a short and a long fixed prompt alone and side by side. Raises ModelUnavailable unless they agree.

    Finds broken kernels, masks and number formats before the run spends hours on them; takes well under a second.
    Without `same_bits`, with which rounding alone may change a token, it only looks for numbers that are not finite.
    """
    prompts = [[2 + (7 * step) % min(backend.vocab - 2, 1000) for step in range(length)] for length in _CHECK_LENGTHS]
    prompts = [ids[: backend.capacity - 4] for ids in prompts]
    if backend.slots == 1:
        prompts = prompts[1:]  # with one slot nothing can run next to the first
    alone = [_first_tokens(backend, [ids]) for ids in prompts]
    together = _first_tokens(backend, prompts)
    if same_bits and together != [tokens for (tokens,) in alone]:
        raise ModelUnavailable(
            "The self-check failed: a prompt gives different tokens in a batch than alone.",
            where=f"engine.self_check, {backend.name}",
            next_step='set engine.kind = "generate", or report this with the versions in run.json',
        )


def _first_tokens(backend: Backend, prompts: Sequence[list[int]], count: int = 3) -> list[list[int]]:
    """Return the first greedy tokens of prompts decoded side by side."""
    rows = len(prompts)
    logits = backend.prefill([(slot, prompts[slot], 0) for slot in range(rows)])
    tokens: list[list[int]] = [[] for _ in range(rows)]
    for step in range(count):
        if not bool(logits.isfinite().all()):
            raise ModelUnavailable(
                "The self-check failed: the model's logits are not finite numbers.",
                where=f"engine.self_check, {backend.name}",
                next_step='try model.dtype = "float32"; if that helps, the weights do not work in this number format',
            )
        for row, token in enumerate(logits.argmax(dim=-1).tolist()):
            tokens[row].append(token)
        if step + 1 < count:
            logits = backend.decode(
                list(range(rows)), [ids[-1] for ids in tokens], [len(prompts[row]) + step for row in range(rows)]
            )
    return tokens
