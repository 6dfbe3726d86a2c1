"""GPUs that exist in name only: the engine's real code runs over torch's fake tensors on `cuda:N`, without a number.

What a GPU would refuse is refused: operands on different devices, memory beyond the GPU's or beyond the process's
limit, a host's wait inside a recording. What it would be asked is counted: kernels, and calls for which the host waits.
Every tensor's memory is booked as torch's allocator would reserve it.

Not seen: numbers, time, fragmentation, the workspaces of cuBLAS, bitsandbytes (its 4-bit weights refuse fake tensors).
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

GIB, MIB = 2**30, 2**20
TOKEN = 7  # what every read-back of tokens returns: no end, no marker of the sampling kernels
_CONTEXT = 512 * MIB  # what a process takes of a GPU before its first tensor
# A build of torch without CUDA has nobody who switches to a tensor's GPU, and indexing asks for it.
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace { using NoGuard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>; }
C10_REGISTER_GUARD_IMPL(CUDA, NoGuard)
"""
# Operations that are no views by their schema and launch nothing all the same.
_NO_KERNEL = {"_reshape_alias", "_unsafe_view", "lift", "lift_fresh", "set_", "resize_"}
_WAITING = {"nonzero", "masked_select", "unique_dim", "_unique2", "_local_scalar_dense", "equal"}


def load_guard(folder: Path) -> None:
    """Compile and load the device guard; raises OSError or CalledProcessError where that is impossible."""
    from torch.utils.cpp_extension import include_paths, library_paths

    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(_GUARD)
    places = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    command = ["g++", "-std=c++20", "-shared", "-fPIC", *places, str(source), "-lc10", "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


@dataclass
class FakeGpu:
    """A GPU of `total` bytes, of which other processes hold `others`."""

    total: int
    others: int = 0
    capability: tuple[int, int] = (9, 0)
    live: int = 0
    reserved: int = 0
    peak: int = 0  # of `reserved`
    allowed: int | None = None
    has_context: bool = False

    @property
    def context(self) -> int:
        """The bytes of this process's context."""
        return _CONTEXT if self.has_context else 0

    @property
    def free(self) -> int:
        """The bytes that the driver would still give out."""
        return max(0, self.total - self.others - self.context - self.reserved)

    def take(self, size: int) -> None:
        """Reserve memory as torch's allocator does, after it gave back what it kept. Raises OutOfMemoryError."""
        self.has_context = True
        after = self.live + size
        if after > self.reserved:
            if after > (self.total if self.allowed is None else self.allowed) or (
                after > self.total - self.others - self.context
            ):
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size / MIB:.0f} MiB.")
            self.reserved = after
            self.peak = max(self.peak, after)
        self.live = after


class LaunchedPastLauncher(BaseException):
    """A Triton kernel was started by other code than the launcher. No handler of the engine takes it for a fault."""


@dataclass
class Booked:
    """What was asked of the GPUs since the last `clear`."""

    gpus: list[FakeGpu]
    kernels: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    recording: bool = False
    replays: int = 0

    def clear(self) -> None:
        """Forget what was counted; memory stays booked."""
        self.kernels.clear()
        self.waits.clear()
        self.replays = 0

    def wait(self, what: str) -> None:
        """Count a call for which the host waits. Raises RuntimeError inside a recording, as CUDA does."""
        if self.recording:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")
        self.waits[f"{what}, {_place()}"] += 1


def _place() -> str:
    """Return the line of the package, or else of a library, from which this was called."""
    frame, library = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if "/gxr_batch/" in name:
            return f"{name.rpartition('/gxr_batch/')[2]}:{frame.f_lineno}"
        if not library and "/site-packages/transformers/" in name:
            library = f"{name.rpartition('/site-packages/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return library


