"""Cleans up behind a Ray that was started for one run, however that run ended.

A small process of its own, started beside Ray: it waits for its input to end, which the system sees to when the driver
is gone, by SIGKILL too. Then it ends what is left of the run's Ray processes (Ray's agents would stay for a minute) and
removes their folder. It knows them by their log files in that folder: names and environments of Ray's are rewritten.
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
    """Start a janitor of the folder. It survives what ends the driver's process group, and goes once it is done."""
    # As a script, so that it need not import the package: it stays for as long as the run.
    command = [sys.executable, "-I", __file__, folder]
    nowhere = subprocess.DEVNULL
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, cwd="/", start_new_session=True
    )


def clean(folder: str, driver: int) -> None:
    """End every process but the driver that writes to a file of the folder, and remove the folder."""
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
    parent = os.getppid()  # if it lives at the end, it has more to do than Ray
    sys.stdin.buffer.read()
    clean(sys.argv[1], parent)
