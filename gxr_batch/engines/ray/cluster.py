"""Ray itself: started on this machine for one run and gone with it, or a cluster that is there already.

Ray is told to be quiet: no usage statistics, no dashboard, nothing of its workers on this terminal. What it prints of
a lost worker would stand in the middle of our output.

How many workers there are, and what each asks of the cluster, is worked out here as well, without Ray.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

from gxr_batch.engines.ray.janitor import hire
from gxr_batch.errors import ModelUnavailable
from gxr_batch.job import RaySection

# Prompts and texts are small and travel inside the calls: the smallest store that Ray takes is more than enough.
_OBJECT_STORE_BYTES = 80 * 2**20
_LONGEST_FOLDER = 40  # sockets lie in it, and the system allows 107 bytes for the path of one
_JANITOR_SECONDS = 10.0
_CONNECT_SECONDS = 10.0
_OWN_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's own would let every other process of the machine go first
    # Ray kills a worker once the machine's memory is nearly full, whoever filled it; the engines mind their own.
    "RAY_memory_monitor_refresh_ms": "0",
}


def load_ray() -> Any:
    """Import Ray. Raises ModelUnavailable where it is not installed."""
    try:
        import ray
    except ImportError:
        raise ModelUnavailable(
            "Ray is not installed.", where='engine.kind = "ray"', next_step="pip install 'gxr-batch[ray]'"
        ) from None
    return ray


@contextmanager
def connected(settings: RaySection, *, on_gpu: bool) -> Iterator[Placing]:
    """Have a Ray for the block, and say how to place the workers in it.

    A process that is connected to Ray already stays so. Raises ModelUnavailable.
    """
    ray = load_ray()
    if ray.is_initialized():
        yield place(settings, _nodes(ray), on_gpu=on_gpu)
    elif settings.address:
        with _existing(ray, settings.address):
            yield place(settings, _nodes(ray), on_gpu=on_gpu)
    else:
        with _local(ray, settings, on_gpu=on_gpu):
            yield place(settings, _nodes(ray), on_gpu=on_gpu)


def _nodes(ray: Any) -> list[Node]:
    offers = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(int(offer.get("CPU", 0)), int(offer.get("GPU", 0))) for offer in offers]


@contextmanager
def _existing(ray: Any, address: str) -> Iterator[None]:
    # Without a log level Ray tells of every try to connect, and then raises as well.
    with _settings({"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}), _signals_kept():
        _quiet(ray)
        try:
            if address != "auto":
                host, _, port = address.rpartition(":")
                # Ray itself would go on trying for minutes.
                socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
            ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
        except Exception as error:  # Ray raises bare ones too, where something does not come up in time
            raise ModelUnavailable(
                f"There is no Ray cluster to connect to ({type(error).__name__}).",
                where=f"ray.address = {address}",
                next_step="start one (docs/clusters.md), with the Ray and Python versions of this environment and its "
                "token (RAY_AUTH_TOKEN), or leave ray.address out",
            ) from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _local(ray: Any, settings: RaySection, *, on_gpu: bool) -> Iterator[None]:
    folder = _folder()
    own = _OWN_SETTINGS | {"RAY_AUTH_TOKEN": _token()}
    janitor = hire(folder)
    try:
        with _settings(own), _signals_kept():
            _quiet(ray)
            try:
                ray.init(
                    address="local",
                    num_cpus=_cpus(settings),
                    num_gpus=None if on_gpu else 0,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.CRITICAL,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    _temp_dir=folder,
                )
            except Exception as error:  # as above
                raise ModelUnavailable(
                    f"Ray could not be started ({type(error).__name__}).",
                    where=folder,
                    next_step="free memory and room in /tmp and /dev/shm, then run the same command again",
                ) from None
        yield
    finally:
        ray.shutdown()
        assert janitor.stdin is not None
        janitor.stdin.close()
        with suppress(Exception):  # it goes on by itself
            janitor.wait(_JANITOR_SECONDS)


def _cpus(settings: RaySection) -> int:
    """Return the processors that Ray shall count here: those of the machine, or as many as the job asks for."""
    own = len(os.sched_getaffinity(0))
    workers = 1 if settings.workers == "auto" else settings.workers
    return max(own, workers * (1 if settings.cpus_per_worker == "auto" else settings.cpus_per_worker))


def _folder() -> str:
    base = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="gxr-ray-", dir=base if len(base) <= _LONGEST_FOLDER - 17 else "/tmp")


@cache
def _token() -> str:
    """Return what this process's Rays ask of everybody who connects; Ray reads it once, and would else write a file."""
    return secrets.token_hex(32)


def _quiet(ray: ModuleType | Any) -> None:
    # What Ray's own debugger does while it has the terminal; there is no setting for it.
    ray._private.worker._worker_logs_enabled = False


@contextmanager
def _settings(values: Mapping[str, str]) -> Iterator[None]:
    """Have these environment variables in the block, but for those that the user has set."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: value for name, value in values.items() if not before[name]})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Put our handlers back: Ray takes SIGTERM for itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Node(NamedTuple):
    """What a host of the cluster offers."""

    cpus: int
    gpus: int


class Placing(NamedTuple):
    """So many workers, each with so many processors and graphics cards. A worker with a card asks for no processor
    unless the job says so: Ray's count of them must not keep a card idle."""

    workers: int
    cpus: int
    gpus: int


def place(settings: RaySection, nodes: Sequence[Node], *, on_gpu: bool) -> Placing:
    """Return the job's wish, its automatic values taken from the hosts: a worker for each card, else for each host."""
    asked = None if settings.cpus_per_worker == "auto" else settings.cpus_per_worker
    cards = sum(node.gpus for node in nodes) if on_gpu else 0
    if cards:
        return Placing(cards if settings.workers == "auto" else settings.workers, asked or 0, 1)
    hosts = [node.cpus for node in nodes if node.cpus] or [1]
    if settings.workers == "auto":
        cpus = asked or min(hosts)
        return Placing(max(1, sum(host // cpus for host in hosts) if asked else len(hosts)), cpus, 0)
    return Placing(settings.workers, asked or max(1, min(*hosts, sum(hosts) // settings.workers)), 0)
