"""The host process: runs vLLM's asynchronous engine and answers rows over a pipe, each as it ends.

A separate process, because vLLM starts further processes, which survive if their parent is killed: the host sees its
pipe close and ends them. It also keeps vLLM's logging, environment and signals out of the run's process.

A row's share of a step is the growth of the integral of 1/n over time while it ran, where n is the rows of a step: the
shares add up to the time in which there was any row.

    python -m gxr_batch.engines.vllm.host DESCRIPTOR FOLDER
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from bisect import bisect_right
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from gxr_batch.engines.vllm.host_messages import Answer, Ask, Close, Count, Forget, Opened, Piece, Setup, Unopened

_COUNT_SECONDS = 0.2
_SHUT_DOWN_SECONDS = 10.0
_LONGEST_REASON = 400


class Host:
    """One opened engine at the end of a pipe; removes `folder` if no other process is left to do so."""

    def __init__(self, pipe: Connection, setup: Setup, folder: str) -> None:
        self._pipe, self._setup, self._folder = pipe, setup, folder
        self._steps = Steps()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._asked_at: dict[int, float] = {}
        self._tokens = self._preemptions = 0
        self._counted_at = 0.0
        self._closed = asyncio.Event()
        self._opening = True
        self._llm: Any = None

    async def serve(self) -> bool:
        """Open the engine, report it, and answer until the pipe closes; return whether it could be opened."""
        from vllm import __version__

        threading.Thread(target=self._listen, args=(asyncio.get_running_loop(),), daemon=True).start()
        unopened = await self._open()
        self._opening = False
        self._tell(unopened or Opened(__version__))
        if unopened is None:
            await self._closed.wait()
        self._shut_down()
        return unopened is None

    # ------------------------------------------------------------------ opening

    async def _open(self) -> Unopened | None:
        """Open the engine and test it; return what went wrong."""
        from vllm import AsyncEngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            arguments = AsyncEngineArgs(**self._setup.arguments)
            # Our own loggers replace vLLM's, and turn its measurements on.
            self._llm = AsyncLLM.from_engine_args(arguments, stat_loggers=[self._recorder])
        except Exception as error:  # anything that a model, a GPU or a compiler can raise
            return Unopened(_one_line(error))
        adapter = self._setup.adapter
        self._lora = None if adapter is None else LoRARequest("adapter", 1, adapter)
        try:
            if self._lora is not None and not await self._llm.add_lora(self._lora):
                return Unopened("it was not accepted", about_adapter=True)
            with_adapter = await self._probe(self._lora)
            if self._lora is not None and with_adapter == await self._probe(None):
                return Unopened("the model's logits are the same with it and without it", about_adapter=True)
        except Exception as error:
            return Unopened(_one_line(error), about_adapter=self._lora is not None)
        self._tokens = 0
        return None

    async def _probe(self, lora: Any) -> list[tuple[int, float]]:
        """Return the likeliest tokens after a fixed prompt and their log-probabilities."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input

        prompt = tokens_input(list(self._setup.probe))
        params = SamplingParams(temperature=0, max_tokens=2, logprobs=5, detokenize=False)
        found: list[tuple[int, float]] = []
        async for output in self._llm.generate(prompt, params, f"probe-{time.monotonic_ns()}", lora_request=lora):
            places = output.outputs[0].logprobs or []
            found = sorted((token, one.logprob) for place in places[:1] for token, one in place.items())
        return found

    def _recorder(self, _config: Any, _index: int = 0) -> Any:
        """Return the class through which vLLM reports each of its steps."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        host = self

        class Recorder(StatLoggerBase):  # type: ignore[misc]  # vLLM is not installed when types are checked
            def __init__(self) -> None:
                """Keep no state."""

            def record(
                self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
            ) -> None:
                host._step(scheduler_stats, iteration_stats)

            def log_engine_initialized(self) -> None:
                """Log nothing."""

        return Recorder()

    def _step(self, scheduler: Any, iteration: Any) -> None:
        now = time.monotonic()
        if iteration is None:
            return
        running = scheduler.num_running_reqs if scheduler is not None else len(self._tasks)
        # The scheduler counts after the step, when the rows that ended in it are gone.
        self._steps.step(now, running + len(iteration.finished_requests))
        self._steps.forget(min(self._asked_at.values(), default=now))
        self._tokens += iteration.num_generation_tokens
        self._preemptions += iteration.num_preempted_reqs
        if self._tasks and now - self._counted_at >= _COUNT_SECONDS:  # the probe's tokens belong to no row
            self._counted_at = now
            self._tell(Count(self._tokens, self._preemptions))

    def _tell(self, message: Unopened | Opened | Piece | Answer | Count) -> None:
        # The listener handles a closed pipe; here it must not look like an error of vLLM.
        with suppress(OSError):
            self._pipe.send(message)

    # ------------------------------------------------------------------ rows

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Pass messages to the loop until the pipe closes; in a thread, since opening keeps the loop busy for minutes.

        A closed pipe means that the run's process is gone: free the memory soon, whatever vLLM is doing.
        """
        with suppress(EOFError, OSError):
            while True:
                loop.call_soon_threadsafe(self._take, self._pipe.recv())
        if not self._opening:
            loop.call_soon_threadsafe(self._closed.set)
            time.sleep(_SHUT_DOWN_SECONDS)
        shutil.rmtree(self._folder, ignore_errors=True)
        _die()

    def _take(self, message: Ask | Forget | Close) -> None:
        if isinstance(message, Close):
            self._closed.set()
            return
        if isinstance(message, Forget):
            for number in message.numbers:
                if task := self._tasks.get(number):
                    task.cancel()
            return
        now = time.monotonic()
        if not self._tasks:
            self._steps.wake(now)
        self._asked_at[message.number] = now
        task = self._tasks[message.number] = asyncio.create_task(self._row(message))
        task.add_done_callback(lambda _: self._drop(message.number))

    def _drop(self, number: int) -> None:
        del self._tasks[number], self._asked_at[number]

    async def _row(self, ask: Ask) -> None:
        """Generate one row and send the answer."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            answer = await self._generate(ask)
        except EngineDeadError:
            _die()
        except Exception as error:
            if self._llm.errored:
                _die()
            # Only the name: vLLM's message about a request may quote it.
            answer = Answer(ask.number, [], "error", f"vLLM could not take this row ({type(error).__name__})")
        if answer.finish == "abort":  # not requested here: the engine is being shut down from outside
            _die()
        self._tell(answer)

    async def _generate(self, ask: Ask) -> Answer:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            **self._setup.sampling,
            seed=ask.seed,
            max_tokens=ask.max_new_tokens,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA if ask.streams else RequestOutputKind.FINAL_ONLY,
        )
        prompt = tokens_input(ask.token_ids)
        ids: list[int] = []
        async for output in self._llm.generate(prompt, params, str(ask.number), lora_request=self._lora):
            made = output.outputs[0]
            ids += made.token_ids
            if ask.streams and not output.finished:
                self._tell(Piece(ask.number, list(made.token_ids)))
        times = output.metrics
        share, rows = self._steps.between(times.scheduled_ts, times.last_token_ts)
        return Answer(
            ask.number,
            ids,
            made.finish_reason,
            scheduled_at=times.scheduled_ts,
            first_token_at=times.first_token_ts,
            ended_at=times.last_token_ts,
            share=share,
            rows=rows,
        )

    def _shut_down(self) -> None:
        """End vLLM's processes; with SIGINT, because they ignore SIGTERM."""
        for task in self._tasks.values():
            task.cancel()
        for child in multiprocessing.active_children():
            with suppress(OSError):
                os.kill(child.pid or 0, signal.SIGINT)
        if self._llm is not None:
            self._llm.shutdown()


