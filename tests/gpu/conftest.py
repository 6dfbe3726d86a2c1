"""Tests of the GPU kernels: on a GPU if there is one, else on the CPU in Triton's interpreter; not without Triton."""

from __future__ import annotations

import importlib.util
import os
import sys

import numpy as np
import pytest
import torch

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"


def _why_not() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not ON_GPU and "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton was imported before its interpreter was chosen: set TRITON_INTERPRET=1"
    return ""


WHY_NOT = _why_not()
if not WHY_NOT and not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    from triton_interpreter import correct_interpreter

    correct_interpreter()


class _Skipped(pytest.Module):
    def collect(self):
        pytest.skip(WHY_NOT, allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    """Skip modules without importing them: they import triton."""
    return _Skipped.from_parent(parent, path=module_path) if WHY_NOT else None


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture
def interpreted():
    """The CPU takes the GPU's part in these tests, in Triton's interpreter."""
    if ON_GPU:  # kernels compiled for a GPU refuse tensors of the CPU
        pytest.skip("its model is on the CPU: run it with TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def _no_warnings_of_overflow():
    """A GPU computes infinities and NaN without a warning; NumPy, which the interpreter uses, warns."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def launch():
    from gxr_batch.engines.slots.gpu.launch import Launcher

    return Launcher()
