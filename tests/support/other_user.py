"""Runs a block without root's permissions, so that tests of permissions hold for root too."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534


@contextmanager
def unprivileged() -> Iterator[None]:
    """Run the block as a user to whom permissions apply: as nobody if this is root, else as the same user."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def shared_folder() -> Iterator[Path]:
    """Yield a folder that every user may read and write; pytest's are for their owner only."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="gxr-shared-") as name:
        os.chmod(name, 0o777)
        yield Path(name)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """Run the block with a umask."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
