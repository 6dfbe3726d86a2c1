"""A device as the memory manners need it: how much is free, how much this run may take, who holds the rest.

Small on purpose, so that a fake whose memory shrinks and grows can stand in for a graphics card. The CUDA half follows
torch.cuda's documentation of mem_get_info, set_per_process_memory_fraction, empty_cache and memory_reserved.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from gxr_batch.errors import ModelUnavailable

_NVIDIA_SMI = ("nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits")
_NVIDIA_SMI_SECONDS = 10


class Device(Protocol):
    """Memory in bytes. `name` is torch's name of the device."""

    name: str

    def total(self) -> int:
        """All memory of the device."""
        ...

    def free(self) -> int:
        """What nobody has taken at this moment."""
        ...

    def held(self) -> int:
        """What this process has taken of it, as far as it counts against its limit."""
        ...

    def limit(self, size: int) -> None:
        """Keep this process below so many bytes from now on."""
        ...

    def holders(self) -> Sequence[str]:
        """Name the processes that hold memory here, where the system tells."""
        ...


class Cuda:
    """A graphics card by its number among those that this process sees."""

    def __init__(self, number: int) -> None:
        self.name, self._number = f"cuda:{number}", number

    def total(self) -> int:
        """All memory of the card."""
        import torch

        return int(torch.cuda.mem_get_info(self._number)[1])

    def free(self) -> int:
        """What the driver would still give out."""
        import torch

        return int(torch.cuda.mem_get_info(self._number)[0])

    def held(self) -> int:
        """What torch's allocator has reserved; the CUDA context itself (some hundred MiB) is not counted."""
        import torch

        return int(torch.cuda.memory_reserved(self._number))

    def limit(self, size: int) -> None:
        """Let torch's allocator refuse what would go past the limit, even where the card has room."""
        import torch

        torch.cuda.set_per_process_memory_fraction(min(1.0, size / self.total()), self._number)

    def holders(self) -> Sequence[str]:
        """Ask the driver's own tool, which sees other users' processes too (inside containers often none)."""
        import torch

        card = f"--id=GPU-{torch.cuda.get_device_properties(self._number).uuid}"
        try:
            asked = subprocess.run(
                [*_NVIDIA_SMI, card], capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return ()
        return holders_of(asked.stdout) if asked.returncode == 0 else ()


class Cpu:
    """The main memory. Its limit is a budget for the KV cache, which the caller keeps: nothing enforces it."""

    name = "cpu"

    def total(self) -> int:
        """All memory of the machine."""
        import psutil

        return int(psutil.virtual_memory().total)

    def free(self) -> int:
        """What programs can take without swapping."""
        import psutil

        return int(psutil.virtual_memory().available)

    def held(self) -> int:
        """Nothing: the budget is for the cache, which is not there yet when it is asked for."""
        return 0

    def limit(self, size: int) -> None:
        """Leave it to the caller."""

    def holders(self) -> Sequence[str]:
        """Name the three largest processes."""
        import psutil

        running = [process.info for process in psutil.process_iter(["pid", "name", "memory_info"])]
        largest = sorted((one for one in running if one["memory_info"]), key=lambda one: -one["memory_info"].rss)[:3]
        return [f"process {one['pid']} ({one['name']}): {gib(one['memory_info'].rss)}" for one in largest]


def visible() -> list[Device]:
    """Return the graphics cards that this process sees, else the main memory."""
    import torch

    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [Cuda(number) for number in range(cards)] or [Cpu()]


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out; torch's CPU allocator says so in words only."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return type(error) is RuntimeError and "DefaultCPUAllocator" in str(error)


@contextmanager
def no_memory_is(refusal: ModelUnavailable) -> Iterator[None]:
    """Raise `refusal`, which says what to change, where the block finds no memory."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise refusal from None


def holders_of(listing: str) -> list[str]:
    """Turn lines of "pid, path, MiB" into phrases; the path is cut to the program's name."""
    found = []
    for line in listing.splitlines():
        pid, _, rest = line.partition(",")
        path, _, size = rest.rpartition(",")
        if pid.strip().isdecimal() and size.strip().isdecimal():
            program = path.strip().split()[0].rpartition("/")[2] if path.strip() else "unknown"
            found.append(f"process {pid.strip()} ({program}): {gib(int(size) * 2**20)}")
    return found


def gib(size: int) -> str:
    """Spell bytes in GiB."""
    return f"{size / 2**30:,.1f} GiB"
