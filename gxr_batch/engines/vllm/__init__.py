"""The vLLM engine: vLLM's asynchronous engine as a stream, in a separate process.

Prompts go out as token ids and every answer returns as it ends. `engine_args` decides what vLLM is opened with; `host`
is the process that runs it, `host_process` starts that process, `session` is the stream. Heavy imports happen when the
model is opened, and vLLM is imported only in the host.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gxr_batch.engines.base import Encoder, EngineInfo, Identity, Say, require_time, silent
from gxr_batch.errors import ModelUnavailable
from gxr_batch.extras import require
from gxr_batch.job import Job
from gxr_batch.models.local_model import LocalModel

if TYPE_CHECKING:
    from gxr_batch.engines.vllm.engine_args import Opening
    from gxr_batch.engines.vllm.host_process import HostProcess
    from gxr_batch.engines.vllm.session import VllmSession

KIND = "vllm"
_WHERE = 'engine.kind = "vllm"'
_LOOK_SECONDS = 0.2


def require_vllm() -> None:
    """Raise ModelUnavailable if vLLM is not installed."""
    require("vllm", "vllm", purpose="The vllm engine", where=_WHERE)


class VllmEngine:
    """Generates with the weights that `model.path` names."""

    def __init__(self, job: Job, say: Say = silent) -> None:
        """`say` gets sentences for the user while the model is opened, and when an engine died."""
        self._job, self._say = job, say
        self._local = LocalModel(job, KIND)

    def identity(self) -> Identity:
        """Return which weights would be loaded. Raises ModelUnavailable if they cannot be found."""
        return self._local.identity()

    def encoder(self) -> Encoder:
        """Return the encoder of the model's tokenizer. Raises ModelUnavailable if it cannot be loaded."""
        return self._local.encoder()

    @contextmanager
    def open(self, until: float = float("inf")) -> Iterator[VllmSession]:
        """Load the model and keep it for the block. Raises ModelUnavailable, OutOfTime."""
        require_vllm()
        from gxr_batch.engines.vllm.engine_args import prepare_opening
        from gxr_batch.engines.vllm.host_process import HostProcess
        from gxr_batch.engines.vllm.session import Limits, VllmSession
        from gxr_batch.models.device_memory import MemoryBudget

        began = time.monotonic()
        tokenizer = self._local.tokenizer()
        memory = MemoryBudget(self._job.engine, self._say, until)
        opening = prepare_opening(self._local.job, tokenizer, memory)

        def start() -> HostProcess:
            return HostProcess(opening.setup, opening.environment)

        host = start()
        try:
            version = _opened(host, until)
        except BaseException:  # Ctrl-C too: a host that is still opening does not listen
            host.discard()
            raise
        most_tokens, most_restarts = self._job.model.max_seq_length, self._job.vllm.max_restarts
        limits = Limits(opening.vocab, most_tokens, most_restarts, opening.gpu_bytes)
        info = self._info(opening, version, time.monotonic() - began)
        session = VllmSession(info, host, start, tokenizer, limits, say=self._say, form=opening.form)
        try:
            yield session
        finally:
            session.close()

    def _info(self, opening: Opening, vllm: str, load_seconds: float) -> EngineInfo:
        from importlib.metadata import version

        return EngineInfo(
            identity=self.identity(),
            device=opening.placement.device,
            dtype=opening.placement.dtype,
            quantization="nf4" if opening.placement.four_bit else None,
            slots=opening.slots,
            load_seconds=load_seconds,
            reproducible=False,
            versions={"vllm": vllm} | {name: version(name) for name in ("torch", "transformers")},
            notices=opening.notices,
            adapter=opening.adapter,
        )


def _opened(host: HostProcess, until: float = float("inf")) -> str:
    """Wait for a host to open vLLM and return vLLM's version. Raises ModelUnavailable if it cannot, OutOfTime."""
    from gxr_batch.engines.vllm.host_messages import Count, Gone, Opened, Unopened

    while True:
        try:
            event: Opened | Unopened | Count | Gone = host.events.get(timeout=_LOOK_SECONDS)
        except queue.Empty:
            require_time(until)
            continue
        if isinstance(event, Opened):
            return event.version
        if isinstance(event, Unopened) and event.about_adapter:
            raise ModelUnavailable(
                f"vLLM could not apply the adapter: {event.reason}.",
                where="model.adapter",
                next_step='merge it into its model and use that as model.path, or set engine.kind = "transformers"',
            )
        if isinstance(event, Unopened | Gone):
            reason = host.reason() or (event.reason if isinstance(event, Unopened) else "its process ended")
            raise ModelUnavailable(
                f"vLLM could not open the model: {reason}",
                where=_WHERE,
                next_step="give it more memory, lower engine.slots or model.max_seq_length, or set "
                'engine.kind = "transformers"',
            )
