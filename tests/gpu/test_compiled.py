"""Every kernel compiles for real models and GPUs, without spilling registers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")


def compiled(*options: str) -> list[str]:
    """Return the lines that the script prints, compiling for real and not for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT, *options], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


# Three of them are the draws' with each top_k; in float16 the second norm is compiled with a factor for each row too.
@pytest.mark.parametrize(("target", "dtype", "kernels"), [("75", "float16", 17), ("90", "bfloat16", 16)])
def test_no_kernel_spills_registers(target, dtype, kernels):
    lines = compiled("--model", "270m", "--target", target, "--type", dtype)
    assert lines[-1] == "no spills"
    assert sum(line.startswith(f"sm_{target}") for line in lines) == kernels


@pytest.mark.long
@pytest.mark.timeout(3600)  # seven minutes of CPU time
def test_no_kernel_spills_registers_for_any_model_and_gpu():
    assert compiled()[-1] == "no spills"
