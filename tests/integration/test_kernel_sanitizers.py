"""The C kernels under AddressSanitizer and UndefinedBehaviorSanitizer, with hostile numbers in a model's configuration.

The products run on any CPU, with plain C in place of their intrinsics; `kernel_fuzz` has the cases.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from kernel_builds import SANITIZED, build, products, sanitizer_environment, why_no_sanitizers
from places import SUPPORT

CASES_A_PROCESS = 400


@pytest.fixture(scope="module")
def libraries(tmp_path_factory) -> list[str]:
    """The sanitized kernels, as arguments of `kernel_fuzz`."""
    if why := why_no_sanitizers():
        pytest.skip(f"the kernels cannot run under sanitizers here: {why}")
    folder = tmp_path_factory.mktemp("kernels")
    return [f"{product}={build(product, folder, *SANITIZED)}" for product in products()]


def fuzz(libraries: list[str], first: int, cases: int) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "kernel_fuzz.py"), str(first), str(cases), *libraries],
        env=sanitizer_environment(), capture_output=True, text=True, check=False, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    found = json.loads(done.stdout)
    print(found)
    return found["ends"]


def test_no_number_of_a_configuration_makes_the_kernels_leave_their_memory(libraries):
    ends = fuzz(libraries, 0, 60)
    assert sum(ends.values()) == 60
    assert ends["generated"] >= 5
    assert ends["its numbers are refused"] >= 5


@pytest.mark.long
@pytest.mark.parametrize("first", range(1000, 1000 + 10 * CASES_A_PROCESS, CASES_A_PROCESS))
def test_four_thousand_configurations_keep_the_kernels_in_their_memory(libraries, first):
    ends = fuzz(libraries, first, CASES_A_PROCESS)
    assert ends["generated"] >= CASES_A_PROCESS // 20
