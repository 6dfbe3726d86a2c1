"""Opens the GPU's forward pass: reserves its memory, and compares it with the library's before the first row.

`Growth` reserves more during the run.
"""

from __future__ import annotations

import importlib.util
import operator
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gxr_batch.engines.slots.cuda_graphs import cuda_recorder
from gxr_batch.engines.slots.decoder_layout import layer_kinds
from gxr_batch.engines.slots.gpu.fused_weights import Weights, fuse, why_not
from gxr_batch.engines.slots.gpu.memory_plan import MemoryPlan, Sizes, plan, windows_of
from gxr_batch.engines.slots.gpu.paged_cache import PagedCache
from gxr_batch.engines.slots.row_steps import device_failed, in_words
from gxr_batch.job import EngineSection
from gxr_batch.job.sampling import Sampling
from gxr_batch.models.device_memory import cached_bytes, is_lost, out_of_memory, release_cached

if TYPE_CHECKING:
    from gxr_batch.engines.slots.gpu.device_steps import DeviceSteps

# Attempts to reserve the memory of a plan, and each plan's part of the one that did not fit.
_ATTEMPTS = 3
_LESS = 0.75
# How long after the last look for memory that other processes gave back.
_LOOK_SECONDS = 300.0


class GpuUnavailable(Exception):
    """The GPU's forward pass cannot be used here, for the reason in the message; the library's can."""


class OpenedGpu(NamedTuple):
    """The steps, the plan of their memory, their name for run.json, and sentences for the user.

    `same_bits`: on this device, a row's logits next to others were those alone, to the last bit. `grow` enlarges the
    steps if it can, None if their slots were set.
    """

    steps: DeviceSteps
    plan: MemoryPlan
    name: str
    same_bits: bool
    notices: tuple[str, ...]
    grow: Growth | None = None


@dataclass
class Growth:
    """Enlarges steps to more slots once other processes have given back the memory for them; asks now and then."""

    steps: DeviceSteps
    plan: MemoryPlan
    sizes: Sizes
    budget: Callable[[int], int]
    asked_at: float = field(default_factory=time.monotonic)

    def __call__(self) -> tuple[int, list[str]]:
        """Return the number of slots, enlarged or not, and sentences for the user. Raises EngineFailed, KernelsFailed.

        No call of the steps may be under way; what they launched may be.
        """
        now = self.plan
        if time.monotonic() - self.asked_at < _LOOK_SECONDS:
            return now.slots, []
        self.asked_at = time.monotonic()
        try:
            # A look gives nothing back: a step may need what the allocator keeps, and others take what is free.
            most = self.budget(now.reserved + cached_bytes(self.steps.device))
            found = plan(self.sizes, capacity=now.capacity, budget=most, chunk=now.chunk)
            if found is None or found.slots <= now.slots or any(map(operator.lt, found.pages, now.pages)):
                return now.slots, []
            release_cached()  # raises after a recording that failed
        except RuntimeError:  # or the GPU is lost: the next step says so
            return now.slots, []
        grown, notices = self.steps.grow(found.slots, found.pages)
        self.plan = found if grown else now
        return self.plan.slots, notices


def why_not_here(model: Any) -> str:
    """Return why the forward pass cannot run a model with what is installed, empty if it can."""
    triton = importlib.util.find_spec("triton") is not None
    return why_not(model) or ("" if triton else "Triton is not installed (pip install triton)")


def open_gpu(
    model: Any,
    engine: EngineSection,
    sampling: Sampling,
    *,
    capacity: int,
    budget: Callable[[int], int],
    with_form: bool = False,
) -> OpenedGpu:
    """Return the steps of a loaded model, compared with the library. Raises GpuUnavailable.

    `with_form` says that texts are held to a form; such steps do not run ahead of the host, and are not recorded.

    `budget` gets how many bytes are reserved already and returns how many may be. It is asked again if they cannot be,
    because another process took some of them in the meantime. Raises EngineFailed if the GPU cannot compute any more.
    The model stays usable by the library: see fused_weights.
    """
    if reason := why_not_here(model):
        raise GpuUnavailable(reason)
    sizes = sizes_of(model.config.get_text_config(), model.dtype)
    slots = None if engine.slots == "auto" else engine.slots
    most = budget(0)
    for _ in range(_ATTEMPTS):
        found = plan(sizes, capacity=capacity, budget=most, slots=slots)
        if found is None:
            raise GpuUnavailable("there is too little memory for its buffers and one row")
        why = ""
        try:
            opened = _opened(model, found, engine, sampling, with_form=with_form)
            if slots:
                return opened
            # With one slot a row was compared with itself.
            same_bits = opened.same_bits and found.slots > 1
            return opened._replace(same_bits=same_bits, grow=Growth(opened.steps, found, sizes, budget))
        except GpuUnavailable:
            raise
        except Exception as error:  # whatever Triton, its compiler and the driver raise
            if is_lost(model.device):
                raise device_failed(error) from None
            why = "" if out_of_memory(error) else f"a kernel failed ({in_words(error)})"
            if "find C compiler" in str(error):  # Triton's words; it builds its launcher with one
                why = "there is no C compiler (gcc, clang, or one that CC names)"
        # Outside the handler, which keeps the tensors of the failed attempt alive.
        if why:
            raise GpuUnavailable(why)
        release_cached()
        most = min(budget(0), int(_LESS * found.bytes))
    raise GpuUnavailable("there is too little memory for it")


def _opened(model: Any, found: MemoryPlan, engine: EngineSection, sampling: Sampling, *, with_form: bool) -> OpenedGpu:
    from gxr_batch.engines.slots.gpu.compare_forward import Comparison, compare
    from gxr_batch.engines.slots.gpu.device_steps import DeviceSteps
    from gxr_batch.engines.slots.gpu.forward import Forward
    from gxr_batch.engines.slots.gpu.kernels import TRITON_VERSION

    weights = fuse(model, found.capacity)
    release_cached()  # the weights that were fused, which nobody planned with
    forward = Forward(weights, cache_of(weights, found), chunk=found.chunk, reproducible=engine.reproducible)
    compared = compare(model, forward) if engine.self_check else Comparison("", same_bits=False)
    if compared.why:
        raise GpuUnavailable(compared.why)
    recorder = cuda_recorder if engine.cuda_graphs and not with_form else None
    steps = DeviceSteps(forward, sampling, recorder=recorder, runs_ahead=not with_form)
    steps.warm_up()
    notices = steps.record_steps() if recorder else []
    if engine.cuda_graphs and with_form:
        notices.append("engine.cuda_graphs has no effect: what a row may draw is computed between two steps.")
    name = f"GPU kernels, {str(weights.dtype).removeprefix('torch.')} (Triton {TRITON_VERSION})"
    return OpenedGpu(steps, found, name, compared.same_bits, tuple(notices))


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
