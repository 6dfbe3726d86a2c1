"""Decides a model's device and number format from the memory that this run may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gxr_batch.errors import JobFileError
from gxr_batch.job import ModelSection
from gxr_batch.models.device_memory import Device, MemoryBudget
from gxr_batch.models.memory_estimate import bytes_needed, fits, four_bit_bytes, row_bytes

SPREAD = "auto"  # accelerate's name for dividing a model among the devices

# Why an engine's own GPU kernels cannot run a model (made without weights), empty if they can.
WhyNoKernels = Callable[[Any], str]


NO_KERNELS = "this engine has no GPU kernels"


def no_kernels(_: Any) -> str:
    """Return why an engine without kernels for GPUs cannot run a model with them."""
    return NO_KERNELS


def overflows_in_float16(config: Any) -> bool:
    """Return whether the library's forward pass of a text configuration needs numbers that float16 does not have."""
    return str(config.model_type).startswith("gemma3")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How a model is loaded: torch device or "auto" (spread by accelerate), dtype by name, in 4 bits or not.

    `bytes_needed` is the device memory for the weights (`weight_bytes`) plus the rows that must fit.
    `stored_in_four_bits`: the files already hold 4-bit weights, so there is no choice.
    """

    device: str
    dtype: str
    four_bit: bool
    bytes_needed: int = 0
    weight_bytes: int = 0
    stored_in_four_bits: bool = False
    notices: tuple[str, ...] = ()

    @property
    def weights_share(self) -> float:
        """The weights' part of `bytes_needed`."""
        return self.weight_bytes / self.bytes_needed if self.bytes_needed else 1.0


def place(
    section: ModelSection,
    config: Any,
    weight_bytes: int,
    memory: MemoryBudget,
    *,
    stored_in_four_bits: bool = False,
    why_no_kernels: Callable[[], str] = lambda: NO_KERNELS,
) -> Placement:
    """Decide device, number format and quantisation; `weight_bytes` are those of 16-bit or quantised weights.

    Neither the number format of a run nor whether its model is spread may depend on what other processes hold now: a
    model that a device can hold waits for it as engine.wait_for_memory says, and is refused after that.
    `why_no_kernels` returns why the engine's own GPU kernels cannot run the model, empty if they can: with them a GPU
    without bfloat16 gets float16. Raises ModelUnavailable if the named device does not exist, or stays full for too
    long, JobFileError if float16 is asked for where the model overflows in it.
    """
    devices = memory.named(section.device_map)
    on_cuda = _is_gpu(devices[0])
    if _asks_too_much(section, config):
        refuse_float16(section, config, why_no_kernels() if on_cuda else "there is no GPU")
    dtype, alike = _number_format(section, devices, memory)
    most = max(memory.capacity(device) for device in alike)
    if section.dtype == "auto" and dtype == "float32" and on_cuda and not stored_in_four_bits:
        half_row = row_bytes(config, section.max_seq_length, 2)
        if section.load_in_4bit is not True and fits(weight_bytes, half_row, most) and not why_no_kernels():
            dtype = "float16"
    a_row = row_bytes(config, section.max_seq_length, 4 if dtype == "float32" else 2)
    full = weight_bytes * (2 if dtype == "float32" and not stored_in_four_bits else 1)
    chosen_here = section.load_in_4bit == "auto" and not stored_in_four_bits
    four_bit = (
        on_cuda and not fits(full, a_row, most) if chosen_here else stored_in_four_bits or bool(section.load_in_4bit)
    )
    weights = four_bit_bytes(weight_bytes) if four_bit and not stored_in_four_bits else full
    spread = on_cuda and section.device_map == "auto" and not fits(weights, a_row, most)
    if four_bit or spread:
        refuse_float16(section, config, "its weights are in 4 bits" if four_bit else "it does not fit on a single GPU")
    notices = []
    if four_bit and chosen_here:
        notices.append("The model is loaded in 4 bits, because otherwise it does not fit the device's memory.")
    if spread:
        device = SPREAD
        notices.append(_spread_over(devices, memory))
    else:
        must_fit = on_cuda and fits(weights, a_row, most)
        chosen = _settle_on(alike, bytes_needed(weights, a_row), memory, must_fit=must_fit)
        device = chosen.name
        if on_cuda and section.device_map == "auto":
            notices.append(f"The model is on {device}, the device with the most free memory.")
    return Placement(
        device=device,
        dtype=dtype,
        four_bit=four_bit,
        bytes_needed=bytes_needed(weights, a_row),
        weight_bytes=weights,
        stored_in_four_bits=stored_in_four_bits,
        notices=tuple(notices),
    )


def _number_format(section: ModelSection, devices: list[Device], memory: MemoryBudget) -> tuple[str, list[Device]]:
    """Return the number format, and the devices that have it: if the job leaves it open, that of the largest device."""
    if section.dtype != "auto":
        return str(section.dtype), devices
    largest = max(devices, key=lambda one: (memory.capacity(one), _best_dtype(one) == "bfloat16", memory.free(one)))
    dtype = _best_dtype(largest)
    return dtype, [device for device in devices if _best_dtype(device) == dtype]


def _is_gpu(device: Device) -> bool:
    return device.name != "cpu"


def _asks_too_much(section: ModelSection, config: Any) -> bool:
    return section.dtype == "float16" and overflows_in_float16(config)


def refuse_float16(section: ModelSection, config: Any, reason: str) -> None:
    """Raise JobFileError if a job asks for float16 where the model overflows in it; unless the reason is empty."""
    if reason and _asks_too_much(section, config):
        raise JobFileError(
            "Gemma 3 overflows in float16 and then returns empty text; only this program's GPU kernels can run it so, "
            f"and here they cannot: {reason}.",
            where="model.dtype",
            next_step='use "auto", "bfloat16" or "float32"; a run that began in float16 can be resumed where the '
            "kernels run, or start from scratch with --fresh",
        )


def _spread_over(devices: list[Device], memory: MemoryBudget) -> str:
    for one in devices:
        memory.keep_to_limit(one)
    others = "the GPUs and the main memory" if len(devices) > 1 else "the GPU and the main memory"
    return f"The model is spread over {others}, because it does not fit on a single GPU."


def _settle_on(devices: list[Device], needed: int, memory: MemoryBudget, *, must_fit: bool) -> Device:
    chosen = memory.wait(devices, needed) if memory.wait_seconds or must_fit else memory.freest(devices)
    memory.keep_to_limit(chosen)
    return chosen


def _best_dtype(device: Device) -> str:
    """Return bfloat16 if a device computes in it, else float32."""
    import torch

    if device.name != "cpu":
        # torch.cuda.is_bf16_supported would answer for the current GPU.
        has_it = torch.version.hip is not None or torch.cuda.get_device_capability(device.name) >= (8, 0)
    else:
        # There is no public function for this; a torch without this one gets the safe answer.
        ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        has_it = ask is not None and bool(ask())
    return "bfloat16" if has_it else "float32"
