"""A device's memory and this run's share of it: which device to use, how much of it, and how long to wait for memory.

Small on purpose, so that tests can replace a GPU by a fake whose free memory changes. The CUDA half follows
torch.cuda's documentation of mem_get_info, set_per_process_memory_fraction, empty_cache and memory_reserved.
"""

from __future__ import annotations

import gc
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from gxr_batch.cells import quoted
from gxr_batch.errors import ModelUnavailable, OutOfTime
from gxr_batch.job import EngineSection
from gxr_batch.job.units import parse_bytes, parse_duration
from gxr_batch.models.cgroup_memory import memory_limits

if TYPE_CHECKING:
    import torch

_NVIDIA_SMI_HOLDERS = "--query-compute-apps=pid,process_name,used_memory"
_NVIDIA_SMI_MEMORY = "--query-gpu=memory.total,memory.free"
_NVIDIA_SMI_SECONDS = 10
# What a process takes of a GPU besides tensors: the CUDA context, and the code of kernels. Assumed, not measured.
CONTEXT_BYTES = 512 * 2**20
# The driver counts up to so much more of a GPU than CUDA does. More is another GPU: a slice's (MIG) whole one.
_RESERVED_BY_DRIVER = 1.1
# How errors that are no OutOfMemoryError say that memory ran out.
_MEMORY_WORDS = (
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
)


class Device(Protocol):
    """Memory in bytes. `name` is torch's name of the device.

    `context` is what using the device takes besides tensors, and counts against this process's limit.
    """

    name: str
    context: int

    def total(self) -> int:
        """All memory of the device."""
        ...

    def free(self) -> int:
        """The memory that is free now, for tensors of this process."""
        ...

    def held(self) -> int:
        """The memory that this process holds for tensors, as far as it counts against its limit."""
        ...

    def limit(self, size: int) -> None:
        """Limit this process's tensors to this many bytes from now on."""
        ...

    def holders(self) -> Sequence[str]:
        """Name the processes that hold memory here, if the system lists them."""
        ...


class Cuda:
    """A GPU, by its number among those that this process sees."""

    context = CONTEXT_BYTES

    def __init__(self, number: int) -> None:
        self.name, self._number = f"cuda:{number}", number

    def total(self) -> int:
        """All memory of the GPU."""
        import torch

        return int(torch.cuda.get_device_properties(self._number).total_memory)

    def free(self) -> int:
        """The memory that the driver would still give out for tensors.

        CUDA answers only with a context on the GPU, which takes hundreds of MiB until this process ends. So if there
        are several GPUs, nvidia-smi is asked about those that this process does not use; if it has no answer, CUDA is.
        """
        import torch

        if torch.cuda.device_count() > 1 and not torch.cuda.memory_reserved(self._number):
            listed = free_of(self._nvidia_smi(_NVIDIA_SMI_MEMORY), self.total())
            if listed is not None:
                return max(0, listed - self.context)
        return int(torch.cuda.mem_get_info(self._number)[0])

    def held(self) -> int:
        """What torch's allocator has reserved."""
        import torch

        return int(torch.cuda.memory_reserved(self._number))

    def limit(self, size: int) -> None:
        """Have torch's allocator refuse to exceed the limit, even if the GPU has free memory."""
        import torch

        torch.cuda.set_per_process_memory_fraction(min(1.0, size / self.total()), self._number)

    def holders(self) -> Sequence[str]:
        """List the processes from nvidia-smi, including other users' (inside containers often none)."""
        return holders_of(self._nvidia_smi(_NVIDIA_SMI_HOLDERS))

    def _nvidia_smi(self, query: str) -> str:
        """Return what nvidia-smi lists of this GPU, "" if it cannot; by UUID, since it numbers GPUs differently."""
        import torch

        uuid = getattr(torch.cuda.get_device_properties(self._number), "uuid", "")
        command = ["nvidia-smi", query, "--format=csv,noheader,nounits", f"--id=GPU-{uuid}"]
        try:
            asked = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",  # a path of another user's program
                timeout=_NVIDIA_SMI_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return asked.stdout if asked.returncode == 0 else ""


