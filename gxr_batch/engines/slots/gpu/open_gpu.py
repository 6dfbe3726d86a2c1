"""Opens the GPU's forward pass: reserves its memory, and compares it with the library's before the first row."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gxr_batch.engines.slots.cuda_graphs import cuda_recorder
from gxr_batch.engines.slots.decoder_layout import layer_kinds
from gxr_batch.engines.slots.gpu.fused_weights import Weights, fuse, why_not
from gxr_batch.engines.slots.gpu.memory_plan import MemoryPlan, Sizes, plan, windows_of
from gxr_batch.engines.slots.gpu.paged_cache import PagedCache
from gxr_batch.engines.slots.row_steps import Steps, device_failed
from gxr_batch.job import EngineSection
from gxr_batch.job.sampling import Sampling
from gxr_batch.models.device_memory import is_lost, out_of_memory, release_cached

if TYPE_CHECKING:
    from gxr_batch.engines.slots.gpu.device_steps import DeviceSteps

# Attempts to reserve the memory of a plan, and each plan's part of the one that did not fit.
_ATTEMPTS = 3
_LESS = 0.75


class GpuUnavailable(Exception):
    """The GPU's forward pass cannot be used here, for the reason in the message; the library's can."""


class OpenedGpu(NamedTuple):
    """The steps, the plan of their memory, their name for run.json, and sentences for the user.

    `same_bits`: on this device, a row's logits next to others were those alone, to the last bit.
    """

    steps: Steps
    plan: MemoryPlan
    name: str
    same_bits: bool
    notices: tuple[str, ...]


def why_not_here(model: Any) -> str:
    """Return why the forward pass cannot run a model with what is installed, empty if it can."""
    triton = importlib.util.find_spec("triton") is not None
    return why_not(model) or ("" if triton else "Triton is not installed (pip install triton)")


def open_gpu(
    model: Any, engine: EngineSection, sampling: Sampling, *, capacity: int, budget: Callable[[], int]
) -> OpenedGpu:
    """Return the steps of a loaded model, compared with the library. Raises GpuUnavailable.

    `budget` returns the bytes that may be reserved now. It is asked again if they cannot be reserved, because another
    process took some of them in the meantime. Raises EngineFailed if the GPU cannot compute any more. The model stays
    usable by the library: see fused_weights.
    """
    if reason := why_not_here(model):
        raise GpuUnavailable(reason)
    sizes = sizes_of(model.config.get_text_config(), model.dtype)
    slots = None if engine.slots == "auto" else engine.slots
    most = budget()
    for _ in range(_ATTEMPTS):
        found = plan(sizes, capacity=capacity, budget=most, slots=slots)
        if found is None:
            raise GpuUnavailable("there is too little memory for its buffers and one row")
        why = ""
        try:
            return _opened(model, found, engine, sampling)
        except GpuUnavailable:
            raise
        except Exception as error:  # whatever Triton, its compiler and the driver raise
            if is_lost(model.device):
                raise device_failed(error) from None
            why = "" if out_of_memory(error) else f"a kernel failed ({type(error).__name__})"
            if "find C compiler" in str(error):  # Triton's words; it builds its launcher with one
                why = "there is no C compiler (gcc, clang, or one that CC names)"
        # Outside the handler, which keeps the tensors of the failed attempt alive.
        if why:
            raise GpuUnavailable(why)
        release_cached()
        most = min(budget(), int(_LESS * found.bytes))
    raise GpuUnavailable("there is too little memory for it")


def _opened(model: Any, found: MemoryPlan, engine: EngineSection, sampling: Sampling) -> OpenedGpu:
    from gxr_batch.engines.slots.gpu.compare_forward import Comparison, compare
    from gxr_batch.engines.slots.gpu.device_steps import DeviceSteps
    from gxr_batch.engines.slots.gpu.forward import Forward
    from gxr_batch.engines.slots.gpu.kernels import TRITON_VERSION

    weights = fuse(model, found.capacity)
    forward = Forward(weights, cache_of(weights, found), chunk=found.chunk, reproducible=engine.reproducible)
    compared = compare(model, forward) if engine.self_check else Comparison("", same_bits=False)
    if compared.why:
        raise GpuUnavailable(compared.why)
    steps = DeviceSteps(forward, sampling, record=cuda_recorder() if engine.cuda_graphs else None)
    steps.warm_up()
    failed = _not_recorded(steps, weights.device) if engine.cuda_graphs else ""
    notices = [f"Decode steps are not recorded: the recording failed ({failed})."] if failed else []
    if failed:
        with suppress(RuntimeError):  # the allocator may take the recording for unfinished
            release_cached()
        steps.warm_up()  # raises if that is so
    name = f"GPU kernels, {str(weights.dtype).removeprefix('torch.')} (Triton {TRITON_VERSION})"
    return OpenedGpu(steps, found, name, compared.same_bits, tuple(notices))


def _not_recorded(steps: DeviceSteps, device: torch.device) -> str:
    """Record the decode steps; return the type of the error if that failed. Raises it if the GPU is lost."""
    try:
        steps.record_steps()
    except Exception as error:
        if is_lost(device):
            raise
        return type(error).__name__
    return ""


def cache_of(weights: Weights, found: MemoryPlan) -> PagedCache:
    """Reserve the pages of a plan."""
    return PagedCache.of(
        found.groups,
        slots=found.slots,
        capacity=found.capacity,
        pages=found.pages,
        kv_heads=weights.kv_heads,
        head_size=weights.head_size,
        dtype=weights.dtype,
        device=weights.device,
    )


def sizes_of(config: Any, dtype: torch.dtype) -> Sizes:
    """Return what the memory plan needs of a text configuration."""
    element = torch.finfo(dtype).bits // 8
    return Sizes(
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        vocab=config.vocab_size,
        windows=windows_of(layer_kinds(config), getattr(config, "sliding_window", 0) or 0),
        element_bytes=element,
        wide_residual=dtype == torch.float16,
    )
