"""How many workers there are, and what each asks of the cluster. Pure: no Ray here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gxr_batch.job import RaySection


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