class Cpu:
    """The main memory, or what a container or a batch system leaves of it to this process.

    Its limit is a budget for the KV cache, which the caller must respect: nothing enforces it.
    """

    name, context = "cpu", 0

    def total(self) -> int:
        """All memory of the machine, or of the container."""
        import psutil

        return min([int(psutil.virtual_memory().total), *(limit.size for limit in memory_limits())])

    def free(self) -> int:
        """The memory that programs can take without swapping, and without being killed for it."""
        import psutil

        return min([int(psutil.virtual_memory().available), *(limit.free for limit in memory_limits())])

    def held(self) -> int:
        """Return 0: the budget is for the cache, which does not exist yet when this is asked."""
        return 0

    def limit(self, size: int) -> None:
        """Do nothing; the caller respects the limit."""

    def holders(self) -> Sequence[str]:
        """Name the three largest processes."""
        import psutil

        running = [process.info for process in psutil.process_iter(["pid", "name", "memory_info"])]
        largest = sorted((one for one in running if one["memory_info"]), key=lambda one: -one["memory_info"].rss)[:3]
        return [f"process {one['pid']} ({quoted(one['name'])}): {gib(one['memory_info'].rss)}" for one in largest]


def visible() -> list[Device]:
    """Return the GPUs that this process sees, else the main memory."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [Cuda(number) for number in range(gpus)] or [Cpu()]


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out.

    torch's CPU allocator, cuBLAS, cuDNN and the CUDA runtime tell it only in the message of an error of another type.
    """
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _MEMORY_WORDS)