class _Booking(TorchDispatchMode):
    """Sees every operation of torch above the fake mode, and books it."""

    def __init__(self, booked: Booked) -> None:
        super().__init__()
        self._booked = booked
        self._sizes: dict[int, tuple[FakeGpu, int]] = {}
        self.pinned: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.partition("::")[2]
        kwargs = dict(kwargs or {})
        if function.namespace == "prim":
            return function(*args, **kwargs)
        if _is_composite(function):
            with self:
                made = function.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        pin = kwargs.pop("pin_memory", False)
        out = function(*args, **kwargs)
        for tensor in _tensors(out):
            self._book_memory(tensor)
            if pin:
                self.pinned.add(tensor.untyped_storage())
        self._book_call(function, name, args, kwargs, out)
        return out

    def _book_memory(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            size = -(-storage.nbytes() // 512) * 512
            if size >= 10 * MIB:
                size = -(-size // (2 * MIB)) * 2 * MIB
            gpu = self._booked.gpus[tensor.device.index or 0]
            gpu.take(size)
            self._sizes[key] = (gpu, size)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        gpu, size = self._sizes.pop(key)
        gpu.live -= size

    def _book_call(self, function: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        given, made = _tensors((args, kwargs)), _tensors(out)
        if not any(tensor.device.type == "cuda" for tensor in (*given, *made)):
            return
        if name in {"_to_copy", "copy_"}:
            source, target = (given[-1], given[0]) if name == "copy_" else (given[0], made[0])
            if source.device.type != target.device.type:
                host = source if source.device.type == "cpu" else target
                if not (kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))) or not self._is_pinned(
                    host
                ):
                    self._booked.wait(f"a copy from {source.device.type} to {target.device.type}")
                return
        if function.is_view or name in _NO_KERNEL or name.startswith(("empty", "new_empty")):
            return
        if name in _WAITING:
            self._booked.wait(name)
        if name.startswith(("index", "_index")) and any(one.device.type == "cpu" and one.dim() for one in given[1:]):
            self._booked.wait(f"{name} with indices on the host")
        self._booked.kernels[name] += 1

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage() in self.pinned


def _tensors(values: Any) -> list[torch.Tensor]:
    return [one for one in tree_iter(values) if isinstance(one, torch.Tensor)]


def _is_composite(function: Any) -> bool:
    kept = {"aten::linear", "aten::scaled_dot_product_attention"}
    return function._schema.name not in kept and torch._C._dispatch_has_kernel_for_dispatch_key(
        function.name(), "CompositeImplicitAutograd"
    )


class _Stream:
    def wait_stream(self, other: _Stream) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass


def _number(device: Any) -> int:
    if device is None:
        return 0
    return device if isinstance(device, int) else torch.device(device).index or 0


def _cuda(booked: Booked) -> dict[str, Any]:
    """Return replacements of the functions and classes of torch.cuda."""
    gpus = booked.gpus

    def gpu(device: Any = None) -> FakeGpu:
        return gpus[_number(device)]

    def memory(device: Any = None) -> tuple[int, int]:
        gpu(device).has_context = True
        return gpu(device).free, gpu(device).total

    def limit(fraction: float, device: Any = None) -> None:
        gpu(device).has_context = True
        gpu(device).allowed = int(fraction * gpu(device).total)

    def empty() -> None:
        for one in gpus:
            one.reserved = one.live

    class Event:
        def record(self, stream: Any = None) -> None:
            pass

        def synchronize(self) -> None:
            booked.wait("an event")

    class Graph:
        def replay(self) -> None:
            booked.replays += 1

    @contextmanager
    def graph(*_: Any, **__: Any) -> Iterator[None]:
        booked.recording = True
        try:
            yield
        finally:
            booked.recording = False

    @contextmanager
    def current(_: Any) -> Iterator[None]:
        yield

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: len(gpus),
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "mem_get_info": memory,
        "memory_allocated": lambda device=None: gpu(device).live,
        "memory_reserved": lambda device=None: gpu(device).reserved,
        "empty_cache": empty,
        "synchronize": lambda device=None: booked.wait("synchronize"),
        "set_per_process_memory_fraction": limit,
        "get_device_properties": lambda device=None: SimpleNamespace(
            name="fake", total_memory=gpu(device).total, uuid="0", multi_processor_count=100,
            major=gpu(device).capability[0], minor=gpu(device).capability[1],
        ),
        "get_device_capability": lambda device=None: gpu(device).capability,
        "is_bf16_supported": lambda including_emulation=True: including_emulation or gpus[0].capability >= (8, 0),
        "graph_pool_handle": lambda: (0, 1),
        "Stream": lambda *_, **__: _Stream(),
        "current_stream": lambda device=None: _Stream(),
        "stream": current,
        "CUDAGraph": Graph,
        "graph": graph,
        "Event": Event,
    }  # fmt: skip


def _reading(booked: Booked) -> dict[str, Callable[..., Any]]:
    """Return what fake tensors answer when the host reads them: the only place with numbers."""

    def number(tensor: torch.Tensor) -> Any:
        if tensor.device.type == "cuda":
            booked.wait("a number read back")
        return {True: 0.0}.get(tensor.dtype.is_floating_point, tensor.dtype == torch.bool or TOKEN)

    def tolist(tensor: torch.Tensor) -> Any:
        if tensor.device.type == "cuda":
            booked.wait("numbers read back")

        def nested(shape: tuple[int, ...]) -> Any:
            return [nested(shape[1:]) for _ in range(shape[0])] if shape else TOKEN

        return nested(tuple(tensor.shape))

    return {"tolist": tolist, "item": number, "__bool__": number, "__float__": number, "__int__": number}


def _without_bytes(tensor: Any, device: Any = None, dtype: Any = None) -> torch.Tensor:
    """Replace transformers' reading of one tensor of a weights file: its shape is real, its bytes are not read."""
    with _disable_current_modes():
        stored = tensor[...]
        shape, own = tuple(stored.shape), stored.dtype
    return torch.empty(shape, dtype=dtype or own, device=device or "cpu")


@contextmanager
def fake_cuda(*gpus: FakeGpu) -> Iterator[Booked]:
    """Let this process see these GPUs, and make every tensor of the block a fake one. `load_guard` comes first."""
    import transformers.core_model_loading as loading

    booked = Booked(list(gpus))
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # made before torch.cuda says that a GPU is there
    booking = _Booking(booked)

    def pinned(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
        copy = tensor.clone()
        booking.pinned.add(copy.untyped_storage())
        return copy

    def past_launcher(*_: Any, **__: Any) -> None:
        raise LaunchedPastLauncher

    def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
        booked.wait("equal")
        return a.shape == b.shape

    with ExitStack() as stack:

        def replace(owner: Any, values: dict[str, Any]) -> None:
            for name, value in values.items():
                stack.enter_context(mock.patch.object(owner, name, value))

        replace(torch.cuda, _cuda(booked))
        replace(torch, {"equal": equal})
        replace(torch.Tensor, {"pin_memory": pinned})
        replace(FakeTensor, _reading(booked))
        replace(FakeTensorMode, {"avoid_device_init": True})
        replace(loading, {"_materialize_copy": _without_bytes})
        for kernel in _kernel_types():
            replace(kernel, {"__getitem__": past_launcher})
        stack.enter_context(mock.patch.dict("os.environ", {"HF_DEACTIVATE_ASYNC_LOAD": "1"}))  # modes are by thread
        stack.enter_context(fake)
        stack.enter_context(booking)
        yield booked


def _kernel_types() -> list[type]:
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import KernelInterface

    return [kind for kind in (KernelInterface, InterpretedFunction) if "__getitem__" in vars(kind)]
