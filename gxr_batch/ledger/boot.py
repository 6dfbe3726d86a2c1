"""Identifies this boot of the machine, so that a record of a process is not taken for one after a reboot."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def boot_id() -> str:
    """Return an identifier of this boot, the same in all containers of the machine; "" if the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
