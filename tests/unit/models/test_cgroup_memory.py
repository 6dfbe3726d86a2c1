"""Limits of control groups, in made-up trees of both versions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from gxr_batch.models import device_memory
from gxr_batch.models.cgroup_memory import Limit, memory_limits
from gxr_batch.models.device_memory import Cpu

GIB = 2**30
NO_LIMIT = 9223372036854771712  # as the first version has it


def system(root: Path, groups: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    return root


def second(root: Path, path: str, limit: object, used: int, cache: int = 0) -> None:
    folder = root / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"anon 5\nfile 7\ninactive_file {cache // 2}\nactive_file {cache - cache // 2}\n"
    )


def first(root: Path, path: str, limit: int, used: int, cache: int = 0) -> None:
    folder = root / "sys/fs/cgroup/memory" / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 3\ninactive_file 1\ntotal_inactive_file {cache}\ntotal_active_file 0\n")


def test_a_limit_of_version_2_counts_cached_files_as_free(tmp_path):
    root = system(tmp_path, "0::/slurm/job_1/step_0\n")
    second(root, "slurm/job_1/step_0", "max", GIB)
    second(root, "slurm/job_1", 16 * GIB, 12 * GIB, cache=3 * GIB)
    second(root, "slurm", 64 * GIB, 60 * GIB)
    assert memory_limits(root) == [Limit(16 * GIB, 7 * GIB), Limit(64 * GIB, 4 * GIB)]


def test_a_limit_of_version_1_is_found_among_other_controllers(tmp_path):
    root = system(tmp_path, "9:pids:/job\n4:cpu,memory:/job/step\n1:name=systemd:/\n0::/\n")
    first(root, "job/step", 8 * GIB, GIB, cache=GIB // 2)
    first(root, "", NO_LIMIT, 100 * GIB)
    assert memory_limits(root)[0] == Limit(8 * GIB, 7 * GIB + GIB // 2)
    assert min(limit.size for limit in memory_limits(root)) == 8 * GIB


@pytest.mark.parametrize("groups", ["0::/\n", "0::/system.slice/docker-1.scope\n", "0::/../other\n"])
def test_inside_a_container_the_limit_is_that_of_the_folder_of_all_groups(tmp_path, groups):
    root = system(tmp_path, groups)
    second(root, "", 4 * GIB, GIB)
    assert memory_limits(root) == [Limit(4 * GIB, 3 * GIB)]


def test_a_container_of_version_1_without_its_own_view_of_groups_finds_its_limit(tmp_path):
    root = system(tmp_path, "4:memory:/docker/1\n")
    first(root, "", 4 * GIB, 5 * GIB)
    assert memory_limits(root) == [Limit(4 * GIB, 0)]


def test_without_readable_groups_there_is_no_limit(tmp_path):
    assert memory_limits(tmp_path) == []
    root = system(tmp_path, "0::/a\nodd\n")
    assert memory_limits(root) == []
    second(root, "a", "what", GIB)
    assert memory_limits(root) == []


def test_the_main_memory_is_the_least_of_host_and_groups(monkeypatch):
    host = SimpleNamespace(total=64 * GIB, available=32 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: host)
    monkeypatch.setattr(device_memory, "memory_limits", list)
    assert (Cpu().total(), Cpu().free()) == (64 * GIB, 32 * GIB)
    monkeypatch.setattr(device_memory, "memory_limits", lambda: [Limit(16 * GIB, 2 * GIB), Limit(NO_LIMIT, NO_LIMIT)])
    assert (Cpu().total(), Cpu().free()) == (16 * GIB, 2 * GIB)