def _die() -> NoReturn:
    """End all of vLLM's processes; the process that started this one sees the pipe close."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _one_line(error: BaseException) -> str:
    """Return an error's class and message in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_LONGEST_REASON]}"


def main() -> None:
    """Serve the pipe with the given descriptor; the folder holds the log, to which stdout and stderr go."""
    # Service managers send these to every process of a job. The run's process handles them and decides; an engine that
    # handled them too would drop the rows that the run wants to finish. vLLM's processes inherit this.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    pipe, folder = Connection(int(sys.argv[1])), sys.argv[2]
    try:
        setup: Setup | None = pipe.recv()
    except (EOFError, OSError):  # the process that started this one is gone
        setup = None
    if setup is not None and not asyncio.run(Host(pipe, setup, folder).serve()):
        sys.exit(1)
    shutil.rmtree(folder, ignore_errors=True)  # not needed after an orderly end, and no other process may be left


_KEPT = 4096


class Steps:
    """The steps so far. Times are time.monotonic seconds and never go back."""

    def __init__(self) -> None:
        self._moments = [0.0]
        self._shares = [0.0]
        self._rows = [0.0]

    def wake(self, now: float) -> None:
        """Skip the time up to now: the engine had nothing to do."""
        self._add(now, 0.0, 0.0)

    def step(self, now: float, rows: int) -> None:
        """Record a step that ended now with this many rows, at least one."""
        seconds = max(0.0, now - self._moments[-1])
        self._add(now, seconds / max(rows, 1), seconds * max(rows, 1))

    def between(self, began: float, ended: float) -> tuple[float, float]:
        """Return the share, in seconds, of a row that was in every step between two times, and its mean rows."""
        share, rows = (self._at(ended, sums) - self._at(began, sums) for sums in (self._shares, self._rows))
        return share, rows / (ended - began) if ended > began else 1.0

    def forget(self, before: float) -> None:
        """Drop steps that ended before a time, once there are many."""
        if len(self._moments) > _KEPT:
            cut = max(0, bisect_right(self._moments, before) - 1)
            for sums in (self._moments, self._shares, self._rows):
                del sums[:cut]

    def _add(self, now: float, share: float, rows: float) -> None:
        self._moments.append(max(now, self._moments[-1]))
        self._shares.append(self._shares[-1] + share)
        self._rows.append(self._rows[-1] + rows)

    def _at(self, moment: float, sums: list[float]) -> float:
        """Return a sum at a time, interpolated linearly between two steps."""
        right = bisect_right(self._moments, moment)
        if right == 0:
            return sums[0]
        if right == len(sums):
            return sums[-1]
        began, ended = self._moments[right - 1], self._moments[right]
        low, high = sums[right - 1], sums[right]
        return low + (high - low) * (moment - began) / (ended - began)


if __name__ == "__main__":
    main()
