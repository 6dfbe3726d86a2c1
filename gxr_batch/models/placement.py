"""Decides where a model goes and in which number format, by the memory that this run may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gxr_batch.job import ModelSection
from gxr_batch.models.device_memory import Device, MemoryBudget
from gxr_batch.models.memory_estimate import bytes_needed, fits, four_bit_bytes, row_bytes

SPREAD = "auto"  # accelerate's word for dividing a model among the devices


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How a model is loaded: torch device or "auto" (spread by accelerate), dtype by name, in 4 bits or not.

    `bytes_needed` is the device memory for the weights (`weight_bytes`) and the rows that must fit beside them.
    `stored_in_four_bits`: the files already hold 4-bit weights, and nothing is left to choose.
    """

    device: str
    dtype: str
    four_bit: bool
    bytes_needed: int = 0
    weight_bytes: int = 0
    stored_in_four_bits: bool = False
    notices: tuple[str, ...] = ()


def place(
    section: ModelSection, config: Any, weight_bytes: int, memory: MemoryBudget, *, stored_in_four_bits: bool = False
) -> Placement:
    """Decide device, number format and quantisation; `weight_bytes` is the size of the weight files.

    With engine.wait_for_memory it is decided by what the device could give, and then waited for; without, by what is
    free now. Raises ModelUnavailable if the named device is not here, or stays full for too long.
    """
    devices = memory.named(section.device_map)
    on_cuda = devices[0].name != "cpu"
    dtype = section.dtype if section.dtype != "auto" else _best_dtype(on_cuda)
    a_row = row_bytes(config, section.max_seq_length, 4 if dtype == "float32" else 2)
    full = weight_bytes * (2 if dtype == "float32" and not stored_in_four_bits else 1)
    seen = memory.capacity if memory.wait_seconds else memory.free
    most = max(seen(device) for device in devices)
    chosen_here = section.load_in_4bit == "auto" and not stored_in_four_bits
    four_bit = (
        on_cuda and not fits(full, a_row, most) if chosen_here else stored_in_four_bits or bool(section.load_in_4bit)
    )
    weights = four_bit_bytes(weight_bytes) if four_bit and not stored_in_four_bits else full
    notices = []
    if four_bit and chosen_here:
        notices.append("The model is loaded in 4 bits, because it does not fit the memory of the device otherwise.")
    spread = on_cuda and section.device_map == "auto" and not fits(weights, a_row, most)
    if spread:
        device = SPREAD
        notices.append(_spread_over(devices, memory))
    else:
        chosen = _settle_on(devices, bytes_needed(weights, a_row), memory)
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


def _spread_over(devices: list[Device], memory: MemoryBudget) -> str:
    for one in devices:
        memory.keep_to_limit(one)
    others = "the cards and the main memory" if len(devices) > 1 else "the card and the main memory"
    return f"The model is spread over {others}, because no single card has room for it."


def _settle_on(devices: list[Device], needed: int, memory: MemoryBudget) -> Device:
    chosen = memory.wait(devices, needed) if memory.wait_seconds else memory.freest(devices)
    memory.keep_to_limit(chosen)
    return chosen


def _best_dtype(on_cuda: bool) -> str:
    """Return bfloat16 where the hardware computes in it, else float32."""
    import torch

    if on_cuda:
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # There is no public name for the question; a torch without this one gets the safe answer.
        ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        has_it = ask is not None and bool(ask())
    return "bfloat16" if has_it else "float32"
