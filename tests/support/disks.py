"""Small file systems that can become full or read-only."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    """Mount a small file system for the block; skip if that is not permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "gxr-test", folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder: Path, options: str) -> None:
    """Change a mounted file system; it is busy while a file is open for writing."""
    deadline = time.monotonic() + 60
    while subprocess.run(["mount", "-o", f"remount,{options}", folder], capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline, f"remount,{options} stayed busy"
