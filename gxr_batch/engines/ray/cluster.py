"""Ray itself: started on this machine for one run and ended with it, or an existing cluster.

Ray is silenced: no usage statistics, no dashboard, no worker output on this terminal. What it prints about a lost
worker would appear in the middle of our output.

Other users of the machine cannot reach a Ray that was started here: it listens on the loopback interface only, its
sockets are in a folder of this user, and its workers import nothing from the current folder.

The number of workers and the resources that each requests are computed here as well, without Ray.
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

from gxr_batch.cells import quoted
from gxr_batch.disk import temporary_errors
from gxr_batch.engines.ray.janitor import hire
from gxr_batch.errors import ModelUnavailable
from gxr_batch.extras import missing_extra
from gxr_batch.job import RaySection

# Prompts and texts are small and travel inside the calls: the smallest object store that Ray accepts is enough.
_OBJECT_STORE_BYTES = 80 * 2**20
_LONGEST_FOLDER = 42  # sockets are created in it, and a socket path is limited to 107 bytes
_JANITOR_SECONDS = 10.0
_CONNECT_SECONDS = 10.0
_OWN_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's default would give every other process priority
    # Ray kills a worker once the machine's memory is nearly full, whatever filled it; the engines limit themselves.
    "RAY_memory_monitor_refresh_ms": "0",
    # Despite its name it counts on Linux too: without clusters, every process of Ray listens on 127.0.0.1 only.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


def load_ray() -> Any:
    """Import Ray. Raises ModelUnavailable if it is not installed."""
    try:
        import ray
    except ImportError:
        raise missing_extra("ray", "ray", purpose="The ray engine", where='engine.kind = "ray"') from None
    return ray


@contextmanager
def connected(settings: RaySection, *, on_gpu: bool) -> Iterator[Placing]:
    """Connect to Ray for the block, and return how to place the workers in it.

    A process that is already connected to Ray stays connected. Raises ModelUnavailable.
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
    # Without a log level Ray logs every attempt to connect, and then raises as well.
    with _settings({"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}), _signals_kept():
        _quiet(ray)
        try:
            if address != "auto":
                host, _, port = address.rpartition(":")
                # Otherwise Ray would keep trying for minutes.
                socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
            ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, job_config=_job_config(ray))
        except Exception as error:  # Ray also raises bare ones if something does not come up in time
            raise ModelUnavailable(
                f"Cannot connect to a Ray cluster ({type(error).__name__}).",
                where=f"ray.address = {quoted(address)}",
                next_step="start one (docs/clusters.md), with the Ray and Python versions of this environment and its "
                "token (RAY_AUTH_TOKEN), or remove ray.address",
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
        with _settings(own), _signals_kept(), _on_loopback(ray):
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
                    job_config=_job_config(ray),
                    # Ray opens its folder to every user of the machine; the one above it stays closed.
                    _temp_dir=f"{folder}/r",
                )
            except Exception as error:  # as above
                raise ModelUnavailable(
                    f"Ray could not be started ({type(error).__name__}).",
                    where=folder,
                    next_step="free memory and disk space in /tmp and /dev/shm, then run the same command again",
                ) from None
        yield
    finally:
        ray.shutdown()
        assert janitor.stdin is not None
        janitor.stdin.close()
        with suppress(Exception):  # the janitor ends by itself
            janitor.wait(_JANITOR_SECONDS)


def _cpus(settings: RaySection) -> int:
    """Return the number of CPUs that Ray counts here: those of the machine, or as many as the job asks for."""
    own = len(os.sched_getaffinity(0))
    workers = 1 if settings.workers == "auto" else settings.workers
    return max(own, workers * (1 if settings.cpus_per_worker == "auto" else settings.cpus_per_worker))


def _folder() -> str:
    with temporary_errors():
        base = tempfile.gettempdir()
        return tempfile.mkdtemp(prefix="gxr-ray-", dir=base if len(base) <= _LONGEST_FOLDER - 19 else "/tmp")


@cache
def _token() -> str:
    """Return the token that our Ray requires of clients; Ray reads it once, and would otherwise write a file."""
    return secrets.token_hex(32)


def _quiet(ray: ModuleType | Any) -> None:
    # This is what Ray's debugger does while it has the terminal; there is no setting for it.
    ray._private.worker._worker_logs_enabled = False


def _job_config(ray: Any) -> Any:
    """Return a job whose workers do not import from this process's current folder.

    Ray puts that folder first on their path, except for jobs of remote clients, whose folder the workers cannot have.
    """
    return ray.job_config.JobConfig(_client_job=True)


@contextmanager
def _on_loopback(ray: Any) -> Iterator[None]:
    """Have Ray use the address 127.0.0.1 for the block: it read the variable of `_OWN_SETTINGS` when imported."""
    constants = ray._private.ray_constants
    before = constants.ENABLE_RAY_CLUSTER
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _settings(values: Mapping[str, str]) -> Iterator[None]:
    """Set these environment variables for the block, except those that the user has set."""
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
    """Restore our handlers: Ray installs its own for SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Node(NamedTuple):
    """The resources of one host of the cluster."""

    cpus: int
    gpus: int


class Placing(NamedTuple):
    """The number of workers, and the CPUs and GPUs that each requests. A worker with a GPU requests no CPU
    unless the job names a number: Ray's CPU count must not leave a GPU idle."""

    workers: int
    cpus: int
    gpus: int


def place(settings: RaySection, nodes: Sequence[Node], *, on_gpu: bool) -> Placing:
    """Return the job's placement, with automatic values from the hosts: a worker per GPU, else one per host."""
    asked = None if settings.cpus_per_worker == "auto" else settings.cpus_per_worker
    gpus = sum(node.gpus for node in nodes) if on_gpu else 0
    if gpus:
        return Placing(gpus if settings.workers == "auto" else settings.workers, asked or 0, 1)
    hosts = [node.cpus for node in nodes if node.cpus] or [1]
    if settings.workers == "auto":
        cpus = asked or min(hosts)
        return Placing(max(1, sum(host // cpus for host in hosts) if asked else len(hosts)), cpus, 0)
    return Placing(settings.workers, asked or max(1, min(*hosts, sum(hosts) // settings.workers)), 0)