def is_lost(device: torch.device) -> bool:
    """Return whether a GPU reports an error that this process cannot recover from, such as an illegal address.

    Such an error is raised by whichever call comes next, as a type of torch or of Triton, so its type does not tell.
    """
    import torch

    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def cached_bytes(device: torch.device) -> int:
    """Return the bytes that torch's allocator keeps of a GPU without a tensor in them, 0 on any other device."""
    import torch

    if device.type != "cuda":
        return 0
    return int(torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def release_cached() -> None:
    """Give unused GPU memory back to the driver, also that of tensors which only a cycle of objects keeps alive.

    Call it outside the handler of a failure: its traceback keeps tensors alive.
    """
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def no_memory_is(refusal: ModelUnavailable) -> Iterator[None]:
    """Raise `refusal`, which explains what to change, if the block runs out of memory."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise refusal from None


def free_of(listing: str, total: int) -> int | None:
    """Convert a line "total, free" in MiB to the free bytes of a GPU on which CUDA counts `total`, None if it cannot.

    A GPU that is divided (MIG) is listed as a whole or without numbers; then the answer is None too.
    """
    numbers = [word.strip() for word in listing.strip().split(",")]
    if len(numbers) != 2 or not all(word.isdecimal() for word in numbers):
        return None
    listed, free = (int(word) * 2**20 for word in numbers)
    return free if total <= listed + 2**20 and listed <= _RESERVED_BY_DRIVER * total else None


def holders_of(listing: str) -> list[str]:
    """Convert lines of "pid, path, MiB" to phrases; the path is cut to the program's name."""
    found = []
    for line in listing.splitlines():
        pid, _, rest = line.partition(",")
        path, _, size = rest.rpartition(",")
        if pid.strip().isdecimal() and size.strip().isdecimal():
            program = path.strip().split()[0].rpartition("/")[2] if path.strip() else "unknown"
            found.append(f"process {pid.strip()} ({quoted(program)}): {gib(int(size) * 2**20)}")
    return found


def gib(size: int) -> str:
    """Format bytes in GiB."""
    return f"{size / 2**30:,.1f} GiB"


Say = Callable[[str], None]
_LOOK_SECONDS = 5.0
_SAY_SECONDS = 300.0
_HOLDERS_NAMED = 5
# The share of the memory left after the weights that the KV cache may take. Without a limit half is left to other
# processes and to activations; the rest of a limit belongs to this run alone, and activations need little of it.
_CACHE_SHARE, _CACHE_SHARE_OF_LIMIT = 0.5, 0.8


class MemoryBudget:
    """`engine.memory_limit` and `engine.wait_for_memory` over the visible devices."""

    def __init__(
        self,
        settings: EngineSection,
        say: Say = lambda _: None,
        until: float = float("inf"),
        *,
        devices: Sequence[Device] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`say` gets sentences for the user while waiting, which ends at `until` (seconds of `clock`).

        The other arguments are for tests.
        """
        self.devices = visible() if devices is None else list(devices)
        self.size_limit = parse_bytes(settings.memory_limit)
        self.wait_seconds = parse_duration(settings.wait_for_memory) or 0.0
        self._say, self._until, self._clock, self._sleep = say, until, clock, sleep

    def named(self, device_map: str) -> list[Device]:
        """Return the devices that `model.device_map` allows. Raises ModelUnavailable if there are none."""
        if device_map == "auto":
            return self.devices
        if device_map == "cpu":
            return [self.at("cpu")]
        wanted = "cuda:0" if device_map == "cuda" else device_map
        if found := [device for device in self.devices if device.name == wanted]:
            return found
        here = ", ".join(dict.fromkeys(["cpu", *(device.name for device in self.devices)]))
        raise ModelUnavailable(
            f"This machine has no device {device_map}.",
            where="model.device_map",
            next_step=f'choose "auto" or one of: {here}',
        )

    def at(self, place: object) -> Device:
        """Return the device with this torch name; the main memory if it is none of the visible ones."""
        return next((device for device in self.devices if device.name == str(place)), Cpu())

    def free(self, device: Device) -> int:
        """Return the bytes of a device that this run may still take."""
        left = device.free()
        limit = self._limit_of(device)
        return left if limit is None else max(0, min(left, limit - device.held()))

    def capacity(self, device: Device) -> int:
        """Return the bytes of a device that this run could take if no other process used it."""
        limit = self._limit_of(device)
        total = device.total() - device.context
        return total if limit is None else min(total, limit)

    def for_cache(self, device: Device, *, weight_bytes: int = 0, held: int = 0) -> int:
        """Return the bytes that the KV cache may take.

        `weight_bytes` are still to be loaded; `held` are the cache's already, and part of the result.
        """
        if device.name == "cpu" and self.size_limit is not None:
            return self.size_limit
        return int(
            max(0, self.free(device) + held - weight_bytes)
            * (_CACHE_SHARE if self.size_limit is None else _CACHE_SHARE_OF_LIMIT)
        )

    def _limit_of(self, device: Device) -> int | None:
        """Return the limit of tensors; on the CPU none, since there it is only the budget of the KV cache."""
        if device.name == "cpu" or self.size_limit is None:
            return None
        return max(0, self.size_limit - device.context)

    def by_device(self, weights_share: float) -> dict[int | str, int]:
        """Return what the weights may take of each GPU and of the main memory, as accelerate's max_memory.

        `weights_share` is the weights' part of what a model needs: each GPU also holds the keys and values of its
        layers.
        """
        gpus = {number: int(weights_share * self.free(device)) for number, device in enumerate(self.devices)}
        return gpus | {"cpu": Cpu().free()}

    def freest(self, devices: Sequence[Device]) -> Device:
        """Return the device with the most memory for this run."""
        return max(devices, key=self.free)

    def keep_to_limit(self, device: Device) -> None:
        """Apply this process's limit on a device, before anything is loaded."""
        if (limit := self._limit_of(device)) is not None:
            device.limit(limit)

    def wait(self, devices: Sequence[Device], needed: int) -> Device:
        """Return the freest device, once it has `needed` bytes.

        Reports at once, and every few minutes, which processes hold the device. Does not wait for more than any device
        has. Raises ModelUnavailable after wait_for_memory, OutOfTime if the run has to stop before that.
        """
        began = self._clock()
        said = float("-inf")
        hopeless = all(self.capacity(device) < needed for device in devices)
        while self.free(device := self.freest(devices)) < needed:
            now = self._clock()
            if hopeless or now - began >= self.wait_seconds:
                raise self.too_little(device, needed, waited=now - began)
            if now >= self._until:
                raise OutOfTime(self.too_little(device, needed, waited=now - began).what)
            left = min(began + self.wait_seconds, self._until) - now
            if now - said >= _SAY_SECONDS:
                said = now
                self._say(
                    f"Waiting for memory on {device.name}: {gib(needed)} needed, {gib(self.free(device))} free"
                    f"{_named(device)}. Gives up after {left / 60:,.0f} more minutes."
                )
            self._sleep(min(_LOOK_SECONDS, left))
        return device

    def too_little(self, device: Device, needed: int, *, waited: float = 0.0) -> ModelUnavailable:
        """Return the error that names how much is missing, and which processes hold memory."""
        after = f" after {waited / 60:,.0f} minutes of waiting" if waited else ""
        return ModelUnavailable(
            f"There is too little memory on {device.name}{after}: {gib(needed)} needed, {gib(self.free(device))} free"
            f"{_named(device)}.",
            where="engine.memory_limit" if self.size_limit else device.name,
            next_step='free memory, set engine.wait_for_memory = "30m", raise engine.memory_limit, or begin a run with '
            "model.load_in_4bit = true",
        )


def _named(device: Device) -> str:
    holders = list(device.holders())
    more = f" and {len(holders) - _HOLDERS_NAMED} more" if len(holders) > _HOLDERS_NAMED else ""
    return f", held by {'; '.join(holders[:_HOLDERS_NAMED])}{more}" if holders else ""
