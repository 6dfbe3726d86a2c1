"""The fast engine: rows decode side by side in slots, never wait for each other and never change each other.

Each step is: admit, prefill, decode, sample, retire (`decode_loop`). `slot_schedule` decides who is admitted,
`token_sampling` draws, `oom_retry` handles memory errors; the model call is a `backend`: the C kernels (`native`) if
they can run the model, else the library's forward pass (`library_backend`). Heavy imports happen when the model is
opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gxr_batch.engines.base import Encoder, Identity, Say, silent
from gxr_batch.job import Job
from gxr_batch.models.local_model import LocalModel

if TYPE_CHECKING:
    from gxr_batch.engines.slots.decode_loop import TransformersSession

KIND = "transformers"  # the name in job files
_KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})
# Configuration keys of models whose cache is more than keys and values by position.
_OTHER_CACHES = ("ssm_state_size", "mamba_d_state", "linear_num_key_heads", "kv_lora_rank", "attention_chunk_size")


def why_not_drivable(config: Any) -> str:
    """Return why a model with this text configuration cannot be run, empty if it can."""
    odd = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if odd:
        return f"its layers use unsupported kinds of attention: {', '.join(sorted(odd))}"
    if any(getattr(config, name, None) for name in _OTHER_CACHES):
        return "its cache is more than keys and values by position"
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder"
    return ""


def why_no_gpu_kernels(job: Job, model: Any) -> str:
    """Return why our forward pass for GPUs cannot run a model in this job, empty if it can on a single GPU."""
    if job.engine.kernels != "auto":
        return f'engine.kernels = "{job.engine.kernels}"'
    from gxr_batch.engines.slots.gpu.open_gpu import why_not_here

    return why_not_here(model)


class TransformersEngine:
    """Generates with the weights that `model.path` names."""

    def __init__(self, job: Job, say: Say = silent) -> None:
        """`say` gets sentences for the user while the model is opened."""
        self._job, self._say = job, say
        self._local = LocalModel(job, KIND)

    def identity(self) -> Identity:
        """Return which weights would be loaded. Raises ModelUnavailable if they cannot be found."""
        return self._local.identity()

    def encoder(self) -> Encoder:
        """Return the encoder of the model's tokenizer. Raises ModelUnavailable if it cannot be loaded."""
        return self._local.encoder()

    @contextmanager
    def open(self, until: float = float("inf")) -> Iterator[TransformersSession]:
        """Load the model and keep it for the block. Raises ModelUnavailable, OutOfTime."""
        from gxr_batch.engines.slots.open_engine import open_session
        from gxr_batch.models.device_memory import MemoryBudget

        memory = MemoryBudget(self._job.engine, self._say, until)
        with open_session(self._local.job, self._local, memory) as session:
            yield session


def most_slots(job: Job, device: str, dtype: str) -> int:
    """Return how many slots engine.slots = "auto" takes at most, for a device with this torch name and a number format.

    Our kernels for CPUs were measured with up to 128 rows (two cores), and were fastest with those.
    """
    from gxr_batch.engines.slots.native import compile_kernels

    ours = job.engine.kind == KIND and job.engine.kernels == "auto" and (device, dtype) == ("cpu", "bfloat16")
    return 128 if ours and compile_kernels.supported() else 64
