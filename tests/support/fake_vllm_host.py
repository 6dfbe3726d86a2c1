"""A host process without vLLM: uses the same messages over the same pipe, draws numbers, and dies on request.

`Setup.arguments` configures it: `seconds` per step, the token ids `deadly` (the process dies once a row with one of
them has two tokens) and `refused` (vLLM refuses such a row), `deaf` for a host that opens and never listens.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from gxr_batch.engines.vllm.host import Steps
from gxr_batch.engines.vllm.host_messages import Answer, Ask, Close, Count, Forget, Opened, Piece, Setup, Unopened


def listen(pipe: Connection, heard: queue.SimpleQueue) -> None:
    try:
        while True:
            heard.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)


class Fake:
    """Rows that get one number per step."""

    def __init__(self, pipe: Connection, settings: Mapping[str, Any]) -> None:
        self.pipe, self.settings = pipe, settings
        self.steps, self.tokens = Steps(), 0
        self.rows: dict[int, tuple[Ask, float, list[tuple[float, int]]]] = {}

    def take(self, message: Ask | Forget) -> None:
        now = time.monotonic()
        if isinstance(message, Forget):
            for number in message.numbers:
                self.rows.pop(number, None)
        elif self.settings["refused"] in message.token_ids:
            self.pipe.send(Answer(message.number, [], "error", "vLLM could not take this row (ValueError)"))
        else:
            if not self.rows:
                self.steps.wake(now)
            self.rows[message.number] = (message, now, [])

    def step(self) -> None:
        time.sleep(self.settings["seconds"])
        now = time.monotonic()
        self.steps.step(now, len(self.rows))
        self.tokens += len(self.rows)
        self.pipe.send(Count(self.tokens, 0))
        for number, (ask, began, made) in list(self.rows.items()):
            made.append((now, 100 + (ask.seed + len(made)) % 50))
            if ask.streams and len(made) < ask.max_new_tokens:
                self.pipe.send(Piece(number, [made[-1][1]]))
            if self.settings["deadly"] in ask.token_ids and len(made) == 2:
                os._exit(70)
            if len(made) == ask.max_new_tokens:
                del self.rows[number]
                ids, times = [token for _, token in made], (began, made[0][0], now)
                self.pipe.send(Answer(number, ids, "length", None, *times, *self.steps.between(began, now)))


def main() -> None:
    pipe = Connection(int(sys.argv[1]))
    setup: Setup = pipe.recv()
    if "unopened" in setup.arguments:
        print(setup.arguments["log"], flush=True)
        pipe.send(Unopened(setup.arguments["unopened"]))
        sys.exit(1)
    pipe.send(Opened("0.0.fake"))
    while setup.arguments.get("deaf"):
        time.sleep(1)
    heard: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=listen, args=(pipe, heard), daemon=True).start()
    fake = Fake(pipe, setup.arguments)
    while True:
        while not heard.empty() or not fake.rows:
            message = heard.get()
            if isinstance(message, Close):
                return
            fake.take(message)
        fake.step()


if __name__ == "__main__":
    main()
