"""What a prefill asks of the device, and what is reserved, on the real shapes of the 4B model without their memory.

Such tensors make every read-back and every mix of devices an error, our kernels are booked by the launcher, and
torch's operations are counted here. test_dry_run.py has the whole engine, and its decode steps.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny import shape_4b
from tiny_sessions import prompts
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import Gemma3ForCausalLM

from gxr_batch.engines.slots.decoding_row import RowState
from gxr_batch.engines.slots.gpu.device_steps import DeviceSteps
from gxr_batch.engines.slots.gpu.forward import Forward
from gxr_batch.engines.slots.gpu.fused_weights import fuse, why_not
from gxr_batch.engines.slots.gpu.memory_plan import plan
from gxr_batch.engines.slots.gpu.open_gpu import cache_of, sizes_of
from gxr_batch.job.sampling import Sampling

# What a call may launch, our kernels and torch's together; the library's forward pass launches about 3,000.
MOST_KERNELS = 450
# Operations that launch nothing.
_VIEWS = {
    "alias", "as_strided", "clamp_view", "detach", "empty", "expand", "new_empty", "permute", "reshape", "select",
    "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip


class Counted(TorchDispatchMode):
    """Counts torch's operations on the device, and those that involve the host."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.from_host: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.partition("::")[2]
        devices = {one.device.type for one in tree_iter((args, kwargs, out)) if isinstance(one, torch.Tensor)}
        if "meta" in devices and name.strip("_") not in _VIEWS:
            self.kernels[name] += 1
            if "cpu" in devices:
                self.from_host[name] += 1
        return out


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        made = Gemma3ForCausalLM(shape_4b(max_position_embeddings=8192)).to(torch.bfloat16).eval()
    assert not why_not(made)
    return made


def steps_of(model, *, reproducible: bool, sampling=None, gib: int = 8) -> DeviceSteps:
    found = plan(sizes_of(model.config, model.dtype), capacity=2048, budget=gib * 2**30)
    weights = fuse(model, found.capacity)
    forward = Forward(weights, cache_of(weights, found), chunk=found.chunk, reproducible=reproducible)
    made = DeviceSteps(forward, sampling or Sampling())
    made.plan = found
    return made


def admitted(steps: DeviceSteps, count: int) -> list[RowState]:
    rows = [RowState(prompt, 0.0, slot) for slot, prompt in enumerate(prompts([120] * count, new=256))]
    for row in rows:
        assert steps.reserve(row)
    return rows


def test_a_prefill_sends_four_times_to_the_device_and_reads_nothing(model):
    steps = steps_of(model, reproducible=False)
    rows = admitted(steps, 16)  # 1,920 tokens: one call
    with Counted() as counted:
        steps.prefill(rows, 0)
    assert sum(counted.from_host.values()) <= 4
    launched = sum(steps._forward.launch.launches.values())
    assert launched + sum(counted.kernels.values()) <= MOST_KERNELS


@pytest.mark.parametrize("gib", [2, 8, 30])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0), Sampling(top_k=256)])
def test_what_is_reserved_is_what_the_plan_says(model, gib, sampling):
    steps = steps_of(model, reproducible=False, gib=gib, sampling=sampling)
    forward, state = steps._forward, steps._state
    held = {}
    for owner in (forward, state, *forward.cache.groups):
        for value in vars(owner).values():
            for tensor in tree_iter(value):
                if isinstance(tensor, torch.Tensor):
                    held[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    assert sum(held.values()) <= steps.plan.bytes <= gib * 2**30
    assert sum(held.values()) >= 0.9 * (steps.plan.bytes - 96 * 2**20)
