"""Opens the engine: loads the model, picks the driver and the number of slots, and checks both on fixed prompts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import psutil
import torch

from gxr_batch.engines.base import EngineInfo
from gxr_batch.engines.transformers.driver import PREFIX_SLOTS, Driver
from gxr_batch.engines.transformers.library import LibraryModel
from gxr_batch.engines.transformers.loop import TransformersSession
from gxr_batch.engines.transformers.native.build import NativeUnavailable
from gxr_batch.engines.transformers.native.model import NativeModel
from gxr_batch.engines.transformers.schedule import slots_for_memory
from gxr_batch.engines.transformers.support import why_not_drivable
from gxr_batch.errors import ModelUnavailable
from gxr_batch.job import Job
from gxr_batch.models.loading import LoadedModel, load_model
from gxr_batch.models.local import LocalModel

# Of the memory that is free once the weights are there, what the KV cache may take where no limit is set.
_CACHE_SHARE = 0.5
_MOST_SLOTS = 64
_CHECK_LENGTHS = (5, 70)


@contextmanager
def open_session(job: Job, local: LocalModel) -> Iterator[TransformersSession]:
    """Load the model, with torch on as many threads as the job says, and free both afterwards.

    Raises ModelUnavailable where it cannot be loaded, driven, or does not pass the self-check.
    """
    began = time.monotonic()
    threads = torch.get_num_threads()
    torch.set_num_threads(job.engine.threads or threads)
    driver: Driver | None = None
    try:
        tokenizer = local.tokenizer()
        loaded = load_model(job.model, tokenizer)
        slots = _slots(job, loaded)
        try:
            driver = _driver(job, loaded, slots)
            if job.engine.self_check:
                self_check(driver)
        except (MemoryError, torch.OutOfMemoryError):
            raise ModelUnavailable(
                f"There is no memory for {slots} rows of {job.model.max_seq_length} tokens.",
                where="engine.slots, model.max_seq_length",
                next_step="lower one of them, or free memory",
            ) from None
        notices = list(loaded.placement.notices)
        # Measured: the library's forward keeps its bits in bfloat16 on the CPU. In float32 products of other row counts
        # round otherwise, and no card has been tried.
        plain = loaded.placement.dtype == "bfloat16" and loaded.device == "cpu" and job.engine.reproducible
        reproducible = isinstance(driver, NativeModel) or plain
        if job.engine.reproducible and not reproducible:
            notices.append("Here the last bits of a row's numbers may depend on its neighbours, and rarely its text.")
        info = EngineInfo(
            identity=local.identity(),
            device=loaded.device,
            dtype=loaded.placement.dtype,
            quantization=loaded.quantization,
            slots=slots,
            load_seconds=time.monotonic() - began,
            reproducible=reproducible,
            versions={"torch": version("torch"), "transformers": version("transformers"), "forward": driver.name},
            notices=tuple(notices),
        )
        yield TransformersSession(info, driver, tokenizer, frozenset(loaded.end_ids), job.sampling.settings())
    finally:
        if driver is not None:
            driver.close()
        torch.set_num_threads(threads)


def _slots(job: Job, loaded: LoadedModel) -> int:
    if job.engine.slots != "auto":
        return job.engine.slots
    device = loaded.model.get_input_embeddings().weight.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    bytes_a_token = kv_bytes_a_token(loaded.config, torch.finfo(loaded.model.dtype).bits // 8)
    prefixes = PREFIX_SLOTS * bytes_a_token * job.model.max_seq_length
    return slots_for_memory(int(free * _CACHE_SHARE) - prefixes, bytes_a_token, job.model.max_seq_length, _MOST_SLOTS)


def kv_bytes_a_token(config: Any, element_bytes: int) -> int:
    """Return the bytes that one token takes in the caches of all layers, which keep full rows whatever their window."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers * heads * head_dim * 2 * element_bytes)


def _driver(job: Job, loaded: LoadedModel, slots: int) -> Driver:
    capacity = job.model.max_seq_length
    try:
        return NativeModel(loaded.model, slots=slots, capacity=capacity)
    except NativeUnavailable:
        pass
    reason = why_not_drivable(loaded.config)
    if reason:
        raise ModelUnavailable(
            f"This engine cannot drive the model: {reason}.",
            where='engine.kind = "transformers"',
            next_step='set engine.kind = "generate"',
        )
    return LibraryModel(loaded.model, slots=slots, capacity=capacity, reproducible=job.engine.reproducible)


def self_check(driver: Driver) -> None:
    """Run a short and a long fixed prompt alone and side by side. Raises ModelUnavailable unless they agree.

    Finds broken kernels, masks and number formats before a night is spent on them; takes well under a second.
    """
    prompts = [[2 + (7 * step) % min(driver.vocab - 2, 1000) for step in range(length)] for length in _CHECK_LENGTHS]
    prompts = [ids[: driver.capacity - 4] for ids in prompts]
    if driver.slots == 1:
        prompts = prompts[1:]  # nothing can stand beside anything
    alone = [_first_tokens(driver, [ids]) for ids in prompts]
    together = _first_tokens(driver, prompts)
    if together != [tokens for (tokens,) in alone]:
        raise ModelUnavailable(
            "The self-check failed: a prompt gives other tokens beside another one than alone.",
            where=f"engine.self_check, {driver.name}",
            next_step='set engine.kind = "generate", or report this with the versions in run.json',
        )


def _first_tokens(driver: Driver, prompts: Sequence[list[int]], count: int = 3) -> list[list[int]]:
    """Return the first greedy tokens of prompts decoded side by side."""
    rows = len(prompts)
    logits = driver.prefill([(slot, prompts[slot], 0) for slot in range(rows)])
    tokens: list[list[int]] = [[] for _ in range(rows)]
    for step in range(count):
        if not bool(logits.isfinite().all()):
            raise ModelUnavailable(
                "The self-check failed: the model's logits are not finite numbers.",
                where=f"engine.self_check, {driver.name}",
                next_step='try model.dtype = "float32"; if that helps, the weights do not suit this number format',
            )
        for row, token in enumerate(logits.argmax(dim=-1).tolist()):
            tokens[row].append(token)
        if step + 1 < count:
            logits = driver.decode(
                list(range(rows)), [ids[-1] for ids in tokens], [len(prompts[row]) + step for row in range(rows)]
            )
    return tokens
