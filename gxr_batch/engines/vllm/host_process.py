"""Starts a host process, talks to it, and cleans up after it."""

from __future__ import annotations

import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import gxr_batch
from gxr_batch.disk import temporary_errors
from gxr_batch.engines.vllm.host_messages import Ask, Close, Forget, Gone, Setup

# -P, so that a folder called vllm in the current directory is not imported.
HOST = (sys.executable, "-P", "-m", "gxr_batch.engines.vllm.host")
_CLOSE_SECONDS = 20.0
_ERROR_LINE = re.compile(r"\b((?:\w+\.)*\w+(?:Error|Exception): \S.*)")
# vLLM's own summary, which only refers to the cause above it.
_NO_CAUSE = "Engine core initialization failed"
_LONGEST_REASON = 400


class HostProcess:
    """A host and its pipe. `events` receives its messages, and Gone once it has ended.

    A temporary folder holds its `log` and the sockets of vLLM's processes, which remain if those are killed.
    """

    def __init__(self, setup: Setup, environment: Mapping[str, str], command: Sequence[str] = HOST) -> None:
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._letters: queue.SimpleQueue[Setup | Ask | Forget | Close | None] = queue.SimpleQueue()
        with temporary_errors():
            self._folder = Path(tempfile.mkdtemp(prefix="gxr-batch-vllm-"))
        self.log = self._folder / "vllm.log"
        self._pipe, theirs = Pipe()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(self._folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment({"VLLM_RPC_BASE_PATH": str(self._folder), **environment}),
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the run alone, and one kill reaches all of vLLM's processes
            )
        theirs.close()
        for work in (self._read, self._write):
            threading.Thread(target=work, name="gxr-batch-vllm", daemon=True).start()
        self.send(setup)

    def send(self, message: Setup | Ask | Forget | Close) -> None:
        """Queue a message, without waiting for a host that does not listen; drop it if the host has ended."""
        self._letters.put(message)

    def close(self) -> None:
        """Let the host shut down, and kill it if it does not in time."""
        self.send(Close())
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_SECONDS)
        self.discard()

    def kill(self) -> None:
        """Kill the host and every process that it started; keep its log."""
        with suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def discard(self) -> None:
        """Kill the host and delete its log."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def reason(self) -> str:
        """Return the last error in the log, in one line, "" for none. For hosts that have seen no prompt."""
        lines = self.log.read_text(errors="replace").splitlines()
        found = [match[1] for line in lines if (match := _ERROR_LINE.search(line)) and _NO_CAUSE not in line]
        return found[-1][:_LONGEST_REASON] if found else ""

    def _read(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                self.events.put(self._pipe.recv())
        self.events.put(Gone())
        self._letters.put(None)

    def _write(self) -> None:
        with suppress(OSError):  # Gone follows
            while (message := self._letters.get()) is not None:
                self._pipe.send(message)


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """Return the host's environment: this package importable, vLLM's usage statistics off, logging to stderr."""
    package = str(Path(gxr_batch.__file__).parent.parent)
    paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CONFIGURE_LOGGING": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a forked process would hold the pipe open beyond the host's end
        "HF_HUB_OFFLINE": "1",  # all files are in local folders by now
        **more,
    }
