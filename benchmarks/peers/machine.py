"""Measures this machine's memory reads and bfloat16 matrix products, each the best of a few tries."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch

_SIDE = 2048
_READ_BYTES = 2**30


def fastest(call: Callable[[], object], tries: int = 5) -> float:
    """Return the seconds of the fastest of a few calls."""
    call()
    seconds = []
    for _ in range(tries):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def main() -> None:
    """Measure and print."""
    numbers = torch.ones(_READ_BYTES // 8, dtype=torch.int64)  # summing integers is bound by memory reads
    reads = _READ_BYTES / fastest(numbers.sum)
    left, right = (torch.randn(_SIDE, _SIDE).bfloat16() for _ in range(2))
    products = 2 * _SIDE**3 / fastest(lambda: left @ right, tries=3)
    print(json.dumps({"tokens": 0, "seconds": 1, "bytes_a_second": reads, "flops_a_second": products}))


if __name__ == "__main__":
    main()
