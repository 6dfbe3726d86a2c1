"""A Ray cluster of two nodes on this machine, in a separate process: prints its address, ends when its stdin closes.

A line on stdin ends the second node, as if its host were gone; then a third one joins.
"""

from __future__ import annotations

import logging
import sys

from ray.cluster_utils import Cluster

STORE = 80 * 2**20


def main() -> None:
    cluster = Cluster()
    logging.disable(logging.CRITICAL)
    cluster.add_node(num_cpus=1, object_store_memory=STORE, include_dashboard=False)
    second = cluster.add_node(num_cpus=1, object_store_memory=STORE)
    print(cluster.address, flush=True)
    if sys.stdin.readline():
        cluster.remove_node(second, allow_graceful=False)
        print("gone", flush=True)
        cluster.add_node(num_cpus=1, object_store_memory=STORE)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
