"""Cleans up after a Ray that was started for one run, however that run ended.

A small process, started alongside Ray. It waits for its stdin to close, which the system does when the driver ends,
even by SIGKILL. Then it ends what is left of the run's Ray processes (Ray's agents would stay for a minute) and removes
their folder. It finds them by their log files in that folder, since Ray rewrites names and environments.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time

import psutil

_PATIENCE_SECONDS = 5.0


def hire(folder: str) -> subprocess.Popen[bytes]:
    """Start a janitor for the folder. It survives what ends the driver's process group, and exits once it is done."""
    # As a script, so that it need not import the package: it runs as long as the run.
    command = [sys.executable, "-I", __file__, folder]
    nowhere = subprocess.DEVNULL
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, cwd="/", start_new_session=True
    )


def clean(folder: str, driver: int) -> None:
    """End every process except the driver that writes to a file in the folder, and remove the folder."""
    until = time.monotonic() + _PATIENCE_SECONDS
    while left := [process for process in psutil.process_iter() if process.pid != driver and _at_home(process, folder)]:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if time.monotonic() > until:
            break
        psutil.wait_procs(left, timeout=0.5)
    shutil.rmtree(folder, ignore_errors=True)


def _at_home(process: psutil.Process, folder: str) -> bool:
    try:
        return any(file.path.startswith(f"{folder}/") and file.mode != "r" for file in process.open_files())
    except (psutil.Error, OSError):
        return False


if __name__ == "__main__":
    parent = os.getppid()  # a driver that is still alive has more to do than run Ray
    sys.stdin.buffer.read()
    clean(sys.argv[1], parent)
