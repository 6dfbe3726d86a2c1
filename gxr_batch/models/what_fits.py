"""Computes what fits this machine's memory from a model's configuration: weights are neither downloaded nor read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gxr_batch.errors import ModelUnavailable
from gxr_batch.job import EngineSection, ModelSection
from gxr_batch.models.device_memory import Device, MemoryBudget
from gxr_batch.models.load_weights import load_config
from gxr_batch.models.memory_estimate import four_bit_bytes, kv_bytes_a_token, weight_bytes
from gxr_batch.models.placement import SPREAD, Placement, WhyNoKernels, no_kernels, place
from gxr_batch.models.quantization import stored_in_four_bits
from gxr_batch.models.source import find


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Where a model would go, and how much memory would be left there for the rows' keys and values.

    `free_bytes` is what this run may take, `cache_bytes` the part of it for the cache after the weights; `longest` is
    the most tokens that the model supports, 0 if unknown.
    """

    placement: Placement
    free_bytes: int
    cache_bytes: int
    bytes_a_token: int
    longest: int


class _NoWait(MemoryBudget):
    """Tells what a run would do that may wait for memory, without waiting."""

    def wait(self, devices: Sequence[Device], needed: int) -> Device:
        """Return the device that a run with engine.wait_for_memory would wait for."""
        return self.freest(devices) if self.wait_seconds else super().wait(devices, needed)


def measure(section: ModelSection, engine: EngineSection, why_no_kernels: WhyNoKernels = no_kernels) -> Measured:
    """Measure how much of a device a model would leave; `why_no_kernels` as in `load_weights.load_model`.

    Raises ModelUnavailable if its device does not exist or is too full now, JobFileError.
    """
    from gxr_batch.models.read_weights import bytes_in_16_bits, without_weights

    memory = _NoWait(engine)
    base = find(section, weights=False).base
    whole = load_config(section)
    config = whole.get_text_config()
    stored = stored_in_four_bits(whole)
    try:
        size = bytes_in_16_bits(base, whole)
    except (ModelUnavailable, OSError):  # not downloaded yet; or damaged, which is reported later
        size = four_bit_bytes(weight_bytes(config)) if stored else weight_bytes(config)
    placement = place(
        section,
        config,
        size,
        memory,
        stored_in_four_bits=stored,
        why_no_kernels=lambda: why_no_kernels(without_weights(base, whole)),
    )
    devices = memory.named(section.device_map)
    device = memory.freest(devices) if placement.device == SPREAD else memory.at(placement.device)
    return Measured(
        placement=placement,
        free_bytes=memory.free(device),
        cache_bytes=memory.for_cache(device, weight_bytes=placement.weight_bytes),
        bytes_a_token=kv_bytes_a_token(config, 4 if placement.dtype == "float32" else 2),
        longest=int(getattr(config, "max_position_embeddings", None) or 0),
    )
