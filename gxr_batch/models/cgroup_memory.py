"""The memory that Linux's control groups leave this process; containers, Kubernetes, Slurm and systemd set limits.

What the host has free says nothing about such a limit, and a process that exceeds it is killed without a message. Both
versions of the interface are read, as the kernel's admin-guide describes them (cgroup-v2.rst, cgroup-v1/memory.rst).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Limit(NamedTuple):
    """The limit of one group in bytes, and what is left of it for all its processes together."""

    size: int
    free: int


class _Files(NamedTuple):
    """Where a version's groups are, and the names of their files; `cache` are lines of memory.stat."""

    folder: str
    limit: str
    used: str
    cache: tuple[str, str]


_VERSION_1 = _Files(
    "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
)
_VERSION_2 = _Files("", "memory.max", "memory.current", ("inactive_file", "active_file"))


def memory_limits(root: Path = Path("/")) -> list[Limit]:
    """Return the limits of this process's groups and of those above them, as far as they can be read.

    `root` is where the system's files are, for tests.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        files = _VERSION_1 if controllers else _VERSION_2
        group = Path(path.lstrip("/"))
        # Inside a container the path may be the host's, which does not exist here; the container's group is then the
        # folder of all groups, the last of the parents.
        for folder in (group, *group.parents):
            limit = _limit(root / "sys/fs/cgroup" / files.folder / folder, files)
            found += [limit] if limit else []
    return found


def _limit(group: Path, files: _Files) -> Limit | None:
    try:
        size, used = (int((group / name).read_text()) for name in (files.limit, files.used))
        lines = (group / "memory.stat").read_text().splitlines()
        # The kernel drops it before it kills; without that, every file that was read once would count as taken.
        cache = sum(int(number) for name, _, number in (line.partition(" ") for line in lines) if name in files.cache)
    except (OSError, ValueError):  # there is no such group, or its limit is "max"
        return None
    return Limit(size, min(size, max(0, size - used + cache)))
